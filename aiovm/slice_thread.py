"""The thread in which a machine's slices run on the wall clock, one at a time, each awaited by the loop.

An executor does this as well, with a future on either side, a lock and two turns of the loop: three times the work,
and a machine that serves makes hundreds of such hops a second. Here a call goes through a queue, and its end rings an
:class:`~aiovm.clock.Alarm`, which steps the waiting task at once.

Rules: the loop alone calls; one call at a time; who is cancelled waits for the end of his call all the same. The
thread begins with the first call, and ends by :meth:`SliceThread.close` or when nobody has the object any more.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aiovm.clock import Alarm
from aiovm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.clock import Clock

__all__ = ["SliceThread"]

T = TypeVar("T")


class _Call(Generic[T]):
    """One call, and what came of it."""

    __slots__ = ("argument", "error", "function", "over", "result")

    def __init__(self, function: Callable[[int], T], argument: int) -> None:
        self.function = function
        self.argument = argument
        self.over = False
        self.result: T | None = None
        self.error: BaseException | None = None

    def make(self) -> None:
        try:
            self.result = self.function(self.argument)
        except BaseException as error:
            self.error = error


class SliceThread:
    """A thread called ``name`` beside ``loop``."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self._name = name
        self._loop = loop
        self._alarm = Alarm(clock)
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._calls.put, None)

    async def call(self, function: Callable[[int], T], argument: int, hurry: Callable[[], object]) -> T:
        """``function(argument)``, awaited. Who is cancelled meanwhile calls ``hurry`` and goes when it has ended."""
        if not self._end.alive:
            raise StateError(f"{self._name} is closed")
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._calls, self._loop, self._alarm), name=self._name, daemon=True
            )
            self._thread.start()
        call = _Call(function, argument)
        self._calls.put(call)
        cancelled: asyncio.CancelledError | None = None
        while not call.over:
            try:
                await self._alarm
            except asyncio.CancelledError as error:  # as often as somebody likes
                cancelled = error
                hurry()
        if cancelled is not None:
            raise cancelled
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]  # no error: it has one

    def close(self) -> None:
        """The thread ends when its call has; wait for that."""
        self._end()
        if self._thread is not None:
            self._thread.join()


def _work(calls: SimpleQueue[_Call[Any] | None], loop: asyncio.AbstractEventLoop, alarm: Alarm) -> None:
    while (call := calls.get()) is not None:
        call.make()
        loop.call_soon_threadsafe(_over, call, alarm)
        del call


def _over(call: _Call[Any], alarm: Alarm) -> None:
    call.over = True
    alarm.ring()
