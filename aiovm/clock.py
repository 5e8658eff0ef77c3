"""What time is it, and when is the next thing due: one heap of (deadline, serial), in integer nanoseconds.

Two clocks with one face. :class:`VirtualClock` moves only when somebody says that time passed; the event loop
pops its heap (``loop.VirtualLoop``). :class:`WallClock` is the host's monotonic clock, read here and nowhere else. A
timer of Linux's wakes it (``timerfd_create(2)``), as event loops know whole milliseconds only: who wakes early looks
again and again, and who wakes late makes a guest wait. Elsewhere it takes the loop's.

Slices run ahead. A slice that begins at loop time *t* moves ``cells[0]`` on while it runs, so that everything that
happens inside it (RDTSC, timers armed, IPIs sent) sees its own time; afterwards the loop goes on at *t*, and the vCPU
waits until its slice's end. Other CPUs therefore see each other's stores at most ``lookahead`` apart:

    now may run ahead to        min(next deadline of anybody else + lookahead, its own deadlines)

An event that is armed in mid-slice lowers the limit the same way; the block hook sees it at the next block.

Rules: callbacks are plain functions and run in (deadline, serial) order. A deadline in the past runs at the present.
Inside a slice of a wall-clock machine nothing may touch the heap directly; see ``WallClock.post``.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import struct
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Final, Protocol

from aiovm.errors import StateError
from aiovm.units import SEC

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["FOREVER", "MOST_TURNS", "Alarm", "Clock", "Timer", "VirtualClock", "WallClock", "new_cells"]

#: A deadline that never comes.
FOREVER: Final = 1 << 62

#: What is due so soon (ns) is waited for by turns of the loop; a timer would take as long.
_AT_ONCE: Final = 10_000
_ABSTIME: Final = 1

#: :attr:`VirtualClock.most_turns`, where nobody outside waits to be heard.
MOST_TURNS: Final = 512


class Timer:
    """A call that was armed; ``cancel()`` makes it not happen."""

    __slots__ = ("callback", "deadline")

    def __init__(self, deadline: int, callback: Callable[[], object]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Forget the call; harmless when it has happened."""
        self.callback = None

    def __call__(self) -> None:
        callback = self.callback
        if callback is not None:
            self.callback = None
            callback()


