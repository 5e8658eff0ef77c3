"""ACPI's fixed hardware: power-management timer, PM1a event and control registers (ACPI 6.5, 4.8.3; I/O at 0x600).

========  ==================================
0x600     PM1 status, 16 bits (write 1 to clear)
0x602     PM1 enable, 16 bits
0x604     PM1 control, 16 bits
0x608     PM timer, 32 bits, 3.579545 MHz
========  ==================================

The timer sets its status bit when its top bit (bit 23, or 31 of the wide timer) changes. Storing SLP_EN with the
sleep type of S5 calls ``power_off()``. The registers are always in ACPI mode (SCI_EN reads 1): there is no SMI command.

Modelled: timer and power-button events, S5. Not modelled: S1–S4, bus-master and wake status, general-purpose events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine

__all__ = ["PM_TIMER_HZ", "AcpiPm", "AcpiPmState"]

#: The timer's clock (ACPI 6.5, 4.8.2.1).
PM_TIMER_HZ: Final = 3_579_545

_NS: Final = 1_000_000_000
_TMR: Final = 1 << 0
_PWRBTN: Final = 1 << 8
#: The clock's alarm as a wake-up: can be enabled, as guests insist on, and never comes.
_RTC: Final = 1 << 10
#: Events that exist: timer, global release, power button.
_EVENTS: Final = _TMR | 1 << 5 | _PWRBTN
_SCI_EN: Final = 1
_SLP_TYP: Final = 7 << 10
_SLP_EN: Final = 1 << 13


@dataclass(slots=True)
class AcpiPmState:
    """``seen`` counts the changes of the timer's top bit that are already in ``status``."""

    status: int = 0
    enable: int = 0
    control: int = 0
    seen: int = 0


class AcpiPm:
    """The register block. ``sci`` is its interrupt, ``s5_type`` the SLP_TYP that the DSDT's ``_S5`` names."""

    LENGTH = 12

    def __init__(
        self, sci: IrqLine, power_off: Callable[[], None], *, s5_type: int = 0, wide_timer: bool = True
    ) -> None:
        self._sci = sci
        self._power_off = power_off
        self._s5 = s5_type << 10
        self._bits = 32 if wide_timer else 24
        self._s = AcpiPmState()

    def read(self, offset: int, size: int, now: int) -> int:
        """Bytes of the block, of any width."""
        self.advance(now)
        s = self._s
        timer = now * PM_TIMER_HZ // _NS & (1 << self._bits) - 1
        block = s.status | s.enable << 16 | (s.control | _SCI_EN) << 32 | timer << 64
        return block >> (8 * offset) & (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """Bytes of the block; the timer and the reserved bytes are read-only."""
        self.advance(now)
        s = self._s
        mask = (1 << (8 * size)) - 1 << (8 * offset)
        block = (value << (8 * offset)) & mask
        s.status &= ~block
        s.enable = (s.enable & ~(mask >> 16) | block >> 16) & (_EVENTS | _RTC)
        if mask >> 32 & 0xFFFF:
            control = s.control & ~(mask >> 32) | block >> 32 & 0xFFFF
            s.control = control & _SLP_TYP
            if control & _SLP_EN and control & _SLP_TYP == self._s5:
                self._power_off()
        self._sync_irq()

    def next_deadline(self) -> int | None:
        """When the timer's top bit changes next, while that interrupts."""
        s = self._s
        if not s.enable & _TMR or s.status & _TMR:
            return None
        ticks = s.seen + 1 << self._bits - 1
        return -(-ticks * _NS // PM_TIMER_HZ)

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        changes = now * PM_TIMER_HZ // _NS >> self._bits - 1
        if changes > s.seen:
            s.seen = changes
            s.status |= _TMR
            self._sync_irq()

    def press_power_button(self) -> None:
        """The host asks the guest to shut down."""
        self._s.status |= _PWRBTN
        self._sync_irq()

    def save(self) -> AcpiPmState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: AcpiPmState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)
        self._sync_irq()

    def reset(self) -> None:
        """The power-on state; the timer counts on."""
        self.restore(AcpiPmState(seen=self._s.seen))

    def _sync_irq(self) -> None:
        self._sci.set(self._s.status & self._s.enable != 0)
