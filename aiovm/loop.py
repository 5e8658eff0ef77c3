"""Who runs: the host's physical CPUs, their threads, and the two event loops.

:class:`Host` is the kernel's scheduler for vCPU threads: it puts them on physical CPUs, ends their slices, wakes them,
and answers directed yields (``kernel/sched/core.c`` yield_to). It is the only writer of a thread's state. *Choices* are
the policy's (:mod:`aiovm.policy`); *waiting* is the vCPU coroutine's, which parks on its thread's alarm until the host
rings it.

:class:`VirtualLoop` is an asyncio event loop whose time is a :class:`~aiovm.clock.VirtualClock`: when every coroutine
waits it jumps to the next deadline, and when there is none it raises :class:`~aiovm.errors.DeadlockError` instead of
hanging. ``asyncio.sleep`` and friends work on it, in virtual time.

    BLOCKED --wake--> READY --dispatch--> RUNNING --block--> BLOCKED
                        ^---- preempt, yield ----'

Rules: all of this happens at the loop's time, never inside a slice; ties go by physical CPU index and thread number.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

from aiovm.clock import MOST_TURNS, Alarm, Timer, VirtualClock, WallClock
from aiovm.costs import Costs
from aiovm.errors import ConfigError, DeadlockError, StateError
from aiovm.policy.base import Policy, Requeue
from aiovm.policy.fair import Fair
from aiovm.policy.thread import Pcpu, PreemptNotifier, Thread, ThreadState
from aiovm.trace import Kind, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Executor
    from contextvars import Context

__all__ = ["Host", "HostState", "VirtualLoop", "run", "run_wall"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


#: Calls from the clock's heap, and turns of one coroutine, before the loop looks at its sockets.
_HEARD: Final = (1, 4)
_UNHEARD: Final = (256, MOST_TURNS)


#: Eight times what Linux can be built for (CONFIG_NR_CPUS); ours.
_MAX_PCPUS: Final = 1 << 16


class _ClockHandle(asyncio.TimerHandle):
    """asyncio's handle of a timed call, and the clock's."""

    __slots__ = ("timer",)
    timer: Timer


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. Files, sockets and executors work, but what they do is not repeatable."""

    def __init__(self, clock: VirtualClock | None = None) -> None:
        self.clock = VirtualClock() if clock is None else clock
        super().__init__()
        self.clock.ready = self._ready  # type: ignore[attr-defined]
        self._outside = 0
        #: The hosts that live here, in the order in which they were made.
        self._hosts: WeakKeyDictionary[Host, None] = WeakKeyDictionary()

    def add_host(self, host: Host) -> None:
        """``host`` lives here: the message of a stall tells of its threads."""
        self._hosts[host] = None

    def describe(self) -> str:
        """Who waits for what, for the message of a stall."""
        return "; ".join(host.describe() for host in self._hosts if host.threads) or "no machine"

    def time(self) -> float:
        """The virtual time in seconds, as asyncio wants it."""
        return self.clock.now() / 1_000_000_000

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._arm(round(when * 1_000_000_000), callback, args, context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._arm(self.clock.now() + max(0, round(delay * 1_000_000_000)), callback, args, context)

    def _arm(
        self, deadline: int, callback: Callable[[*Ts], object], args: tuple[*Ts], context: Context | None
    ) -> asyncio.TimerHandle:
        handle = _ClockHandle(deadline / 1_000_000_000, callback, args, self, context)
        handle.timer = self.clock.call_at(deadline, handle._run)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # A deadline that nobody waits for must not move time.
        assert isinstance(handle, _ClockHandle)
        handle.timer.cancel()

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._outside += 1
        future.add_done_callback(self._came_back)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait for the executor's threads to end; a timeout in virtual time would mean nothing to them."""
        self._outside += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._outside -= 1

    def _came_back(self, _future: asyncio.Future[Any]) -> None:
        self._outside -= 1

    def stop(self) -> None:
        super().stop()
        self.call_soon(int)  # something is ready: no further step in time

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        # Whoever waits at a socket (a debugger's Ctrl-C) is heard soon, at the price of a system call for each step.
        heard = len(self._selector.get_map()) > 1  # type: ignore[attr-defined]
        steps, self.clock.most_turns = _HEARD if heard else _UNHEARD
        if not ready and not self._stopping and not self.clock.steps(steps):  # type: ignore[attr-defined]
            self._idle()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()
        if self._outside or heard:
            self._process_events(self._selector.select(0))  # type: ignore[attr-defined]

    def _idle(self) -> None:
        selector = self._selector  # type: ignore[attr-defined]
        if not self._outside and len(selector.get_map()) <= 1:
            raise DeadlockError(f"nothing can happen any more at {self.clock.now()} ns: {self.describe()}")
        self._process_events(selector.select(None))  # type: ignore[attr-defined]


def _refuse_nesting(main: Coroutine[Any, Any, Any]) -> None:
    """A notebook, say, has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    main.close()
    raise StateError("an event loop runs here already: await the coroutine, and its machines live on the wall clock")


def run(main: Coroutine[Any, Any, T], *, clock: VirtualClock | None = None) -> T:
    """Run ``main`` to its end in virtual time and return its result."""
    _refuse_nesting(main)
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(main)


def run_wall(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` on the wall clock: on uvloop where it is installed, else on asyncio's own loop."""
    _refuse_nesting(main)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True)
