"""QEMU's ``pc-testdev`` (``hw/misc/pc-testdev.c``), which kvm-unit-tests' guests expect beside the exit port.

========================  =============================================================
ports 0xE0–0xE3           a 32-bit register, at any width
ports 0xE4–0xE7           "flush this page": taken and dropped (QEMU makes the host page trap once)
ports 0xE8–0xEB           the same register as 0xE0
ports 0x2000–0x2017       interrupt lines 0–23: a byte each, zero is low, anything else high
memory 0xFF000000+64 KiB  plain bytes
========================  =============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.irq import IrqLine

__all__ = ["PcTestdev", "PcTestdevState"]

_MEMORY_BYTES: Final = 0x1_0000


@dataclass(slots=True)
class PcTestdevState:
    """The register and the memory."""

    register: int = 0
    memory: bytearray = field(default_factory=lambda: bytearray(_MEMORY_BYTES))


class PcTestdev:
    """The device: :attr:`ports` lie at 0xE0, :attr:`irqs` at 0x2000, :attr:`memory` at 0xFF000000."""

    def __init__(self, lines: Sequence[IrqLine]) -> None:
        self._lines = lines
        self._s = PcTestdevState()
        self.ports = Window(12, self._read_ports, self._write_ports)
        self.irqs = Window(len(lines), lambda offset, size, now: (1 << (8 * size)) - 1, self._write_irq)
        self.memory = Window(_MEMORY_BYTES, self._read_memory, self._write_memory)

    def save(self) -> PcTestdevState:
        """A copy of the state."""
        return replace(self._s, memory=self._s.memory.copy())

    def restore(self, state: PcTestdevState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state, memory=state.memory.copy())

    def reset(self) -> None:
        """The power-on state."""
        self.restore(PcTestdevState())

    def _read_ports(self, offset: int, size: int, now: int) -> int:
        if 4 <= offset < 8:
            return (1 << (8 * size)) - 1
        return self._s.register >> (8 * (offset & 3)) & (1 << (8 * size)) - 1

    def _write_ports(self, offset: int, size: int, value: int, now: int) -> None:
        if 4 <= offset < 8:
            return
        shift = 8 * (offset & 3)
        mask = ((1 << (8 * size)) - 1) << shift
        self._s.register = (self._s.register & ~mask | value << shift & mask) & 0xFFFF_FFFF

    def _write_irq(self, offset: int, size: int, value: int, now: int) -> None:
        for line in self._lines[offset : offset + size]:
            line.set(bool(value & 0xFF))
            value >>= 8

    def _read_memory(self, offset: int, size: int, now: int) -> int:
        return int.from_bytes(self._s.memory[offset : offset + size], "little")

    def _write_memory(self, offset: int, size: int, value: int, now: int) -> None:
        self._s.memory[offset : offset + size] = (value & (1 << (8 * size)) - 1).to_bytes(size, "little")
