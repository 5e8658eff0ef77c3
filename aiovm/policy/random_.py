"""Seeded random choice: any thread that waits may be next. For shaking out what depends on order by accident."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.policy.base import Policy, number_of, thread_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.policy.thread import Pcpu, Thread

__all__ = ["Random"]


class Random(Policy):
    """Picks evenly among a CPU's queue; directed yield still puts its target first."""

    name = "random"

    def __init__(self, *, slice_ns: int = 6_000_000, jitter: int = 100) -> None:
        super().__init__(slice_ns=slice_ns, jitter=jitter)
        self._boosted: Thread | None = None

    def gone(self, thread: Thread) -> None:
        if self._boosted is thread:
            self._boosted = None

    def save(self) -> dict[str, list[int]]:
        return {"boosted": [number_of(self._boosted)]}

    def restore(self, state: dict[str, list[int]], threads: Sequence[Thread]) -> None:
        (number,) = state["boosted"]
        self._boosted = thread_of(number, threads)

    def pick(self, pcpu: Pcpu, now: int) -> Thread | None:
        queue = pcpu.queue
        boosted, self._boosted = self._boosted, None
        if boosted is not None and boosted in queue:
            queue.remove(boosted)
            return boosted
        if queue:
            return queue.pop(self.random.randrange(len(queue)))
        return super().pick(pcpu, now)

    def yield_to(self, target: Thread, now: int) -> None:
        self._boosted = target
