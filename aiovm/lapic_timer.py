"""The local APIC's timer: initial count, current count, divider and TSC deadline (SDM vol. 3A, 10.5.4).

Pure arithmetic on a small state: ``now`` goes in, the next deadline comes out, nobody is called. Rules, from
``arch/x86/kvm/lapic.c`` (Linux 6.16):

* Bus cycle 1 ns (``apic_bus_cycle_ns``), so a period is TMICT × divisor ns. TMICT 0 stops the timer.
* A periodic timer steps from its old deadline, never from ``now``; its period is at least 200 µs
  (``min_timer_period_us``), silently. Missed periods merge: at most one expiry is pending.
* A write to TDCR scales what remains by new/old divisor. A mode change that crosses TSC-deadline mode cancels and
  clears; one between one-shot and periodic lets the timer run.
* The TSC-deadline MSR reads back until the interrupt is *delivered*, not until the deadline.

The TSC is the caller's business: :meth:`LapicTimer.write_deadline` takes the MSR's value and the same moment in ns.

Modelled: the three modes, the register arithmetic, pending. Not modelled: firing early (``timer_advance_ns``), the
hardware timer, LVTT's vector and mask (they are :mod:`aiovm.lapic`'s). Differences from KVM: a one-shot timer that
has expired stays stopped when TDCR is written (KVM starts it once more); TMCCT reads TMICT, not 0, in the very
nanosecond in which the timer was started.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

__all__ = ["MIN_PERIOD_NS", "LapicTimer", "LapicTimerState", "TimerMode", "divisor_of"]

#: The shortest period of a periodic timer (``min_timer_period_us`` of 6.16).
MIN_PERIOD_NS = 200_000

#: Later than any clock goes (146 years): a guest may name it, and it arms nothing.
_NEVER_NS = 1 << 62


class TimerMode(enum.IntEnum):
    """LVTT bits 18:17."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


def divisor_of(tdcr: int) -> int:
    """The divisor that TDCR's bits 3, 1 and 0 name (SDM vol. 3A, figure 10-10).

    >>> divisor_of(0x0), divisor_of(0xA), divisor_of(0xB)
    (2, 128, 1)
    """
    return 1 << ((((tdcr & 8) >> 1 | tdcr & 3) + 1) & 7)


@dataclass(slots=True)
class LapicTimerState:
    """``target_ns`` is when it expires next, None while it is stopped; ``pending``: expired, not yet delivered."""

    mode: TimerMode = TimerMode.ONE_SHOT
    tmict: int = 0
    tdcr: int = 0
    period_ns: int = 0
    target_ns: int | None = None
    tsc_deadline: int = 0
    pending: bool = False


