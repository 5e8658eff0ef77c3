"""Slices on the wall clock: one worker thread a machine, one slice at a time, and the baton that the others wait for.

While a slice runs, the event loop goes on, and must not touch the machine: what would is put into an inbox, the slice
is kicked, and the inbox is emptied when it is out (:meth:`VmSlices.call_at`). A coroutine of the program's waits for
:meth:`VmSlices.between_slices`. In virtual time there is one thread, and nothing of this happens.

Rules: who wakes from a sleep goes first, as on a busy kernel. Who wants to come between two slices gets short ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from aiovm.errors import StateError
from aiovm.exits import Exit, Interrupted
from aiovm.slice_thread import SliceThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.clock import Clock, Timer
    from aiovm.engine.base import Context
    from aiovm.engine.unicorn import UnicornEngine
    from aiovm.memory import MemoryMap

__all__ = ["VmSlices"]

#: How much longer a slice is on the wall clock when no other vCPU of the machine wants to run.
_ALONE: Final = 6
#: A slice on the wall clock, ns of charged code, while somebody waits for :meth:`VmSlices.between_slices`.
_BRIEF: Final = 100_000


class VmSlices:
    """What :class:`aiovm.vm.Vm` inherits."""

    clock: Clock
    cells: memoryview
    engine: UnicornEngine
    number: int
    runs_ahead: bool

    def _init_slices(self) -> None:
        #: Whose slice runs, and who was kicked while it waited for its turn.
        self._slicing: Context | None = None
        self._kicked: set[Context] = set()
        self._inbox: deque[Callable[[], object]] = deque()
        self._baton = asyncio.Lock()
        self.slice_waited = 0
        #: How many wait for the baton: vCPUs with a slice, and who wants to come between slices.
        self._queued = self._visitors = 0
        loop = asyncio.get_running_loop()
        self._worker = None if self.runs_ahead else SliceThread(f"aiovm-{self.number}", loop, self.clock)
        self._loop_thread = threading.get_ident()

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        if self._worker is None:
            return self.clock.call_at(deadline, callback)
        return self.clock.call_at(deadline, lambda: self._enter(callback))

    def _enter(self, callback: Callable[[], object]) -> None:
        """On the wall clock: now if no slice runs, else as soon as the kicked slice has ended."""
        if self._slicing is not None:
            self._inbox.append(callback)
            self.engine.kick()
        else:
            callback()

    def _may_change_memory(self, *_maps: MemoryMap) -> None:
        """What a slice reads in another thread stays; a device that the guest asked, in the slice itself, may."""
        if self._slicing is not None and threading.get_ident() == self._loop_thread:
            raise StateError("a slice uses the memory map and its logs: await vm.between_slices() first")

    @property
    def slice_runs(self) -> bool:
        return self._slicing is not None

    def kick_slice(self, context: Context) -> None:
        if self._slicing is context:
            self.engine.kick()
        else:
            self._kicked.add(context)

    async def between_slices(self) -> None:
        """Return when no slice runs, and none will before the caller waits again: memory may be changed then."""
        if self._slicing is not None:
            self.engine.kick()  # who wakes goes first, as on a busy kernel
        self._visitors += 1
        try:
            await self._baton.acquire()
        finally:
            self._visitors -= 1
        self._baton.release()

    async def run_slice(self, context: Context, budget: int) -> Exit:
        asked = self.clock.now() if self._queued or self._baton.locked() else None
        self._queued += 1
        try:
            await self._baton.acquire()
        finally:
            self._queued -= 1
        self.slice_waited = 0 if asked is None else self.clock.now() - asked
        try:
            if context in self._kicked:
                self._kicked.discard(context)
                return Interrupted()
            if self._visitors:  # they came when no slice ran that could be kicked
                budget = min(budget, _BRIEF)
            elif not self._queued:  # who comes meanwhile and wakes from a sleep ends it by a kick
                budget *= _ALONE
            self._slicing = context
            assert self._worker is not None
            try:
                return await self._worker.call(context.run, self.cells[0] + budget, self.engine.kick)
            finally:
                self._slicing = None
                while self._inbox:
                    self._inbox.popleft()()
                self._kicked.discard(context)  # it is out of guest mode
        finally:
            self._baton.release()
