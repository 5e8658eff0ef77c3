"""SYSCALL and SYSENTER: transitions that the core leaves to its user (SDM vol. 2B; the CPU model is Intel's).

Unicorn's core only steps over the two instructions, prefixes included, when its hooks return. :func:`syscall` and
:func:`sysenter` make the transition on the registers and return None, or return the vector of the fault that the
instruction raises instead. SYSRET and SYSEXIT are the core's own.

Not modelled: the shadow stack, and user-interrupt state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg, Seg, Segment
from aiovm.engine.unicorn.layout import MSRS, Env

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.unicorn.engine import UnicornEngine
    from aiovm.engine.unicorn.state import EnvState

__all__ = ["SystemCalls", "syscall", "sysenter"]

_INVALID_OPCODE: Final = 6
_GENERAL_PROTECTION: Final = 13
_LIMIT: Final = 0xFFFF_FFFF
_CODE64, _CODE32, _DATA = 0xAF_9B00, 0xCF_9B00, 0xCF_9300
_SCE, _LMA = 1 << 0, 1 << 10
_IF, _RF, _VM = 1 << 9, 1 << 16, 1 << 17
_SYSCALL: Final = b"\x0f\x05"
_SYSENTER: Final = b"\x0f\x34"
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF


class SystemCalls:
    """The hooks of one engine."""

    def __init__(self, engine: UnicornEngine) -> None:
        self._engine = engine

    def on_syscall(self, _uc: int, _user: int) -> None:
        """The core's SYSCALL hook."""
        self._transition(_SYSCALL, syscall)

    def on_sysenter(self, _uc: int, _user: int) -> None:
        """The core's SYSENTER hook."""
        self._transition(_SYSENTER, lambda state, _next: sysenter(state))

    def _transition(self, plain: bytes, enter: Callable[[EnvState, int], int | None]) -> None:
        engine = self._engine
        try:
            context = engine.current
            assert context is not None
            engine.core.sync_in()
            length = 2
            if engine.core.fetch(context.linear_rip, 2) != plain:
                insn = engine.intercepts.decode(context)
                length = 2 if insn is None else insn.length
            vector = enter(context.state, context.state.rip + length & _M64)
            if vector is not None:
                context.port.on_exception(vector, 0 if vector == _GENERAL_PROTECTION else None, 0)
            context.state.rip -= length
            engine.core.sync_out()
        except BaseException as error:
            engine.fail(error)


def syscall(state: EnvState, return_rip: int) -> int | None:
    """SYSCALL with the next instruction at ``return_rip``."""
    if not state.long_mode or not state.efer & _SCE:
        return _INVALID_OPCODE
    q = state.q
    flags = state.rflags & ~_RF
    star = q[Env.STAR >> 3]
    q[Reg.RCX] = return_rip
    q[Reg.R11] = flags
    _enter(state, star >> 32 & 0xFFFC, _CODE64, flags & ~q[Env.FMASK >> 3], q[Env.LSTAR >> 3])
    return None


def sysenter(state: EnvState) -> int | None:
    """SYSENTER."""
    q = state.q
    selector = q[MSRS[0x174] >> 3] & 0xFFFC
    if not state.cr0 & 1 or not selector:
        return _GENERAL_PROTECTION
    long = state.efer & _LMA
    width = (1 << 64) - 1 if long else 0xFFFF_FFFF
    q[Reg.RSP] = q[MSRS[0x175] >> 3] & width
    flags = state.rflags & ~(_IF | _RF | _VM)
    _enter(state, selector, _CODE64 if long else _CODE32, flags, q[MSRS[0x176] >> 3] & width)
    return None


def _enter(state: EnvState, selector: int, code: int, flags: int, rip: int) -> None:
    """Flat segments at CPL 0; the stack's selector follows the code's."""
    state.set_segment(Seg.CS, Segment(selector, 0, _LIMIT, code))
    state.set_segment(Seg.SS, Segment(selector + 8, 0, _LIMIT, _DATA))
    state.rflags = flags
    state.interrupt_shadow = False
    state.rip = rip
