"""The 8254 interval timer and port 0x61 (Intel 8254 data sheet; KVM's ``i8254.c``, Linux 6.16).

Rules, from ``arch/x86/kvm/i8254.c``:

* The clock is 1 193 181 Hz. A counter's value and output follow from the time since its count was stored; count 0 is
  65536.
* Channel 0 drives interrupt 0: modes 0, 1 and 4 once, 2 and 3 periodically (at least 200 µs), others stop it.
* With ``reinject``, ticks are counted and the next one is sent only after the previous one was acknowledged, so that a
  guest that was kept off its CPU still sees every tick; :meth:`Pit8254.unmasked` drops the backlog. Without, each tick
  pulses the line once and may merge with the one before.

Modelled: counters 0–2, latch and read-back commands, gate and speaker bits, the refresh toggle (2^14 ns).
Not modelled: BCD counting, the null-count bit, counting that a low gate stops (modes 0 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.window import Window
from aiovm.lapic_timer import MIN_PERIOD_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine

__all__ = ["PIT_HZ", "Pit8254", "Pit8254State", "PitChannel"]

#: The counters' clock, as KVM rounds it.
PIT_HZ: Final = 1_193_181

_NS: Final = 1_000_000_000
#: Access modes: what is read or written next. WORD alternates between LSB and MSB.
_LSB: Final = 1
_MSB: Final = 2
_WORD: Final = 3
_NO_MODE: Final = 0xFF


@dataclass(slots=True)
class PitChannel:
    """A counter. ``mode`` 0xFF: not programmed. ``latched``: the access mode that a latched count is read in, or 0."""

    count: int = 0x1_0000
    mode: int = _NO_MODE
    access: int = 0
    bcd: int = 0
    gate: bool = True
    loaded_ns: int = 0
    read_high: bool = False
    write_high: bool = False
    write_low: int = 0
    latched: int = 0
    latched_count: int = 0
    status: int | None = None


@dataclass(slots=True)
class Pit8254State:
    """The three counters and channel 0's timer. ``backlog``: ticks not acknowledged yet (``reinject``)."""

    channels: tuple[PitChannel, PitChannel, PitChannel] = field(
        default_factory=lambda: (PitChannel(), PitChannel(), PitChannel(gate=False))
    )
    period_ns: int = 0
    periodic: bool = False
    target_ns: int | None = None
    backlog: int = 0
    acknowledged: bool = True
    speaker: bool = False


