"""Never preempt a lock holder (Uhlig et al., VM 2004): the end of a slice waits until the lock is released.

The host must be able to see who holds a lock: the guest says so (:meth:`PreemptNotifier.holds_lock`). It cures locks
that anybody may take; a first-in-first-out lock is still handed to waiters that are preempted (Ouyang and Lange,
VEE 2013).

The bound of Uhlig's *temporarily non-preemptible* state is kept: after ``patience_ns`` the holder is preempted all
the same, so a guest cannot keep the CPU by saying so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.policy.fair import Fair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.policy.thread import Thread

__all__ = ["NeverPreemptHolder"]


class NeverPreemptHolder(Fair):
    """The fair policy, which asks again after ``retry_ns`` as long as a lock is held, for ``patience_ns`` at most."""

    name = "never-preempt-holder"

    def __init__(
        self,
        *,
        slice_ns: int = 6_000_000,
        jitter: int = 100,
        wakeup_granularity: int = 1_000_000,
        sleeper_credit: int = 3_000_000,
        retry_ns: int = 1_000,
        patience_ns: int = 1_000_000,
    ) -> None:
        super().__init__(
            slice_ns=slice_ns, jitter=jitter, wakeup_granularity=wakeup_granularity, sleeper_credit=sleeper_credit
        )
        self.retry_ns = retry_ns
        self.patience_ns = patience_ns
        self._asked: dict[int, int] = {}

    def gone(self, thread: Thread) -> None:
        super().gone(thread)
        self._asked.pop(thread.number, None)

    def save(self) -> dict[str, list[int]]:
        asked = sorted(self._asked.items())
        return {**super().save(), "asked": [number for pair in asked for number in pair]}

    def restore(self, state: dict[str, list[int]], threads: Sequence[Thread]) -> None:
        super().restore(state, threads)
        flat = state["asked"]
        self._asked = dict(zip(flat[::2], flat[1::2], strict=True))

    def may_preempt(self, current: Thread, now: int) -> int:
        if not current.notifier.holds_lock():
            self._asked.pop(current.number, None)
            return 0
        since = self._asked.setdefault(current.number, now)
        if now - since >= self.patience_ns:
            del self._asked[current.number]
            return 0
        return self.retry_ns

    def wakeup_preempts(self, thread: Thread, current: Thread, now: int) -> bool:
        return not current.notifier.holds_lock() and super().wakeup_preempts(thread, current, now)
