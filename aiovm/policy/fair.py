"""The fair policy: the thread with the least virtual runtime runs (Linux CFS, ``kernel/sched/fair.c`` 4.19).

* ``vruntime`` is CPU time received; a queue's floor never falls. A waking thread starts at most ``sleeper_credit``
  below the floor, so that sleepers are served soon but do not hoard time (GENTLE_FAIR_SLEEPERS: half a latency).
* Threads whose runtimes differ by less than a granularity are equal, and equals take turns first in, first out: ours.
  By the nanosecond, noise would decide, and deal the order anew each round.
* A waking thread preempts when it is behind the running one by more than ``wakeup_granularity``.
* Directed yield makes the target the *next buddy*: it is picked unless that would be unfair by more than the
  granularity. Who yields is the *skip buddy*: it is passed over once for the next in line, by the same condition. So a
  spinner that is far behind the others keeps its CPU, whatever it wishes (the *scheduler mismatch* of Ishiguro et al.).

Taken: 4.19's rules, because the published results were measured on them; EEVDF (6.6 and later) answers these
questions otherwise. Every thread has the same weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.policy.base import Policy, Requeue, number_of, thread_of

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from aiovm.policy.thread import Pcpu, Thread

__all__ = ["Fair"]


class Fair(Policy):
    """CFS with fixed slices. ``wakeup_granularity`` and ``sleeper_credit`` in ns (sysctl defaults of 4.19).

    ``deboost``: who yields to a sibling on the same CPU gives up so much of its claim that the hint is heeded (Ishiguro
    et al., VEE 2021; proposed again for Linux in 2025). Fair between machines, not within one.
    """

    name = "fair"

    def __init__(
        self,
        *,
        slice_ns: int = 6_000_000,
        jitter: int = 100,
        wakeup_granularity: int = 1_000_000,
        sleeper_credit: int = 3_000_000,
        deboost: bool = False,
    ) -> None:
        super().__init__(slice_ns=slice_ns, jitter=jitter)
        self.deboost = bool(deboost)
        self.wakeup_granularity = wakeup_granularity
        self.sleeper_credit = sleeper_credit
        self._floor: list[int] = []
        self._next: list[Thread | None] = []
        self._skip: list[Thread | None] = []

    def attach(self, pcpus: Sequence[Pcpu], random_: random.Random) -> None:
        super().attach(pcpus, random_)
        self._floor = [0] * len(pcpus)
        self._next = [None] * len(pcpus)
        self._skip = [None] * len(pcpus)

    def gone(self, thread: Thread) -> None:
        for wished in (self._next, self._skip):
            wished[:] = [None if other is thread else other for other in wished]

    def save(self) -> dict[str, list[int]]:
        return {
            "floor": self._floor.copy(),
            "next": [number_of(thread) for thread in self._next],
            "skip": [number_of(thread) for thread in self._skip],
        }

    def restore(self, state: dict[str, list[int]], threads: Sequence[Thread]) -> None:
        self._floor = state["floor"].copy()
        self._next = [thread_of(number, threads) for number in state["next"]]
        self._skip = [thread_of(number, threads) for number in state["skip"]]

    def woke(self, thread: Thread, pcpu: Pcpu, now: int) -> None:
        if thread.pcpu_index >= 0 and thread.pcpu_index != pcpu.index:
            self._move(thread, self.pcpus[thread.pcpu_index], pcpu, now)
        thread.vruntime = max(thread.vruntime, self._raise_floor(pcpu, now) - self.sleeper_credit)

    def enqueue(self, thread: Thread, pcpu: Pcpu, why: Requeue, now: int) -> None:
        if why is Requeue.YIELDED:
            self._skip[pcpu.index] = thread
            buddy = self._next[pcpu.index]
            if self.deboost and buddy is not None and buddy.group == thread.group:
                thread.vruntime = max(thread.vruntime, buddy.vruntime - self.wakeup_granularity)
        queue = pcpu.queue
        at = len(queue)
        while at and queue[at - 1].vruntime - thread.vruntime > self.wakeup_granularity:
            at -= 1
        queue.insert(at, thread)

    def wakeup_preempts(self, thread: Thread, current: Thread, now: int) -> bool:
        ran = now - current.started
        return current.vruntime + ran - thread.vruntime > self.wakeup_granularity

    def pick(self, pcpu: Pcpu, now: int) -> Thread | None:
        at = pcpu.index
        queue = pcpu.queue
        if not queue:
            return self._pull(pcpu, now)
        chosen = queue[0]
        if chosen is self._skip[at] and len(queue) > 1 and not self._unfair(queue[1], chosen):
            chosen = queue[1]
        buddy = self._next[at]
        if buddy is not None and buddy in queue and not self._unfair(buddy, queue[0]):
            chosen = buddy
        self._next[at] = self._skip[at] = None
        queue.remove(chosen)
        return chosen

    def _unfair(self, thread: Thread, first: Thread) -> bool:
        """Whether ``first`` is so far behind that a hint in favour of ``thread`` is ignored."""
        return thread.vruntime - first.vruntime > self.wakeup_granularity

    def ran(self, thread: Thread, ns: int) -> None:
        thread.vruntime += ns
        self._raise_floor(self.pcpus[thread.pcpu_index], thread.started)

    def yield_to(self, target: Thread, now: int) -> None:
        self._next[target.pcpu_index] = target

    def _raise_floor(self, pcpu: Pcpu, now: int) -> int:
        candidates = [t.vruntime for t in pcpu.queue[:1]]
        if pcpu.current is not None:
            candidates.append(pcpu.current.vruntime + now - pcpu.current.started)
        if candidates:
            self._floor[pcpu.index] = max(self._floor[pcpu.index], min(candidates))
        return self._floor[pcpu.index]

    def _move(self, thread: Thread, source: Pcpu, target: Pcpu, now: int) -> None:
        """A queue's runtimes mean something only relative to its floor."""
        thread.vruntime += self._raise_floor(target, now) - self._raise_floor(source, now)

    def _pull(self, pcpu: Pcpu, now: int) -> Thread | None:
        """New-idle balancing: take the thread that waits longest on the longest queue."""
        longest = self.crowd.longest_queue
        if longest < 0:
            return None
        busiest = self.pcpus[longest]
        thread = min(busiest.queue, key=lambda t: (t.ready_since, t.number))
        busiest.queue.remove(thread)
        if self._next[busiest.index] is thread:
            self._next[busiest.index] = None
        self._move(thread, busiest, pcpu, now)
        return thread