class HostState:
    """A host at rest: the policy and what it remembers, the generator's words, each CPU's accounts and queue lock."""

    policy: str
    policy_state: dict[str, list[int]]
    random: list[int]
    busy_ns: list[int]
    switches: list[int]
    lock_ends: list[list[int]]


class Host:
    """``pcpus`` physical CPUs under ``policy``. Make it on a running loop.

    ``clock``: the loop's :class:`VirtualClock`, or a :class:`WallClock`; found by itself. ``seed``: of every random
    choice on this host. ``trace``: where records go.
    """

    def __init__(
        self,
        pcpus: int,
        *,
        policy: Policy | None = None,
        clock: VirtualClock | WallClock | None = None,
        costs: Costs | None = None,
        seed: int = 0,
        trace: Tracer | None = None,
    ) -> None:
        if not isinstance(pcpus, int) or pcpus < 1:
            raise ConfigError(f"a host needs at least one physical CPU, not {pcpus!r}")
        if pcpus > _MAX_PCPUS:
            raise ConfigError(f"a host has {_MAX_PCPUS} physical CPUs at most, not {pcpus}")
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigError(f"policy: {policy!r} is no Policy; aiovm.policy.by_name makes one from its name")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise StateError("a host is made on a running event loop: in a coroutine, under aiovm.run, say") from None
        if clock is None:
            clock = loop.clock if isinstance(loop, VirtualLoop) else WallClock()
        self._loop = loop
        self.clock = clock
        self.costs = Costs() if costs is None else costs
        self._switch_ns = self.costs.context_switch_ns if clock.is_virtual else 0
        self.seed = seed
        self.random = random.Random(seed)
        self.trace = Tracer() if trace is None else trace
        self.policy = Fair() if policy is None else policy
        self.pcpus = tuple(Pcpu(i) for i in range(pcpus))
        self.threads: list[Thread] = []
        self.machines: list[object] = []
        #: How many there have been: what is new gets the next number.
        self._threads_made = self._machines_made = 0
        self.policy.attach(self.pcpus, self.random)
        self.policy.start(self)
        self._slice_timers: list[Timer | None] = [None] * pcpus
        if isinstance(clock, VirtualClock):
            clock.lookahead = self.costs.quantum_ns
        if isinstance(loop, VirtualLoop):
            loop.add_host(self)

    def check_loop(self) -> None:
        """:class:`StateError` on another event loop than the host's own, be it of another thread or a later one."""
        if asyncio.get_running_loop() is not self._loop:
            raise StateError("a host and its machines live on the event loop on which the host was made")

    def save(self) -> HostState:
        """The scheduler's state while every thread is blocked; the threads' own is each machine's."""
        _version, words, gauss = self.random.getstate()
        if gauss is not None or any(pcpu.load for pcpu in self.pcpus):
            raise StateError("a host is saved while nobody runs on it and nobody waits for a CPU")
        return HostState(
            self.policy.name,
            self.policy.save(),
            list(words),
            [pcpu.busy_ns for pcpu in self.pcpus],
            [pcpu.switches for pcpu in self.pcpus],
            [list(pcpu.lock_ends) for pcpu in self.pcpus],
        )

    def restore(self, state: HostState) -> bool:
        """Take over a saved state; False when this host is another: its policy's name or number of CPUs differ."""
        if self.policy.name != state.policy or len(self.pcpus) != len(state.busy_ns):
            return False
        self.random.setstate((self.random.VERSION, tuple(state.random), None))
        self.policy.restore(state.policy_state, self.threads)
        accounts = zip(self.pcpus, state.busy_ns, state.switches, state.lock_ends, strict=True)
        for pcpu, busy_ns, switches, lock_ends in accounts:
            pcpu.busy_ns, pcpu.switches = busy_ns, switches
            pcpu.lock_ends = lock_ends.copy()
        return True

    def register_machine(self, machine: object) -> int:
        """A machine joins; its number on this host."""
        self.machines.append(machine)
        self._machines_made += 1
        return self._machines_made - 1

    def release_machine(self, machine: object, number: int) -> None:
        """``machine``, whose vCPUs run no more, is forgotten; its number and its threads' stay used."""
        self.machines.remove(machine)
        for thread in self.threads:
            if thread.group == number:
                self.policy.gone(thread)
        self.threads = [thread for thread in self.threads if thread.group != number]

    @property
    def is_new(self) -> bool:
        """Whether no machine has been here."""
        return not self._machines_made

    # ---- threads -----------------------------------------------------------------------------------------------

    def retire(self, thread: Thread) -> None:
        """Whatever ``thread`` is, it is BLOCKED afterwards: its coroutine ends."""
        thread.alarm.disarm()
        if thread.state is ThreadState.RUNNING:
            self.block(thread)
        elif thread.state is ThreadState.READY:
            self.policy.remove(thread)
            thread.state = ThreadState.BLOCKED

    def add_thread(self, notifier: PreemptNotifier, group: int) -> Thread:
        """A new thread, blocked. ``group``: its machine's number."""
        thread = Thread(self._threads_made, group, notifier, Alarm(self.clock))
        self._threads_made += 1
        self.threads.append(thread)
        self.policy.added(thread)
        return thread

    def wake(self, thread: Thread, waker: int = -1) -> None:
        """BLOCKED -> READY, and on a CPU where one is free or gives way. Nothing for a thread that is not blocked."""
        if thread.state is not ThreadState.BLOCKED:
            return
        now = self.clock.now()
        pcpu = self.policy.select_pcpu(thread, now)
        self.policy.woke(thread, pcpu, now)
        thread.state = ThreadState.READY
        thread.ready_since = now
        thread.pcpu_index = pcpu.index
        if self.trace.on:
            self.trace.emit(now, Kind.WAKE, thread.number, waker, pcpu.index)
        current = pcpu.current
        if current is None and self.policy.conserving:
            self._dispatch(pcpu, thread, now)
            return
        self.policy.enqueue(thread, pcpu, Requeue.WAKE, now)
        if current is None:
            self._fill(pcpu, now)
        elif self.policy.wakeup_preempts(thread, current, now):
            self._resched(current)
        else:
            self._arm_slice_end(pcpu, now)

    def block(self, thread: Thread) -> None:
        """RUNNING -> BLOCKED: the thread waits for something; its CPU goes to the next."""
        pcpu, now = self._stop_accounting(thread)
        self._take_off(thread, pcpu, now, ThreadState.BLOCKED, 0)
        self._fill(pcpu, now)

    def preempt(self, thread: Thread, *, yielded: bool = False) -> bool:
        """RUNNING -> READY when another thread should run; whether it came off. It then parks on its alarm."""
        pcpu, now = self._stop_accounting(thread)
        thread.resched = False
        thread.ready_since = now
        self.policy.enqueue(thread, pcpu, Requeue.YIELDED if yielded else Requeue.PREEMPTED, now)
        following = self.policy.pick(pcpu, now)
        if following is thread:
            thread.ignored_yields += yielded
            thread.slice_end = now + self.policy.slice_of(thread, pcpu)
            self._arm_slice_end(pcpu, now)
            return False
        self._take_off(thread, pcpu, now, ThreadState.READY, 2 if yielded else 1)
        if following is not None:
            self._dispatch(pcpu, following, now)
        return True

    def yield_to(self, me: Thread, target: Thread) -> int:
        """Give my CPU away in favour of ``target``: 1 done, 0 no use, -1 nobody else is ready (ESRCH).

        ``kernel/sched/core.c`` yield_to: -ESRCH when both run queues hold one task; 0 when the target runs already
        or is not runnable. On 1 the caller comes off its CPU at the end of its slice (``me.resched``).
        """
        mine = self.pcpus[me.pcpu_index]
        if target.pcpu_index < 0:
            return 0
        its = self.pcpus[target.pcpu_index]
        if mine.load == 1 and its.load <= 1:
            return -1
        if target.state is not ThreadState.READY:
            return 0
        now = self.clock.now()
        self.policy.yield_to(target, now)
        if its is not mine and its.current is not None and not self.policy.may_preempt(its.current, now):
            self._resched(its.current)
        me.resched = True
        return 1

    def lock_queues(self, me: Thread, target: Thread, at: int) -> int:
        """When a yield is over that begins at ``at`` (ns): waiting for both queues' locks, and what is done under them.

        ``double_rq_lock``: the lower queue's lock is held while the other's is waited for. Places in both lines are
        taken at once, a simplification.
        """
        indices = sorted({me.pcpu_index, target.pcpu_index} - {-1})
        for index in indices:
            at = self._queue_lock_free(self.pcpus[index], at)
        at += self.costs.yield_ns
        for index in indices:
            self.pcpus[index].lock_ends.append(at)
        return at

    def _queue_lock_free(self, pcpu: Pcpu, at: int) -> int:
        """When who asks at ``at`` for the lock of ``pcpu``'s queue has it."""
        ends = pcpu.lock_ends
        while ends and ends[0] <= at:
            del ends[0]
        return ends[-1] if ends else at

    def is_single_task(self, thread: Thread) -> bool:
        """Whether nobody waits for the CPU that ``thread`` runs on."""
        return not self.pcpus[thread.pcpu_index].queue

    def describe(self) -> str:
        """Every thread's state, for messages."""
        return "; ".join(t.notifier.describe() for t in self.threads) or "no threads"

    # PolicyHost

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        """For policies: run ``callback`` at ``deadline`` (ns)."""
        return self.clock.call_at(deadline, callback)

    def reschedule(self, pcpu: Pcpu) -> None:
        """For policies: ask again who should run on ``pcpu``."""
        if pcpu.current is None:
            self._fill(pcpu, self.clock.now())
        else:
            self._resched(pcpu.current)

    # ---- on and off a CPU ------------------------------------------------------------------------------------------

    def _dispatch(self, pcpu: Pcpu, thread: Thread, now: int) -> None:
        if pcpu.current is not None or thread.state is not ThreadState.READY:
            raise StateError(f"dispatch of thread {thread.number}, which is {thread.state.value}, on CPU {pcpu.index}")
        start = self._queue_lock_free(pcpu, now) + self._switch_ns
        pcpu.current = thread
        pcpu.switches += 1
        thread.state = ThreadState.RUNNING
        thread.pcpu_index = pcpu.index
        thread.resched = False
        thread.run_delay += now - thread.ready_since
        thread.started = now
        thread.slice_end = start + self.policy.slice_of(thread, pcpu)
        thread.notifier.sched_in(pcpu.index, start)
        if self.trace.on:
            self.trace.emit(start, Kind.SCHED_IN, thread.number, pcpu.index, now - thread.ready_since)
        thread.alarm.ring_at(start)
        self._arm_slice_end(pcpu, now)

    def _fill(self, pcpu: Pcpu, now: int) -> None:
        following = self.policy.pick(pcpu, now)
        if following is not None:
            self._dispatch(pcpu, following, now)

    def _take_off(self, thread: Thread, pcpu: Pcpu, now: int, state: ThreadState, reason: int) -> None:
        """``reason``: 0 it blocks, 1 it is preempted, 2 it yields."""
        self._disarm_slice_end(pcpu)
        pcpu.current = None
        thread.resched = False
        thread.state = state
        thread.notifier.sched_out(preempted=state is ThreadState.READY, now=now)
        if self.trace.on:
            self.trace.emit(now, Kind.SCHED_OUT, thread.number, pcpu.index, reason)

    def _stop_accounting(self, thread: Thread) -> tuple[Pcpu, int]:
        """Charge what ``thread`` has run up to now; its CPU and the time."""
        if thread.state is not ThreadState.RUNNING:
            raise StateError(f"thread {thread.number} is {thread.state.value}, not running")
        now = self.clock.now()
        pcpu = self.pcpus[thread.pcpu_index]
        ran = now - thread.started
        thread.started = now
        thread.ran_ns += ran
        pcpu.busy_ns += ran
        self.policy.ran(thread, ran)
        return pcpu, now

    def _resched(self, thread: Thread) -> None:
        thread.resched = True
        thread.notifier.need_resched()

    def _arm_slice_end(self, pcpu: Pcpu, now: int) -> None:
        """Somebody waits for this CPU: the running thread's slice counts."""
        thread = pcpu.current
        if thread is None or not pcpu.queue:
            return
        self._disarm_slice_end(pcpu)
        at = max(thread.slice_end, now)
        self._slice_timers[pcpu.index] = self.clock.call_at(at, lambda: self._slice_expired(pcpu, thread))

    def _disarm_slice_end(self, pcpu: Pcpu) -> None:
        timer = self._slice_timers[pcpu.index]
        if timer is not None:
            timer.cancel()

    def _slice_expired(self, pcpu: Pcpu, thread: Thread) -> None:
        if pcpu.current is not thread or not pcpu.queue:
            return
        now = self.clock.now()
        patience = self.policy.may_preempt(thread, now)
        if patience:
            thread.slice_end = now + patience
            self._arm_slice_end(pcpu, now)
        else:
            self._resched(thread)
