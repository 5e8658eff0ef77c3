"""Where a PC's virtio devices lie: a page of addresses and an interrupt each; the guest is told by ACPI.

Ours: pages from 0xD0000000, in the hole below 4 GiB, and the I/O APIC's pins 16 to 23, which no ISA device uses. The
interrupt is level-triggered and active high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiovm.devices.virtio.transport import VirtioDevice
from aiovm.errors import ConfigError

__all__ = ["MOST_SLOTS", "VirtioSlot", "virtio_slots"]

MOST_SLOTS: Final = 8

_BASE: Final = 0xD000_0000
_STRIDE: Final = 0x1000
_FIRST_GSI: Final = 16


@dataclass(frozen=True, slots=True)
class VirtioSlot:
    """One device's place."""

    base: int
    length: int
    gsi: int


def virtio_slots(count: int) -> tuple[VirtioSlot, ...]:
    """The places of the first ``count`` devices."""
    if not 0 <= count <= MOST_SLOTS:
        raise ConfigError(f"a machine has room for {MOST_SLOTS} virtio devices, not {count}")
    return tuple(VirtioSlot(_BASE + i * _STRIDE, VirtioDevice.LENGTH, _FIRST_GSI + i) for i in range(count))
