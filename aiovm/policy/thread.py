"""What a policy chooses among: threads (one a vCPU) and physical CPUs. State only; the host is the writer."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.clock import Alarm

__all__ = ["Crowd", "Pcpu", "PreemptNotifier", "RunQueue", "Thread", "ThreadState"]


class ThreadState(enum.Enum):
    """Where a thread is: waiting for something, waiting for a CPU, or on one."""

    BLOCKED = "blocked"
    READY = "ready"
    RUNNING = "running"


class PreemptNotifier(Protocol):
    """KVM's preempt notifier: told around each stay on a CPU. ``need_resched`` asks the vCPU to come off soon."""

    def sched_in(self, pcpu: int, now: int) -> None: ...
    def sched_out(self, *, preempted: bool, now: int) -> None: ...
    def need_resched(self) -> None: ...
    def holds_lock(self) -> bool: ...
    def describe(self) -> str: ...


@dataclass(slots=True, eq=False)
class Thread:
    """A vCPU as the host's scheduler sees it. ``number`` is host-wide; ``group`` names its machine."""

    number: int
    group: int
    notifier: PreemptNotifier
    alarm: Alarm
    state: ThreadState = ThreadState.BLOCKED
    pcpu_index: int = -1
    ready_since: int = 0
    #: Time spent ready and not running, ns, and the same up to the last ``sched_in``.
    run_delay: int = 0
    ran_ns: int = 0
    started: int = 0
    slice_end: int = 0
    resched: bool = False
    #: Yields after which the policy picked this thread again.
    ignored_yields: int = 0
    vruntime: int = 0


class RunQueue(list["Thread"]):
    """The threads that wait for a CPU, next first. A list whose length the host's :class:`Crowd` knows."""

    __slots__ = ("_pcpu",)

    def __init__(self, pcpu: Pcpu) -> None:
        super().__init__()
        self._pcpu = pcpu


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a list, whose length the CPU looks at afterwards."""

    @wraps(method)
    def wrapper(queue: RunQueue, *args: Any) -> Any:
        result = method(queue, *args)
        queue._pcpu.count()
        return result

    return wrapper


for _name in (
    "append", "clear", "extend", "insert", "pop", "remove", "__delitem__", "__iadd__", "__imul__", "__setitem__",
):  # fmt: skip
    setattr(RunQueue, _name, _counted(getattr(list, _name)))


class Crowd:
    """How many threads each physical CPU has: a bit a CPU in a mask for each count.

    So whoever looks for the first idle CPU, the least loaded one or the longest queue need not ask all of them.
    """

    __slots__ = ("idle", "loads", "queues")

    def __init__(self) -> None:
        #: The CPUs on which nobody runs.
        self.idle = 0
        #: By load, and by length of the queue; only counts that somebody has.
        self.loads: dict[int, int] = {}
        self.queues: dict[int, int] = {}

    @property
    def first_idle(self) -> int:
        """The first CPU on which nobody runs, or -1."""
        return _first(self.idle)

    @property
    def longest_queue(self) -> int:
        """The first CPU among those with the longest queue; -1 when nobody waits anywhere."""
        longest = max(self.queues)
        return _first(self.queues[longest]) if longest else -1

    def least_loaded(self, preferred: int) -> int:
        """The first CPU among those with the fewest threads; ``preferred`` if it is one of them."""
        least = self.loads[min(self.loads)]
        return preferred if preferred >= 0 and least >> preferred & 1 else _first(least)


def _first(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _move(masks: dict[int, int], bit: int, before: int, after: int) -> None:
    if before >= 0:
        left = masks[before] & ~bit
        if left:
            masks[before] = left
        else:
            del masks[before]
    masks[after] = masks.get(after, 0) | bit


class Pcpu:
    """A physical CPU: who runs on it, who waits for it."""

    __slots__ = ("_crowd", "_current", "_load", "_queued", "busy_ns", "index", "lock_ends", "queue", "switches")

    def __init__(self, index: int) -> None:
        self.index = index
        self.queue = RunQueue(self)
        self.busy_ns = 0
        self.switches = 0
        #: When each of those who have the queue's lock, or wait for it, will have released it, in their order (ns).
        self.lock_ends: list[int] = []
        self._current: Thread | None = None
        self.join(Crowd())

    def join(self, crowd: Crowd) -> None:
        """Be counted in ``crowd``, once."""
        self._crowd = crowd
        self._load = self._queued = -1
        self.count()

    def count(self) -> None:
        """The queue's length or the running thread may have changed."""
        crowd, bit = self._crowd, 1 << self.index
        queued = len(self.queue)
        if queued != self._queued:
            _move(crowd.queues, bit, self._queued, queued)
            self._queued = queued
        load = queued
        if self._current is None:
            crowd.idle |= bit
        else:
            crowd.idle &= ~bit
            load += 1
        if load != self._load:
            _move(crowd.loads, bit, self._load, load)
            self._load = load

    @property
    def current(self) -> Thread | None:
        """Who runs."""
        return self._current

    @current.setter
    def current(self, thread: Thread | None) -> None:
        self._current = thread
        self.count()

    @property
    def load(self) -> int:
        """Threads on the CPU and in its queue."""
        return self._load