class Clock(Protocol):
    """What everybody above may ask of a clock."""

    #: (now, limit) of the running slice, ns; shared with the engine's block hook.
    cells: memoryview
    #: The wall time, ns since 1970, at which ``now()`` was 0.
    epoch_ns: int

    def now(self) -> int: ...
    def set_now(self, now: int, epoch_ns: int) -> None: ...
    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer: ...
    def push(self, deadline: int, timer: Timer) -> None: ...
    def horizon(self) -> int: ...
    def lower_limit(self, deadline: int) -> None: ...
    def try_advance(self, deadline: int) -> bool: ...
    @property
    def is_virtual(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...


def new_cells() -> memoryview:
    """A pair (now, limit) that the engine's block hook can share."""
    return memoryview((ctypes.c_int64 * 2)()).cast("B").cast("q")


def _armed(heap: list[tuple[int, int, Timer]]) -> bool:
    """Whether a call in ``heap`` has not been cancelled."""
    return any(timer.callback is not None for _, _, timer in heap)


def _nobody_may_wait(heap: list[tuple[int, int, Timer]]) -> None:
    if _armed(heap):
        raise StateError("the clock cannot be set while somebody waits for a time")


class Alarm:
    """One coroutine's wait for a time: reusable, and woken straight from the heap.

    It speaks the future protocol that ``asyncio.Task`` expects of what a coroutine yields, so the task is stepped in
    the heap's callback, without a future, a ``call_soon`` and a second turn of the loop.

    ``await alarm.until(t)`` returns at time ``t``. ``await alarm`` parks until somebody says ``alarm.ring_at(t)``.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_cancelled",
        "_context",
        "_loop",
        "_push",
        "_rung",
        "_spare",
        "_timer",
        "_wakeup",
    )

    def __init__(self, clock: Clock) -> None:
        self._push = clock.push
        # The task asks for this attribute, or for get_loop(), at each wait.
        self._loop = asyncio.get_running_loop()
        self._asyncio_future_blocking = False
        self._cancelled = False
        self._rung = False
        self._timer: Timer | None = None
        #: The timer that rang last, out of the heap: used again.
        self._spare: Timer | None = None
        self._wakeup: Callable[[Alarm], object] | None = None
        self._context: Context = copy_context()

    def ring_at(self, deadline: int) -> None:
        """Wake the waiter at ``deadline`` (ns); an earlier arming is forgotten."""
        if self._timer is not None:
            self._timer.callback = None
        self._rung = False
        timer, self._spare = self._spare, None
        if timer is None:
            timer = Timer(deadline, self._fire)
        else:
            timer.callback = self._fire
        self._timer = timer
        self._push(deadline, timer)

    def ring(self) -> None:
        """Wake the waiter now; not from a step of its own."""
        self.disarm()
        self._fire()

    def disarm(self) -> None:
        """Forget an arming, and a ring that nobody has heard."""
        if self._timer is not None:
            self._timer.callback = None
            self._timer = None
        self._rung = False

    def until(self, deadline: int) -> Alarm:
        """Arm, and give the thing to await."""
        self.ring_at(deadline)
        return self

    def __await__(self) -> Generator[Alarm, None, None]:
        if self._rung:  # it rang before anybody listened
            self._rung = False
            return
        self._asyncio_future_blocking = True
        yield self
        if self._cancelled:
            self._cancelled = False
            raise asyncio.CancelledError

    def add_done_callback(self, wakeup: Callable[[Alarm], object], *, context: Context | None = None) -> None:
        self._wakeup = wakeup
        if context is not None:
            self._context = context

    def _fire(self) -> None:
        self._spare, self._timer = self._timer, None
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is None:
            self._rung = True
        else:
            self._context.run(wakeup, self)

    def cancel(self, msg: object = None) -> bool:
        if self._wakeup is None:
            return False
        if not self._cancelled:
            self.disarm()
            self._cancelled = True
            self._loop.call_soon(self._fire_cancelled)
        return True

    def _fire_cancelled(self) -> None:
        if self._cancelled:  # else a ring came first, and the task knows
            self.disarm()
            self._fire()

    def result(self) -> None:
        """The task asks for the outcome before it steps the coroutine; the coroutine raises by itself."""


class VirtualClock:
    """Time that moves only when told.

    ``lookahead``: ns by which CPUs of a machine may run apart. ``epoch_ns``: the wall time at 0, by default the
    beginning of 2026, so that calendars in guests repeat as well.
    """

    is_virtual = True

    def __init__(self, *, lookahead: int = 2_000, epoch_ns: int = 1_767_225_600 * SEC) -> None:
        self.epoch_ns = epoch_ns
        self.cells = new_cells()
        self.cells[1] = FOREVER
        self.lookahead = lookahead
        self._heap: list[tuple[int, int, Timer]] = []
        self._serial = 0
        self._turns = 0
        #: Without suspending, a coroutine may let time pass this often in a row; then the loop gets a turn, so that
        #: signals and threads are heard. A count, not a duration: virtual time must not see the host.
        self.most_turns = MOST_TURNS
        #: Time stands still: nothing that is armed happens.
        self.held = False
        #: The loop's queue of callbacks that are ready now; nobody may skip past them.
        self.ready: deque[object] = deque()

    def now(self) -> int:
        """The running slice's time inside one, else the loop's (ns)."""
        value: int = self.cells[0]
        return value

    def set_now(self, now: int, epoch_ns: int) -> None:
        """Go on from a saved moment. Nobody may wait for a time meanwhile."""
        _nobody_may_wait(self._heap)
        self.cells[0] = now
        self.epoch_ns = epoch_ns

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback()`` at ``deadline`` (ns)."""
        timer = Timer(deadline, callback)
        self.push(deadline, timer)
        return timer

    def push(self, deadline: int, timer: Timer) -> None:
        """Arm ``timer``, which is in no heap, for ``deadline`` or the present, whichever is later."""
        cells = self.cells
        if deadline < cells[0]:
            deadline = cells[0]
        timer.deadline = deadline
        self._serial += 1
        heapq.heappush(self._heap, (deadline, self._serial, timer))
        limit = deadline + self.lookahead
        if limit < cells[1]:
            cells[1] = limit

    def horizon(self) -> int:
        """How far a slice that begins now may run: the next deadline plus the lookahead."""
        heap = self._heap
        while heap:
            if heap[0][2].callback is None:
                heapq.heappop(heap)
                continue
            return heap[0][0] + self.lookahead
        return FOREVER

    def lower_limit(self, deadline: int) -> None:
        """The running slice must end by ``deadline``."""
        if deadline < self.cells[1]:
            self.cells[1] = deadline

    def try_advance(self, deadline: int) -> bool:
        """Let time pass to ``deadline`` at once, when nothing else happens before or at it."""
        if self.ready or self._turns >= self.most_turns:
            self._turns = 0
            return False
        heap = self._heap
        while heap and heap[0][0] <= deadline:
            if heap[0][2].callback is None:
                heapq.heappop(heap)
                continue
            return False
        self._turns += 1
        if deadline > self.cells[0]:
            self.cells[0] = deadline
        return True

    def pass_or_push(self, deadline: int, timer: Timer) -> bool:
        """Let time pass to ``deadline`` at once and say so; or arm ``timer``, which is in no heap, when it cannot.

        For callers outside slices, with a deadline that has not passed.
        """
        heap = self._heap
        if (heap and heap[0][0] <= deadline) or self.ready or self._turns >= self.most_turns:
            timer.deadline = deadline
            self._serial += 1
            heapq.heappush(heap, (deadline, self._serial, timer))
            return False
        self._turns += 1
        self.cells[0] = deadline
        return True

    @property
    def is_idle(self) -> bool:
        """Whether nothing is armed and nobody ready: from inside a timer's call, it is the last that can happen."""
        return not self.ready and not _armed(self._heap)

    def steps(self, most: int) -> int:
        """Make up to ``most`` calls, each at its deadline, and stop when one made something ready; how many."""
        heap, cells, ready = self._heap, self.cells, self.ready
        if self.held:
            return 0
        pop = heapq.heappop
        done = 0
        cells[1] = FOREVER  # whoever runs a slice sets its limit
        while heap:
            deadline, _, timer = pop(heap)
            callback = timer.callback
            if callback is None:
                continue
            timer.callback = None
            self._turns = 0
            cells[0] = deadline
            callback()
            done += 1
            if done == most or ready:
                break
        return done

    def step(self) -> bool:
        """Move to the next deadline and make its call; False when nothing is armed."""
        return self.steps(1) > 0


class _LoopTimer:
    """Calls ``due`` some time after the moment that was set last; or before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[], object]) -> None:
        self._loop = loop
        self._due = due
        self._handle: asyncio.TimerHandle | None = None

    def set(self, moment: int) -> None:
        """``moment``: of ``time.monotonic_ns()``."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later((moment - time.monotonic_ns()) / SEC, self._due)


class _LinuxTimer:
    """The same by ``timerfd``, to some microseconds and never before. :class:`OSError` where there is none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[], object]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._set = libc.timerfd_settime
        self._due = due
        # The loop must not keep the timer, and with it its clock, a host and machines, for as long as it lives itself.
        rang = weakref.WeakMethod(self._rang)
        loop.add_reader(self._fd, lambda: _call(rang()))
        weakref.finalize(self, _forget, loop, self._fd)

    def set(self, moment: int) -> None:
        self._set(self._fd, _ABSTIME, struct.pack("4q", 0, 0, *divmod(moment, SEC)), None)

    def _rang(self) -> None:
        with suppress(BlockingIOError):  # it was set anew
            os.read(self._fd, 8)
        self._due()


def _call(method: Callable[[], object] | None) -> None:
    if method is not None:
        method()


def _forget(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """A timer's end, in whatever thread that is."""

    def close() -> None:
        loop.remove_reader(fd)
        os.close(fd)

    try:
        loop.call_soon_threadsafe(close)
    except RuntimeError:  # the loop is closed, and watches nothing
        os.close(fd)


def _timer(loop: asyncio.AbstractEventLoop, due: Callable[[], object]) -> _LinuxTimer | _LoopTimer:
    if sys.platform == "linux":
        with suppress(OSError, NotImplementedError):  # out of descriptors; a loop that watches none
            return _LinuxTimer(loop, due)
    return _LoopTimer(loop, due)


class WallClock:
    """The host's monotonic time since the clock was made, on a running asyncio or uvloop loop."""

    is_virtual = False
    #: Read by nobody's budget; machines on the wall clock count slices in cells of their own.
    lookahead = 0

    def __init__(self) -> None:
        self.cells = new_cells()
        self.cells[1] = FOREVER
        #: ``time.monotonic_ns()`` when the clock was made.
        self.base_ns = time.monotonic_ns()
        self.epoch_ns = time.time_ns()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._heap: list[tuple[int, int, Timer]] = []
        self._serial = 0
        self._timer = _timer(self._loop, self._due)
        #: When :meth:`_due` is called next.
        self._due_at = FOREVER

    def now(self) -> int:
        """Nanoseconds since the clock was made."""
        return time.monotonic_ns() - self.base_ns

    def set_now(self, now: int, epoch_ns: int) -> None:
        """Go on from a saved moment, at the wall time that it really is. Nobody may wait for a time meanwhile."""
        _nobody_may_wait(self._heap)
        self.base_ns = time.monotonic_ns() - now
        self.epoch_ns = time.time_ns() - now

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback()`` on the loop at ``deadline`` (ns), never early."""
        timer = Timer(deadline, callback)
        self.push(deadline, timer)
        return timer

    def push(self, deadline: int, timer: Timer) -> None:
        """Arm ``timer``, which is in no heap; from any thread."""
        timer.deadline = deadline
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self._push, timer)
        else:
            self._push(timer)

    def _push(self, timer: Timer) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (timer.deadline, self._serial, timer))
        self._arm()

    def _arm(self) -> None:
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
        if not heap:
            return
        deadline = heap[0][0]
        if deadline >= self._due_at:
            return
        self._due_at = deadline
        if deadline <= self.now() + _AT_ONCE:
            self._loop.call_soon(self._due)
        else:
            self._timer.set(self.base_ns + deadline)

    def _due(self) -> None:
        self._due_at = FOREVER
        heap = self._heap
        now = self.now()
        try:
            while heap and heap[0][0] <= now:
                heapq.heappop(heap)[2]()
        finally:
            self._arm()  # a callback that raises does not stop the others' time

    def horizon(self) -> int:
        """A wall-clock slice is bounded by its own length only."""
        return FOREVER

    def lower_limit(self, deadline: int) -> None:
        """Nothing: on the wall clock a slice is ended by a kick."""

    def try_advance(self, deadline: int) -> bool:
        """Whether ``deadline`` has passed."""
        return self.now() >= deadline

    @property
    def is_idle(self) -> bool:
        """Never: in real time somebody outside may always act."""
        return False
