"""Where a PC's virtio devices lie: a page of addresses and an interrupt each, as data for ACPI and the command line.

ACPI describes each as a device with ``_HID`` ``LNRO0005`` (``drivers/virtio/virtio_mmio.c``, 6.1), ``_UID`` its index
and ``_CRS`` a memory range of 512 bytes and a level-triggered, active-high interrupt. Ours: pages from 0xD0000000, in
the hole below 4 GiB, and the I/O APIC's pins 16 to 23, which no ISA device uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiovm.devices.virtio.transport import VirtioDevice
from aiovm.errors import ConfigError

__all__ = ["ACPI_HID", "MOST_SLOTS", "VirtioSlot", "virtio_slots"]

ACPI_HID: Final = "LNRO0005"
MOST_SLOTS: Final = 8

_BASE: Final = 0xD000_0000
_STRIDE: Final = 0x1000
_FIRST_GSI: Final = 16


@dataclass(frozen=True, slots=True)
class VirtioSlot:
    """One device's place. ``uid`` makes its ACPI name unique."""

    uid: int
    base: int
    length: int
    gsi: int

    @property
    def acpi_name(self) -> str:
        """Its name segment in the DSDT."""
        return f"VR{self.uid:02d}"

    @property
    def kernel_parameter(self) -> str:
        """How a Linux without ACPI is told (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)."""
        return f"virtio_mmio.device={self.length}@{self.base:#x}:{self.gsi}:{self.uid}"


def virtio_slots(count: int) -> tuple[VirtioSlot, ...]:
    """The places of the first ``count`` devices."""
    if not 0 <= count <= MOST_SLOTS:
        raise ConfigError(f"a machine has room for {MOST_SLOTS} virtio devices, not {count}")
    return tuple(VirtioSlot(uid, _BASE + uid * _STRIDE, VirtioDevice.LENGTH, _FIRST_GSI + uid) for uid in range(count))
