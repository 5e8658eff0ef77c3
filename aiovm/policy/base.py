"""The choice "who runs next" as an object.

The host (:mod:`aiovm.loop`) keeps the threads and carries choices out; a policy answers questions and keeps the
queues. Every answer is a function of what the policy was told and of ``now``; random choices come from the host's
one seeded generator.

A policy of one's own derives from :class:`Policy` and is named on the command line as ``module:Class``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

from aiovm.errors import ConfigError
from aiovm.policy.thread import Crowd

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aiovm.policy.thread import Pcpu, Thread

__all__ = ["Policy", "PolicyHost", "Requeue", "number_of", "thread_of"]


def number_of(thread: Thread | None) -> int:
    """A thread in a saved state: its number, -1 for none."""
    return -1 if thread is None else thread.number


def thread_of(number: int, threads: Sequence[Thread]) -> Thread | None:
    """And back."""
    return None if number < 0 else threads[number]


class PolicyHost(Protocol):
    """What a policy may ask of the host by itself, between its questions."""

    def call_at(self, deadline: int, callback: Callable[[], object]) -> object:
        """Run ``callback`` at ``deadline`` (ns)."""

    def reschedule(self, pcpu: Pcpu) -> None:
        """Ask again who should run on ``pcpu``."""


class Requeue(enum.Enum):
    """Why a thread comes to a queue."""

    WAKE = "wake"
    PREEMPTED = "preempted"
    YIELDED = "yielded"


class Policy:
    """One queue a physical CPU, first in first out, fixed slices: the base, and a plain round robin.

    ``slice_ns``: how long a thread may run while others wait. ``jitter``: each slice varies by up to this share, in
    1/1000 (100 = ten per cent): aligned slices would be gang scheduling by accident.
    """

    name = "round-robin"
    #: A free CPU is given to whoever wakes there, without asking :meth:`pick`.
    conserving = True

    def __init__(self, *, slice_ns: int = 6_000_000, jitter: int = 100) -> None:
        if not isinstance(slice_ns, int) or not isinstance(jitter, int) or slice_ns < 1 or not 0 <= jitter < 1000:
            raise ConfigError(
                f"a slice of {slice_ns} ns with a jitter of {jitter}/1000: at least 1 ns, below 1000/1000"
            )
        self.slice_ns = slice_ns
        self.jitter = jitter
        self.pcpus: Sequence[Pcpu] = ()
        self.crowd = Crowd()
        self.random: random.Random

    def attach(self, pcpus: Sequence[Pcpu], random_: random.Random) -> None:
        """The host is ready; called once, before anything else."""
        if self.pcpus:
            raise ConfigError(f"this {self.name} policy serves another host: make one for each")
        self.pcpus = pcpus
        for pcpu in pcpus:
            pcpu.join(self.crowd)
        self.random = random_

    def start(self, host: PolicyHost) -> None:
        """Called after :meth:`attach`, for policies that act by themselves."""

    # ---- state ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, list[int]]:
        """What the policy remembers while every thread is blocked; threads by number, -1 for none."""
        return {}

    def restore(self, state: dict[str, list[int]], threads: Sequence[Thread]) -> None:
        """Take over what :meth:`save` gave."""

    # ---- questions ---------------------------------------------------------------------------------------------

    def select_pcpu(self, thread: Thread, now: int) -> Pcpu:
        """Where a waking thread goes: its last CPU if idle, else an idle one, else the least loaded."""
        last = thread.pcpu_index
        if last >= 0 and self.pcpus[last].current is None:
            return self.pcpus[last]
        idle = self.crowd.first_idle
        return self.pcpus[idle if idle >= 0 else self.crowd.least_loaded(last)]

    def slice_of(self, thread: Thread, pcpu: Pcpu) -> int:
        """How long ``thread``, about to run on ``pcpu``, may keep it while others wait (ns)."""
        spread = self.slice_ns * self.jitter // 1000
        return self.slice_ns + self.random.randint(-spread, spread) if spread else self.slice_ns

    def wakeup_preempts(self, thread: Thread, current: Thread, now: int) -> bool:
        """Whether ``thread``, just queued behind ``current``, takes the CPU at once."""
        return False

    def may_preempt(self, current: Thread, now: int) -> int:
        """At the end of a slice: 0 to preempt now, else how many ns to wait before asking again."""
        return 0

    def pick(self, pcpu: Pcpu, now: int) -> Thread | None:
        """Take the next thread off ``pcpu``'s queue; from the longest other queue when it is empty."""
        if pcpu.queue:
            return pcpu.queue.pop(0)
        busiest = self.crowd.longest_queue
        return self.pcpus[busiest].queue.pop(0) if busiest >= 0 else None

    # ---- news ----------------------------------------------------------------------------------------------------

    def added(self, thread: Thread) -> None:
        """``thread`` is new on the host; it does not run yet."""

    def gone(self, thread: Thread) -> None:
        """``thread``, which is blocked, leaves the host for good."""

    def woke(self, thread: Thread, pcpu: Pcpu, now: int) -> None:
        """``thread`` wakes and will be ``pcpu``'s, running or queued; ``thread.pcpu_index`` still names its last."""

    def enqueue(self, thread: Thread, pcpu: Pcpu, why: Requeue, now: int) -> None:
        """``thread`` is ready and belongs to ``pcpu``."""
        pcpu.queue.append(thread)

    def remove(self, thread: Thread) -> None:
        """``thread`` no longer wants its CPU."""
        self.pcpus[thread.pcpu_index].queue.remove(thread)

    def ran(self, thread: Thread, ns: int) -> None:
        """``thread`` ran for ``ns``."""

    def yield_to(self, target: Thread, now: int) -> None:
        """``target``, which is queued, should be the next on its CPU (the "next buddy")."""
        queue = self.pcpus[target.pcpu_index].queue
        queue.remove(target)
        queue.insert(0, target)