class LapicTimer:
    """One timer. The owner arms an alarm for :meth:`next_deadline` and calls :meth:`advance` when it comes."""

    __slots__ = ("_cycle_ns", "_s", "_unit_ns")

    def __init__(self, *, bus_cycle_ns: int = 1) -> None:
        self._cycle_ns = bus_cycle_ns
        self._s = LapicTimerState()
        self._unit_ns = 0  # one count, decoded from TDCR
        self.reset()

    @property
    def state(self) -> LapicTimerState:
        """The live state, to look at."""
        return self._s

    @property
    def pending(self) -> bool:
        """An expiry waits for delivery."""
        return self._s.pending

    # ---- registers -----------------------------------------------------------------------------------------

    def set_mode(self, mode: TimerMode) -> None:
        """LVTT's mode bits changed."""
        s = self._s
        if mode is s.mode:
            return
        if TimerMode.TSC_DEADLINE in (mode, s.mode):
            s.target_ns = None
            s.pending = False
            s.tmict = 0
            s.period_ns = 0
            s.tsc_deadline = 0
        s.mode = mode
        self._limit_period()

    def write_tmict(self, value: int, now: int) -> None:
        """The initial count: stop, and start anew when it is not 0. Ignored in TSC-deadline mode."""
        s = self._s
        if s.mode is TimerMode.TSC_DEADLINE:
            return
        s.tmict = value & 0xFFFF_FFFF
        self._start(s.tmict, now)

    def start_at_count(self, count: int, now: int) -> None:
        """Go on from current count ``count`` with the present TMICT and TDCR (KVM_SET_LAPIC)."""
        if self._s.mode is not TimerMode.TSC_DEADLINE:
            self._start(count, now)

    def read_tmcct(self, now: int) -> int:
        """The current count; 0 when stopped and in TSC-deadline mode."""
        s = self._s
        if s.mode is TimerMode.TSC_DEADLINE or s.target_ns is None or s.target_ns <= now:
            return 0
        return (s.target_ns - now) // self._unit_ns

    def write_tdcr(self, value: int, now: int) -> None:
        """The divide configuration: what remains of a running count is scaled by new/old."""
        s = self._s
        old = divisor_of(s.tdcr)
        s.tdcr = value & 0xB
        new = divisor_of(s.tdcr)
        self._unit_ns = self._cycle_ns * new
        if new == old or not s.period_ns:
            return
        s.period_ns = s.tmict * self._unit_ns
        self._limit_period()
        if s.target_ns is not None:
            s.target_ns = now + max(s.target_ns - now, 0) * new // old

    def read_deadline(self) -> int:
        """IA32_TSC_DEADLINE; 0 outside TSC-deadline mode."""
        return self._s.tsc_deadline

    def write_deadline(self, tsc_value: int, deadline_ns: int, now: int) -> None:
        """IA32_TSC_DEADLINE := ``tsc_value``, a moment that is ``deadline_ns``; 0 disarms.

        Ignored outside TSC-deadline mode. A deadline in the past is due at once.
        """
        s = self._s
        if s.mode is not TimerMode.TSC_DEADLINE:
            return
        s.pending = False
        s.tsc_deadline = tsc_value
        s.target_ns = max(deadline_ns, now) if tsc_value and deadline_ns < _NEVER_NS else None

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When to call :meth:`advance`; None while stopped."""
        return self._s.target_ns

    def advance(self, now: int) -> bool:
        """Let time pass to ``now``; whether an expiry became pending (false too when one was pending already)."""
        s = self._s
        target = s.target_ns
        if target is None or target > now:
            return False
        if s.mode is TimerMode.PERIODIC:
            s.target_ns = target + ((now - target) // s.period_ns + 1) * s.period_ns
        else:
            s.target_ns = None
        if s.pending:
            return False
        s.pending = True
        return True

    def delivered(self) -> None:
        """The pending expiry was taken: the deadline MSR reads 0 from here on."""
        s = self._s
        s.pending = False
        s.tsc_deadline = 0

    def drop_pending(self) -> None:
        """Forget an expiry that was not delivered (software disable)."""
        self._s.pending = False

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> LapicTimerState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: LapicTimerState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)
        self._unit_ns = self._cycle_ns * divisor_of(state.tdcr)

    def reset(self) -> None:
        """The power-on state."""
        self.restore(LapicTimerState())

    def _start(self, count: int, now: int) -> None:
        s = self._s
        s.pending = False
        s.target_ns = None
        s.period_ns = s.tmict * self._unit_ns
        if not s.period_ns or s.mode is TimerMode.RESERVED:
            return
        self._limit_period()
        # A count that is not TMICT's comes from a saved page; the period bounds it, and 0 is a whole period ahead.
        left = s.period_ns if count == s.tmict else min(count * self._unit_ns, s.period_ns)
        if not left and s.mode is TimerMode.PERIODIC:
            left = s.period_ns
        s.target_ns = now + left

    def _limit_period(self) -> None:
        s = self._s
        if s.mode is TimerMode.PERIODIC and s.period_ns:
            s.period_ns = max(s.period_ns, MIN_PERIOD_NS)