class Pit8254:
    """The chip at 0x40; :attr:`speaker` lies at 0x61. ``on_tick()`` is told of each interrupt (the NMI watchdog)."""

    LENGTH = 4

    def __init__(self, irq: IrqLine, *, reinject: bool, on_tick: Callable[[], None] | None = None) -> None:
        self._irq = irq
        self._reinject = reinject
        self._on_tick = on_tick
        self._s = Pit8254State()
        self.speaker = Window(1, self._read_port61, self._write_port61)

    # ---- registers -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """A counter's next byte; the control register reads 0."""
        if offset == 3:
            return 0
        channel = self._s.channels[offset]
        if channel.status is not None:
            status = channel.status
            channel.status = None
            return status
        if channel.latched:
            latched = channel.latched
            channel.latched = _MSB if latched == _WORD else 0
            return channel.latched_count >> (8 if latched == _MSB else 0) & 0xFF
        count = self._count(offset, now)
        high = channel.access == _MSB
        if channel.access == _WORD:
            high = channel.read_high
            channel.read_high = not high
        return count >> (8 if high else 0) & 0xFF

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """A counter's next byte, or a control word."""
        value &= 0xFF
        if offset == 3:
            self._control(value, now)
            return
        channel = self._s.channels[offset]
        if channel.access == _MSB:
            self._load(offset, value << 8, now)
        elif channel.access != _WORD:
            self._load(offset, value, now)
        elif channel.write_high:
            channel.write_high = False
            self._load(offset, channel.write_low | value << 8, now)
        else:
            channel.write_high = True
            channel.write_low = value

    def set_gate(self, which: int, gate: bool, now: int) -> None:
        """A counter's gate; its rise restarts modes 1, 2, 3 and 5."""
        channel = self._s.channels[which]
        if gate and not channel.gate and channel.mode in (1, 2, 3, 5):
            channel.loaded_ns = now
        channel.gate = gate

    def out(self, which: int, now: int) -> bool:
        """A counter's output."""
        channel = self._s.channels[which]
        ticks = self._ticks(which, now)
        count = channel.count
        match channel.mode:
            case 1:
                return ticks < count
            case 2:
                return ticks != 0 and ticks % count == 0
            case 3:
                return ticks % count < count + 1 >> 1
            case 4 | 5:
                return ticks == count
        return ticks >= count

    def _read_port61(self, offset: int, size: int, now: int) -> int:
        """Port 0x61: gate 2 (bit 0), speaker (1), refresh (4), output 2 (5)."""
        s = self._s
        return s.channels[2].gate | s.speaker << 1 | (now >> 14 & 1) << 4 | self.out(2, now) << 5

    def _write_port61(self, offset: int, size: int, value: int, now: int) -> None:
        """Port 0x61: gate 2 and the speaker."""
        self._s.speaker = bool(value & 2)
        self.set_gate(2, bool(value & 1), now)

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """Channel 0's next tick."""
        return self._s.target_ns

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        if s.target_ns is None or now < s.target_ns:
            return
        ticks = 1
        if s.periodic:
            ticks += (now - s.target_ns) // s.period_ns
            s.target_ns += ticks * s.period_ns
        else:
            s.target_ns = None
        if self._reinject:
            s.backlog += ticks
        self._inject()

    # ---- the interrupt's other end -------------------------------------------------------------------------

    def acknowledge(self) -> None:
        """Interrupt 0 was retired (an EOI at either controller)."""
        s = self._s
        s.acknowledged = True
        if s.backlog:
            s.backlog -= 1
        if s.backlog:
            self._inject()

    def unmasked(self) -> None:
        """Interrupt 0 was unmasked: what it missed is forgotten."""
        self._s.backlog = 0
        self._s.acknowledged = True

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> Pit8254State:
        """A copy of the state."""
        return _copy(self._s)

    def restore(self, state: Pit8254State) -> None:
        """Take over a copy of ``state``."""
        self._s = _copy(state)

    def reset(self) -> None:
        """The power-on state."""
        self.restore(Pit8254State())

    # ---- inside --------------------------------------------------------------------------------------------

    def _control(self, value: int, now: int) -> None:
        which = value >> 6
        if which == 3:
            for i in range(3):
                if value & 2 << i:
                    if not value & 0x20:
                        self._latch_count(i, now)
                    if not value & 0x10:
                        self._latch_status(i, now)
            return
        access = value >> 4 & 3
        if not access:
            self._latch_count(which, now)
            return
        channel = self._s.channels[which]
        channel.access = access
        channel.read_high = channel.write_high = False
        mode = value >> 1 & 7
        channel.mode = mode - 4 if mode > 5 else mode
        channel.bcd = value & 1

    def _latch_count(self, which: int, now: int) -> None:
        channel = self._s.channels[which]
        if not channel.latched:
            channel.latched_count = self._count(which, now)
            channel.latched = channel.access

    def _latch_status(self, which: int, now: int) -> None:
        channel = self._s.channels[which]
        if channel.status is None:
            status = self.out(which, now) << 7 | channel.access << 4 | channel.mode << 1 | channel.bcd
            channel.status = status & 0xFF

    def _load(self, which: int, value: int, now: int) -> None:
        s = self._s
        channel = s.channels[which]
        channel.count = value or 0x1_0000
        channel.loaded_ns = now
        if which:
            return
        s.target_ns = None
        s.period_ns = channel.count * _NS // PIT_HZ
        self.unmasked()
        s.periodic = channel.mode in (2, 3)
        if s.periodic:
            s.period_ns = max(s.period_ns, MIN_PERIOD_NS)
        if channel.mode <= 4:
            s.target_ns = now + s.period_ns

    def _ticks(self, which: int, now: int) -> int:
        """Clock ticks since the counter was loaded (a periodic channel 0: since its last interrupt)."""
        s = self._s
        elapsed = now - s.channels[which].loaded_ns
        if not which and s.periodic and s.target_ns is not None:
            elapsed = s.period_ns - (s.target_ns - now)
        return max(elapsed, 0) * PIT_HZ // _NS

    def _count(self, which: int, now: int) -> int:
        channel = self._s.channels[which]
        ticks = self._ticks(which, now)
        count = channel.count
        if channel.mode in (0, 1, 4, 5):
            return count - ticks & 0xFFFF
        if channel.mode == 3:
            ticks *= 2
        return count - ticks % count

    def _inject(self) -> None:
        s = self._s
        if self._reinject:
            if not s.acknowledged:
                return
            s.acknowledged = False
        self._irq.pulse()
        if self._on_tick is not None:
            self._on_tick()


def _copy(state: Pit8254State) -> Pit8254State:
    first, second, third = state.channels
    return replace(state, channels=(replace(first), replace(second), replace(third)))
