"""The PC's clock and its 128 bytes of CMOS memory, ports 0x70 and 0x71 (Motorola MC146818A data sheet).

The time is the machine's ``now`` plus a wall time given once; setting the clock moves that offset. Everything follows
from the wall time in whole numbers, so nothing needs to tick: flags are found by looking at what lies between the last
look and now, and there is a deadline only while an enabled interrupt waits for one.

Modelled: binary and BCD, 12 and 24 hours, the century byte (0x32), SET, update-in-progress (the last 244 µs of each
second), the alarm with its don't-care bytes, periodic, update and alarm interrupts. Not modelled: the divider chain's
reset, square wave, daylight saving, the time base's two lower frequencies; the day of the week follows the date.
RESET clears the interrupt enables and flags, and keeps clock and memory, as the battery does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Final

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiovm.irq import IrqLine

__all__ = ["CmosRtc", "CmosRtcState"]

_SECONDS: Final = 0x0
_SECONDS_ALARM: Final = 0x1
_MINUTES: Final = 0x2
_MINUTES_ALARM: Final = 0x3
_HOURS: Final = 0x4
_HOURS_ALARM: Final = 0x5
_WEEKDAY: Final = 0x6
_DAY: Final = 0x7
_MONTH: Final = 0x8
_YEAR: Final = 0x9
_A: Final = 0xA
_B: Final = 0xB
_C: Final = 0xC
_D: Final = 0xD
_CENTURY: Final = 0x32
_CLOCK: Final = frozenset({_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY})

_UIP: Final = 0x80  # register A
_SET: Final = 0x80  # register B
_BINARY: Final = 0x04
_24_HOURS: Final = 0x02
#: Interrupt enables in B and flags in C stand in the same bits.
_PERIODIC: Final = 0x40
_ALARM: Final = 0x20
_UPDATE: Final = 0x10
_IRQF: Final = 0x80
_PM: Final = 0x80
_DONT_CARE: Final = 0xC0

_NS: Final = 1_000_000_000
_CRYSTAL_HZ: Final = 32_768
_UIP_NS: Final = 244_140
_DAY_SECONDS: Final = 86_400
_EPOCH: Final = date(1970, 1, 1).toordinal()
#: The Gregorian calendar repeats after 400 years; arithmetic is done in the years 2000–2399.
_CYCLE_DAYS: Final = 146_097
_CYCLE_YEARS: Final = 400
_CYCLE_FROM: Final = date(2000, 1, 1).toordinal()


@dataclass(slots=True)
class CmosRtcState:
    """``offset_ns``: wall time (since 1970) minus ``now``. ``seen_ns``: the wall time up to which flags are set.

    ``memory`` holds the registers too; its clock bytes count only while SET stops the clock.
    """

    offset_ns: int
    seen_ns: int
    index: int = 0
    memory: bytearray = field(default_factory=lambda: bytearray(128))


class CmosRtc:
    """The chip. ``boot_wall_ns``: the wall time, ns since 1970, when ``now`` is 0. ``nvram``: initial bytes."""

    LENGTH = 2

    def __init__(self, irq: IrqLine, *, boot_wall_ns: int, nvram: Mapping[int, int] | None = None) -> None:
        self._irq = irq
        self._s = CmosRtcState(boot_wall_ns, boot_wall_ns)
        memory = self._s.memory
        memory[_A] = 0x26
        memory[_B] = _24_HOURS
        for index, value in (nvram or {}).items():
            if not _D < index < 128 or index == _CENTURY or not 0 <= value < 256:
                raise ConfigError(f"CMOS byte {index:#x} := {value:#x} is not free memory")
            memory[index] = value

    # ---- registers -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """The data byte; the index is write-only."""
        if offset != 1:
            return 0xFF
        self.advance(now)
        s = self._s
        index = s.index
        if index in _CLOCK and not s.memory[_B] & _SET:
            return self._clock_bytes(now + s.offset_ns)[index]
        match index:
            case 0xA:
                uip = not s.memory[_B] & _SET and (now + s.offset_ns) % _NS >= _NS - _UIP_NS
                return s.memory[_A] | (_UIP if uip else 0)
            case 0xC:
                flags = s.memory[_C]
                if flags & s.memory[_B]:
                    flags |= _IRQF
                s.memory[_C] = 0
                self._sync_irq()
                return flags
            case 0xD:
                return 0x80  # the battery is good
        return s.memory[index]

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """The index (bit 7 is the NMI gate, ignored), or the data byte."""
        self.advance(now)
        s = self._s
        if offset == 0:
            s.index = value & 0x7F
            return
        value &= 0xFF
        index = s.index
        if index in _CLOCK:
            if s.memory[_B] & _SET:
                s.memory[index] = value
            else:
                self._freeze(now)
                s.memory[index] = value
                self._set_time(now)
        elif index == _A:
            s.memory[_A] = value & ~_UIP
        elif index == _B:
            self._write_b(value, now)
        elif index not in (_C, _D):
            s.memory[index] = value
        self._sync_irq()

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When the next enabled interrupt comes."""
        s = self._s
        wanted = s.memory[_B] & ~s.memory[_C]
        times = []
        if wanted & _PERIODIC and self._period():
            ticks = (s.seen_ns * _CRYSTAL_HZ // _NS // self._period() + 1) * self._period()
            times.append(-(-ticks * _NS // _CRYSTAL_HZ))
        if not s.memory[_B] & _SET:
            if wanted & _UPDATE:
                times.append((s.seen_ns // _NS + 1) * _NS)
            if wanted & _ALARM:
                alarm = self._next_alarm(s.seen_ns // _NS)
                if alarm is not None:
                    times.append(alarm * _NS)
        return min(times) - s.offset_ns if times else None

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        before, wall = s.seen_ns, now + s.offset_ns
        if wall <= before:
            return
        s.seen_ns = wall
        flags = 0
        period = self._period()
        if period and before * _CRYSTAL_HZ // _NS // period != wall * _CRYSTAL_HZ // _NS // period:
            flags |= _PERIODIC
        if not s.memory[_B] & _SET and before // _NS != wall // _NS:
            flags |= _UPDATE
            alarm = self._next_alarm(before // _NS)
            if alarm is not None and alarm <= wall // _NS:
                flags |= _ALARM
        if flags:
            s.memory[_C] |= flags
            self._sync_irq()

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> CmosRtcState:
        """A copy of the state."""
        return replace(self._s, memory=self._s.memory.copy())

    def restore(self, state: CmosRtcState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state, memory=state.memory.copy())
        self._sync_irq()

    def reset(self) -> None:
        """RESET: no interrupt is enabled or pending."""
        memory = self._s.memory
        memory[_B] &= ~(_PERIODIC | _ALARM | _UPDATE)
        memory[_C] = 0
        self._sync_irq()

    # ---- inside --------------------------------------------------------------------------------------------

    def _write_b(self, value: int, now: int) -> None:
        memory = self._s.memory
        if value & ~memory[_B] & _SET:
            value &= ~_UPDATE  # SET clears the update interrupt's enable
            self._freeze(now)
        was_set = memory[_B] & _SET
        memory[_B] = value
        if was_set and not value & _SET:
            self._set_time(now)

    def _period(self) -> int:
        """The periodic interrupt's period in crystal cycles; 0 is off (data sheet, table 5)."""
        rate = self._s.memory[_A] & 0xF
        if not rate:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _encode(self, value: int) -> int:
        return value if self._s.memory[_B] & _BINARY else value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._s.memory[_B] & _BINARY else (byte >> 4) * 10 + (byte & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self._s.memory[_B] & _24_HOURS:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (_PM if hour >= 12 else 0)

    def _decode_hour(self, byte: int) -> int:
        if self._s.memory[_B] & _24_HOURS:
            return self._decode(byte)
        return self._decode(byte & ~_PM) % 12 + (12 if byte & _PM else 0)

    def _clock_bytes(self, wall_ns: int) -> dict[int, int]:
        """The clock's registers at a wall time."""
        days, second = divmod(wall_ns // _NS, _DAY_SECONDS)
        cycles, day_of_cycle = divmod(days + _EPOCH - _CYCLE_FROM, _CYCLE_DAYS)
        today = date.fromordinal(_CYCLE_FROM + day_of_cycle)
        year = today.year + cycles * _CYCLE_YEARS
        encode = self._encode
        return {
            _SECONDS: encode(second % 60),
            _MINUTES: encode(second // 60 % 60),
            _HOURS: self._encode_hour(second // 3600),
            _WEEKDAY: encode(today.isoweekday() % 7 + 1),
            _DAY: encode(today.day),
            _MONTH: encode(today.month),
            _YEAR: encode(year % 100),
            _CENTURY: encode(year // 100 % 100),
        }

    def _freeze(self, now: int) -> None:
        for index, value in self._clock_bytes(now + self._s.offset_ns).items():
            self._s.memory[index] = value

    def _set_time(self, now: int) -> None:
        """Go on from what the clock bytes say; a nonsense date counts on from the month's first day."""
        s = self._s
        memory = s.memory
        year = self._decode(memory[_CENTURY]) * 100 + self._decode(memory[_YEAR])
        month = min(max(self._decode(memory[_MONTH]), 1), 12)
        cycles, year_of_cycle = divmod(year - date.fromordinal(_CYCLE_FROM).year, _CYCLE_YEARS)
        first = date(2000 + year_of_cycle, month, 1).toordinal() + cycles * _CYCLE_DAYS
        days = first - _EPOCH + self._decode(memory[_DAY]) - 1
        second = self._decode_hour(memory[_HOURS]) * 3600
        second += self._decode(memory[_MINUTES]) * 60 + self._decode(memory[_SECONDS])
        wall = (days * _DAY_SECONDS + second) * _NS + (now + s.offset_ns) % _NS
        s.offset_ns = wall - now
        s.seen_ns = wall

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than ``after`` that the alarm bytes match; None when none does."""
        memory = self._s.memory

        def wanted(byte: int, value: int) -> int | None:
            return None if byte & _DONT_CARE == _DONT_CARE else value

        hour = wanted(memory[_HOURS_ALARM], self._decode_hour(memory[_HOURS_ALARM]))
        minute = wanted(memory[_MINUTES_ALARM], self._decode(memory[_MINUTES_ALARM]))
        second = wanted(memory[_SECONDS_ALARM], self._decode(memory[_SECONDS_ALARM]))
        time = after + 1
        while time <= after + _DAY_SECONDS:
            # Skip to the next hour, minute or second that could match.
            if hour is not None and time // 3600 % 24 != hour:
                time = (time // 3600 + 1) * 3600
            elif minute is not None and time // 60 % 60 != minute:
                time = (time // 60 + 1) * 60
            elif second is not None and time % 60 != second:
                time += 1
            else:
                return time
        return None

    def _sync_irq(self) -> None:
        memory = self._s.memory
        self._irq.set(memory[_B] & memory[_C] & (_PERIODIC | _ALARM | _UPDATE) != 0)
