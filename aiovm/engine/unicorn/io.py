"""IN, OUT, INS and OUTS: the core calls out in the middle of the instruction, and here it becomes exact.

The core checks no I/O permission and cannot be stopped at a chosen instruction. Both are mended with its I/O
breakpoint, which raises #DB right behind the instruction: when the guest was not allowed to, the registers are put
back and #GP(0) is raised; when the exit must leave, the slice ends there, between two elements of a string
instruction if it is one; when an OUT raised an interrupt that the guest can take, it is taken there.

Not modelled: a refused INS has stored zero to its destination (the core's trial store); the guest's own I/O breakpoint
on an access that leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.engine.base import Reg, Seg
from aiovm.engine.unicorn.layout import Env, Hf

if TYPE_CHECKING:
    from aiovm.engine.unicorn.context import UnicornContext
    from aiovm.engine.unicorn.decode import Instruction
    from aiovm.engine.unicorn.engine import UnicornEngine
    from aiovm.engine.unicorn.state import EnvState

__all__ = ["PortIo"]

_HFLAGS: Final = Env.HFLAGS >> 2
_STRING: Final = frozenset({0x6C, 0x6D, 0x6E, 0x6F})
_INS: Final = frozenset({0x6C, 0x6D})
_TF: Final = 0x100
_IF: Final = 0x200


class _Armed(NamedTuple):
    """What the breakpoint behind an instruction will put back."""

    dr0: int
    dr6: int
    dr7: int
    rip: int
    #: RAX, RCX, RSI, RDI before the instruction; None when it was allowed.
    refused: tuple[int, int, int, int] | None
    insn: Instruction | None
    #: Linear address of INS's element.
    destination: int | None


class PortIo:
    """The I/O instructions of one engine."""

    def __init__(self, engine: UnicornEngine) -> None:
        self._engine = engine
        self._armed: _Armed | None = None
        #: Where the element of an INS that left was stored, linear; None after another instruction that left.
        self.ins_address: int | None = None

    def on_in(self, _uc: int, port: int, size: int, _user: int) -> int:
        """The core's IN hook; also for each element of INS."""
        engine = self._engine
        try:
            engine.core.sync_in()
            engine.cells[0] += engine.costs.exit_ns
            return self.port_in(port, size)
        except BaseException as error:
            engine.fail(error)
            return 0

    def on_out(self, _uc: int, port: int, size: int, value: int, _user: int) -> None:
        """The core's OUT hook; also for each element of OUTS."""
        engine = self._engine
        try:
            engine.core.sync_in()
            engine.cells[0] += engine.costs.exit_ns
            self.port_out(port, size, value & (1 << 8 * size) - 1)
        except BaseException as error:
            engine.fail(error)

    def port_in(self, port: int, size: int) -> int:
        """Answer an IN."""
        if not self._permitted(port, size):
            return 0
        value = self._current.port.on_in(port, size) & (1 << 8 * size) - 1
        self.behind_io(port, False)
        return value

    def port_out(self, port: int, size: int, value: int) -> None:
        """Answer an OUT."""
        if self._permitted(port, size):
            self._current.port.on_out(port, size, value)
            self.behind_io(port, True)

    def behind_io(self, port: int, is_out: bool) -> None:
        """Behind an answered instruction the slice may end; behind an OUT an interrupt may be taken."""
        context = self._current
        if self._engine.leaving or (is_out and (context.window or context.nmi_window) and _is_open(context)):
            self._arm(context, port, refused=False)

    def _permitted(self, port: int, size: int) -> bool:
        """Whether the code may touch the port; else that becomes a fault."""
        context = self._current
        if not context.state.d[_HFLAGS] & Hf.CPL or context.port.on_io_permission(port, size):
            return True
        self._arm(context, port, refused=True)
        return False

    @property
    def _current(self) -> UnicornContext:
        context = self._engine.current
        assert context is not None  # while code runs
        return context

    def _arm(self, context: UnicornContext, port: int, *, refused: bool) -> None:
        """Make the core raise #DB right after this I/O instruction (an I/O breakpoint in DR0)."""
        state = context.state
        gpr = state.gpr
        before = (gpr[Reg.RAX], gpr[Reg.RCX], gpr[Reg.RSI], gpr[Reg.RDI]) if refused else None
        insn = self._engine.intercepts.decode(context)
        to = _destination(state, insn) if insn is not None and insn.opcode in _INS else None
        self._armed = _Armed(state.get_dr(0), state.get_dr(6), state.get_dr(7), state.rip, before, insn, to)
        state.set_dr(0, port)
        state.set_dr(7, 0x2_0402)  # G0, R/W0 = I/O, one byte
        if not self._engine.pointers:
            self._engine.core.sync_out()

    def finish(self, context: UnicornContext) -> bool:
        """#DB arrived: whether it was the breakpoint of :meth:`_arm`; then the instruction's end is put right."""
        armed = self._armed
        if armed is None:
            return False
        self._armed = None
        engine, state = self._engine, context.state
        state.set_dr(0, armed.dr0)
        state.set_dr(6, armed.dr6)
        state.set_dr(7, armed.dr7)
        gpr = state.gpr
        if armed.refused is not None:
            gpr[Reg.RAX], gpr[Reg.RCX], gpr[Reg.RSI], gpr[Reg.RDI] = armed.refused
            state.rip = armed.rip
            context.port.on_exception(13, 0, 0)
            return True
        insn = armed.insn
        self.ins_address = armed.destination
        if insn is not None and insn.rep and insn.opcode in _STRING:
            # The core raises the breakpoint before it counts the element.
            mask = (1 << 8 * insn.address_size) - 1
            left = gpr[Reg.RCX] - 1 & mask
            gpr[Reg.RCX] = left if insn.address_size >= 4 else gpr[Reg.RCX] & ~mask | left
            if left:
                state.rip = armed.rip
        if state.rflags & _TF:
            engine.intercepts.trap(context)
        if engine.leaving:
            engine.stop()
        elif context.nmi_window and not state.nmi_masked:
            engine.intercepts.nmi_window(context)
        elif context.window:
            engine.intercepts.irq_window(context)
        return True


def _is_open(context: UnicornContext) -> bool:
    """Whether the guest takes what a window was asked for."""
    state = context.state
    return bool(context.window and state.rflags & _IF) or bool(context.nmi_window and not state.nmi_masked)


def _destination(state: EnvState, insn: Instruction) -> int:
    """ES:rDI as INS sees it."""
    offset: int = state.q[Reg.RDI] & (1 << 8 * insn.address_size) - 1
    return offset if state.long_mode else offset + state.segment(Seg.ES).base & 0xFFFF_FFFF
