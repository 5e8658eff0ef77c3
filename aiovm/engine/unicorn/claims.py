"""Memory-mapped ranges that the embedding program answers itself: a load that must wait, made exact.

A device's callback answers a load in the middle of the instruction. A program that is asked cannot: it must be able to
wait. So the instruction is taken back, the vCPU leaves, and once the data are there the instruction runs again.

How. The core refuses loads from a device region whose right to be read is taken away, before anything of the
instruction has happened and with RIP at it; stores go through all the same. So:

1. A claimed range is mapped for stores only. A store leaves at the end of its block (it is posted, like any store to a
   device); a load stops the slice with the core's error.
2. :meth:`Claims.probe` runs into the same error once more with a hook, which tells address and size.
3. With the data, :meth:`Claims.replay` opens the range, executes this one instruction with RFLAGS.TF set, and answers
   its loads. A load that has no answer yet (the second half of a 16-byte operand, the other operand of CMPS) puts the
   registers back and leaves again; the answers so far are kept.

A page may be claimed in part: the rest of it is answered inline, in a replay too.

Not modelled: an instruction that stores to memory what it loaded from two claimed places stores rubbish first, until
the second answer is there; a store of eight bytes comes as two of four, and one that crosses a page byte by byte; POPF
and IRET with a claimed stack while the guest single-steps.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.layout import Env
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.unicorn.context import UnicornContext
    from aiovm.engine.unicorn.engine import UnicornEngine

__all__ = ["READ_REFUSED", "Claims"]

#: The core's error for a load from a claimed page.
READ_REFUSED: Final = lib.const.UC_ERR_READ_PROT
_EFLAGS: Final = Env.EFLAGS >> 3
_TF: Final = 0x100
_STORES, _BOTH = 2, 3
_WIDEST: Final = 8
#: A replayed instruction is not cut short by the slice's end.
_UNBOUNDED: Final = 1 << 62


class Claims:
    """One engine's claimed pages, and the instruction that is being replayed."""

    def __init__(self, engine: UnicornEngine) -> None:
        self._engine = engine
        #: Page-aligned (low, high).
        self.ranges: list[tuple[int, int]] = []
        self._probed: list[tuple[int, int]] = []
        #: Pages of a load that crosses from one to the next: the core asks for more of them than the guest did.
        self._crossed: set[int] = set()
        self.replaying = False
        self._missing: tuple[int, int] | None = None
        self._guest_tf = 0
        self._dr6 = 0
        self._hook = lib.HOOK_MEM_T(self._on_refused)

    def add(self, base: int, length: int) -> None:
        """Claim the pages of ``[base, base + length)``; the engine maps them anew."""
        low, high = base & -PAGE, -(-(base + length) // PAGE) * PAGE
        for other in [r for r in self.ranges if r[0] <= high and low <= r[1]]:
            low, high = min(low, other[0]), max(high, other[1])
            self.ranges.remove(other)
        self.ranges.append((low, high))
        self.ranges.sort()

    # ---- where the load goes ---------------------------------------------------------------------------------------

    def probe(self, context: UnicornContext) -> tuple[int, int] | None:
        """Guest physical address and size of the load that the core has just refused at RIP."""
        engine = self._engine
        hook = ctypes.c_size_t()
        kind = lib.const.UC_HOOK_MEM_READ_PROT
        lib.check(lib.hook_add(engine.core.handle, kind, lib.address_of(self._hook), 0, out=hook), "hook loads")
        self._probed.clear()
        try:
            self._run(context)
        finally:
            lib.uc_hook_del(engine.core.handle, hook)
        if not self._probed:
            return None
        gpa, size = self._probed[0]
        self._crossed = {gpa // PAGE} if gpa % PAGE + size > PAGE else set()
        return gpa, size

    def _on_refused(self, _uc: int, _kind: int, gpa: int, size: int, _value: int, _user: int) -> bool:
        self._probed.append((gpa, size))
        return False

    # ---- the instruction again ---------------------------------------------------------------------------------

    def replay(self, context: UnicornContext) -> tuple[int, int] | None:
        """Execute the instruction at RIP with ``context.answers``; the load that has none, or None when it is done."""
        engine, state = self._engine, context.state
        before = bytes(state.q.cast("B"))
        self._guest_tf = state.q[_EFLAGS] & _TF
        self._dr6 = state.get_dr(6)
        self._missing = None
        self.replaying = True
        self._open(_BOTH)
        state.q[_EFLAGS] |= _TF
        try:
            self._run(context)
        finally:
            self._open(_STORES)
            self.close(context)
        missing = self._lacking()
        if missing is None:
            context.answers.clear()
        else:
            if self._crossed:
                self._crossed.add(missing[0] // PAGE)
            state.q.cast("B")[:] = before
            engine.core.sync_out()
        return missing

    def _lacking(self) -> tuple[int, int] | None:
        return self._missing

    def _open(self, rights: int) -> None:
        """What the core may do to the claimed pages; a device page is looked at for each access, so at once."""
        for low, high in self.ranges:
            lib.check(lib.uc_mem_protect(self._engine.core.handle, low, high - low, rights), "open a claimed range")

    def _run(self, context: UnicornContext) -> None:
        engine = self._engine
        cells = engine.cells
        limit, cells[1] = cells[1], _UNBOUNDED
        engine.core.close_windows()
        engine.core.sync_out()
        engine.enter(context)
        engine.core.sync_in()
        cells[1] = min(limit, cells[1])
        engine.apply_windows(context)

    def finish(self, context: UnicornContext) -> bool:
        """#DB arrived: whether it ends a replay."""
        if not self.close(context):
            return False
        if self._guest_tf:
            self._engine.intercepts.trap(context)
        self._engine.stop()
        return True

    def close(self, context: UnicornContext) -> bool:
        """The replayed instruction is over, at its end or by a fault: RFLAGS.TF and DR6 are the guest's again. Whether
        one was."""
        if not self.replaying:
            return False
        self.replaying = False
        state = context.state
        state.q[_EFLAGS] = state.q[_EFLAGS] & ~_TF | self._guest_tf
        state.set_dr(6, self._dr6)
        return True

    # ---- the core's calls ----------------------------------------------------------------------------------------

    def reader(self, base: int) -> Callable[[int, int, int, int], int]:
        """The load callback of a claimed range; only replayed instructions get here."""

        def read(_uc: int, offset: int, size: int, _user: int) -> int:
            try:
                return self._answer(base + offset, size)
            except BaseException as error:
                self._engine.fail(error)
                return 0

        return read

    def _answer(self, gpa: int, size: int) -> int:
        context = self._engine.current
        assert context is not None
        answers = context.answers
        if gpa // PAGE in self._crossed or gpa in answers:
            return sum(answers.get(gpa + at, 0) << 8 * at for at in range(size))
        if not context.port.is_users(gpa, size):
            return context.port.on_mmio_read(gpa, size) & (1 << 8 * size) - 1
        if self._missing is None:
            self._missing = gpa, size
        elif sum(self._missing) == gpa and self._missing[1] + size <= _WIDEST:
            self._missing = self._missing[0], self._missing[1] + size  # the core asks for eight bytes in halves
        return 0
