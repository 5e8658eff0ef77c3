"""What a policy chooses among: threads (one a vCPU) and physical CPUs. State only; the host is the writer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aiovm.clock import Alarm

__all__ = ["Pcpu", "PreemptNotifier", "Thread", "ThreadState"]


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


@dataclass(slots=True, eq=False)
class Pcpu:
    """A physical CPU: who runs on it, who waits for it."""

    index: int
    current: Thread | None = None
    queue: list[Thread] = field(default_factory=list)
    busy_ns: int = 0
    switches: int = 0

    @property
    def load(self) -> int:
        """Threads on the CPU and in its queue."""
        return len(self.queue) + (self.current is not None)
