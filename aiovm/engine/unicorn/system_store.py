"""SGDT, SIDT, SLDT, STR and SMSW: stores of system registers, answered here (SDM vol. 2A and 2B; UMIP: vol. 3A, 2.5).

Rules:

* With CR4.UMIP they are #GP(0) outside CPL 0.
* SGDT and SIDT store the limit in two bytes, then the base: eight bytes in 64-bit mode, else four, of which an operand
  size of 16 bits keeps three.
* The others store 16 bits to memory. To a register they store as wide as the operand size says: selectors are extended
  with zeros, and SMSW stores all of CR0, as processors do (the manual leaves the upper half undefined).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Seg
from aiovm.engine.unicorn.operand import store_operand

if TYPE_CHECKING:
    from aiovm.engine.unicorn.context import UnicornContext
    from aiovm.engine.unicorn.decode import Instruction
    from aiovm.engine.unicorn.state import EnvState
    from aiovm.memory import GuestMemory

__all__ = ["store_register", "store_system"]

_UMIP: Final = 1 << 11
#: The opcode with ModRM.reg's low bits, for those that store a word.
_SLDT, _STR, _SMSW = (0x0F00, 0), (0x0F00, 1), (0x0F01, 4)
_SGDT: Final = (0x0F01, 0)


def store_system(context: UnicornContext, memory: GuestMemory, insn: Instruction) -> bool:
    """Carry out ``insn``; whether it was done, or its fault was raised."""
    state, port = context.state, context.port
    if state.cr4 & _UMIP and state.cpl:
        port.on_exception(13, 0, 0)
        return False
    which = insn.opcode, insn.reg & 7
    if which in (_SLDT, _STR, _SMSW):
        value = state.cr0 if which == _SMSW else state.segment(Seg.LDTR if which == _SLDT else Seg.TR).selector
        if insn.is_register:
            store_register(state, insn.rm, value, insn.operand_size)
            return True
        pieces = [value.to_bytes(8, "little")[:2]]
    else:
        base, limit = state.gdt if which == _SGDT else state.idt
        width = 8 if state.long_mode else 4
        if insn.operand_size == 2 and width == 4:
            base &= 0xFF_FFFF
        pieces = [limit.to_bytes(2, "little"), base.to_bytes(8, "little")[:width]]
    return store_operand(context, memory, insn, *pieces)


def store_register(state: EnvState, register: int, value: int, size: int) -> None:
    """``size`` bytes: a word keeps the register's upper bits, a doubleword clears them."""
    if size == 2:
        value = state.gpr[register] & ~0xFFFF | value & 0xFFFF
    state.gpr[register] = value
