"""The high precision event timer (Intel IA-PC HPET specification 1.0a), at 0xFED00000.

One 64-bit main counter of 10 ns ticks (100 MHz) and three comparators, all of them able to be periodic. With legacy
replacement on, timer 0 drives interrupt 0 and timer 1 interrupt 8, and ``on_legacy(True)`` says that the 8254 and the
clock no longer do.

Modelled: counter, comparators of 64 and 32 bits, one-shot and periodic, edge and level, routing, legacy replacement.
Not modelled: delivery by FSB message, accesses other than 4 aligned bytes and 8 aligned bytes (read 0, ignored).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.irq import IrqLine

__all__ = ["HPET_BASE", "Hpet", "HpetState", "HpetTimer"]

#: Where the registers lie.
HPET_BASE: Final = 0xFED0_0000

_TICK_NS: Final = 10
_TIMERS: Final = 3
#: Period in femtoseconds, vendor 8086h, legacy replacement, 64 bits, last timer 2, revision 1.
_CAPABILITIES: Final = _TICK_NS * 1_000_000 << 32 | 0x8086_0000 | 1 << 15 | 1 << 13 | _TIMERS - 1 << 8 | 1
#: Later than any clock goes (146 years): a comparator that far ahead arms nothing.
_NEVER_NS: Final = 1 << 62
_ENABLE: Final = 1
_LEGACY: Final = 2

_LEVEL: Final = 1 << 1
_INT_ENABLE: Final = 1 << 2
_PERIODIC: Final = 1 << 3
_SET_VALUE: Final = 1 << 6
_32_BIT: Final = 1 << 8
_ROUTE: Final = 0x1F << 9
_WRITABLE: Final = _LEVEL | _INT_ENABLE | _PERIODIC | _SET_VALUE | _32_BIT | _ROUTE
#: Can be periodic, can count 64 bits.
_TIMER_CAPABILITIES: Final = 1 << 4 | 1 << 5
_64: Final = (1 << 64) - 1
_32: Final = (1 << 32) - 1


@dataclass(slots=True)
class HpetTimer:
    """``period``: what a periodic comparator steps by. ``target``: the main count, unwrapped, of the next match."""

    config: int = 0
    comparator: int = _64
    period: int = 0
    target: int | None = None


@dataclass(slots=True)
class HpetState:
    """``base``: the main counter, when it stands still; while it runs, its value minus ``now`` in ticks."""

    config: int = 0
    status: int = 0
    base: int = 0
    timers: list[HpetTimer] = field(default_factory=lambda: [HpetTimer() for _ in range(_TIMERS)])


class Hpet:
    """The chip. ``lines[n]`` is its own wire to interrupt input n (at least 9: legacy replacement uses 0 and 8)."""

    LENGTH = 0x400

    def __init__(self, lines: Sequence[IrqLine], *, on_legacy: Callable[[bool], None] | None = None) -> None:
        self._lines = lines
        self._on_legacy = on_legacy
        self._s = HpetState()

    # ---- registers -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """A register, or half of one."""
        if offset & (size - 1) or size not in (4, 8):
            return 0
        self.advance(now)
        value = self._read(offset & ~7, now)
        return value >> 32 if offset & 4 else value & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """A register, or half of one."""
        if offset & (size - 1) or size not in (4, 8):
            return
        self.advance(now)
        register = offset & ~7
        mask = _64
        if size == 4:
            mask = _32 << 32 if offset & 4 else _32
            value = value << 32 if offset & 4 else value
        self._write(register, value & mask, mask, now)

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When the next comparator matches."""
        s = self._s
        if not s.config & _ENABLE:
            return None
        targets = [timer.target for timer in s.timers if timer.target is not None and timer.config & _INT_ENABLE]
        deadline = (min(targets) - s.base) * _TICK_NS if targets else _NEVER_NS
        return deadline if deadline < _NEVER_NS else None

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        if not s.config & _ENABLE:
            return
        count = s.base + now // _TICK_NS
        for index, timer in enumerate(s.timers):
            if timer.target is None or timer.target > count:
                continue
            if timer.config & _PERIODIC and timer.period:
                steps = (count - timer.target) // timer.period + 1
                timer.comparator = timer.comparator + steps * timer.period & self._width(timer)
                timer.target += steps * timer.period
            else:
                timer.target += self._width(timer) + 1
            self._fire(index)

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> HpetState:
        """A copy of the state."""
        return replace(self._s, timers=[replace(timer) for timer in self._s.timers])

    def restore(self, state: HpetState) -> None:
        """Take over a copy of ``state``."""
        was_legacy = self._s.config & _LEGACY
        self._s = replace(state, timers=[replace(timer) for timer in state.timers])
        if self._on_legacy is not None and was_legacy != state.config & _LEGACY:
            self._on_legacy(bool(state.config & _LEGACY))
        self._sync_irq()

    def reset(self) -> None:
        """The power-on state."""
        self.restore(HpetState())

    # ---- inside --------------------------------------------------------------------------------------------

    def _read(self, register: int, now: int) -> int:
        s = self._s
        match register:
            case 0x000:
                return _CAPABILITIES
            case 0x010:
                return s.config
            case 0x020:
                return s.status
            case 0x0F0:
                return self._count(now) & _64
        index, which = divmod(register - 0x100, 0x20)
        if not 0 <= index < _TIMERS:
            return 0
        timer = s.timers[index]
        if which == 0:
            # Any of the machine's inputs may be routed to.
            return timer.config | _TIMER_CAPABILITIES | (1 << len(self._lines)) - 1 << 32
        return timer.comparator if which == 8 else 0

    def _write(self, register: int, value: int, mask: int, now: int) -> None:
        s = self._s
        match register:
            case 0x010:
                self._configure(s.config & ~mask | value, now)
            case 0x020:
                s.status &= ~value
                self._sync_irq()
            case 0x0F0:
                if not s.config & _ENABLE:
                    s.base = s.base & ~mask | value
            case _:
                index, which = divmod(register - 0x100, 0x20)
                if 0 <= index < _TIMERS and which == 0:
                    self._configure_timer(index, value, mask, now)
                elif 0 <= index < _TIMERS and which == 8:
                    self._store_comparator(s.timers[index], value, mask, now)

    def _configure(self, config: int, now: int) -> None:
        s = self._s
        config &= _ENABLE | _LEGACY
        changed = s.config ^ config
        ticks = now // _TICK_NS
        if changed & _ENABLE:
            s.base = s.base - ticks if config & _ENABLE else s.base + ticks & _64
        s.config = config
        if changed & _ENABLE:
            for timer in s.timers:
                self._aim(timer, now)
        if changed & _LEGACY and self._on_legacy is not None:
            self._on_legacy(bool(config & _LEGACY))
        self._sync_irq()

    def _configure_timer(self, index: int, value: int, mask: int, now: int) -> None:
        s = self._s
        timer = s.timers[index]
        timer.config = (timer.config & ~mask | value) & _WRITABLE
        if timer.config & _32_BIT:
            timer.comparator &= _32
            timer.period &= _32
        if not timer.config & _LEVEL:
            s.status &= ~(1 << index)
        self._aim(timer, now)
        self._sync_irq()

    def _store_comparator(self, timer: HpetTimer, value: int, mask: int, now: int) -> None:
        """A periodic timer's store is its period; with VAL_SET first the comparator (specification, 2.3.9.2)."""
        width = self._width(timer)
        if timer.config & _PERIODIC:
            timer.period = (timer.period & ~mask | value) & width
        if not timer.config & _PERIODIC or timer.config & _SET_VALUE:
            timer.comparator = (timer.comparator & ~mask | value) & width
        if mask & _32 << 32 or timer.config & _32_BIT:
            timer.config &= ~_SET_VALUE
        self._aim(timer, now)

    def _count(self, now: int) -> int:
        s = self._s
        return s.base + now // _TICK_NS if s.config & _ENABLE else s.base

    @staticmethod
    def _width(timer: HpetTimer) -> int:
        return _32 if timer.config & _32_BIT else _64

    def _aim(self, timer: HpetTimer, now: int) -> None:
        """The next match lies less than one turn of the counter ahead, and not at the present count."""
        count = self._count(now)
        ahead = (timer.comparator - count - 1 & self._width(timer)) + 1
        timer.target = count + ahead

    def _line(self, index: int) -> IrqLine | None:
        config = self._s.config
        if config & _LEGACY and index < 2:
            return self._lines[8 * index]
        route = (self._s.timers[index].config & _ROUTE) >> 9
        return self._lines[route] if route < len(self._lines) else None

    def _fire(self, index: int) -> None:
        timer = self._s.timers[index]
        if timer.config & _LEVEL:
            self._s.status |= 1 << index
            self._sync_irq()
        elif timer.config & _INT_ENABLE:
            line = self._line(index)
            if line is not None:
                line.pulse()

    def _sync_irq(self) -> None:
        """Level-triggered timers hold their line while their status bit stands."""
        s = self._s
        high = [
            self._line(index)
            for index, timer in enumerate(s.timers)
            if timer.config & _LEVEL and timer.config & _INT_ENABLE and s.status >> index & 1
        ]
        for line in self._lines:
            line.set(any(line is other for other in high))
