"""Memory operands of the instructions that are answered outside the core, with the faults that reaching them raises.

An address that is not canonical is #GP(0), or #SS(0) where the stack segment is meant (SDM vol. 3A, 6.15); then comes
the page walk. Where no memory is, the device is asked; nothing goes to the embedding program's own devices, which
cannot be waited for here: they read all ones. Segment limits are not checked, as in the core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg, Seg
from aiovm.engine.unicorn.decode import effective_address
from aiovm.mmu import IoNeeded, read_virt_u, write_virt
from aiovm.page_walk import PageFault, PagingRegs, is_canonical

if TYPE_CHECKING:
    from aiovm.engine.unicorn.context import UnicornContext
    from aiovm.engine.unicorn.decode import Instruction
    from aiovm.memory import GuestMemory

__all__ = ["load_operand", "store_operand"]

_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF


def _address(context: UnicornContext, insn: Instruction, offset: int, size: int) -> int | None:
    """The linear address ``offset`` bytes into the operand; None: its fault was raised."""
    state = context.state
    linear = effective_address(state, insn) + offset
    if not state.long_mode:
        return linear & _M32
    linear &= _M64
    if is_canonical(linear) and is_canonical(linear + size - 1 & _M64):
        return linear
    stack = insn.segment is Seg.SS or (insn.segment is None and insn.base in (Reg.RSP, Reg.RBP))
    context.port.on_exception(12 if stack else 13, 0, 0)
    return None


def load_operand(
    context: UnicornContext, memory: GuestMemory, insn: Instruction, size: int, *, offset: int = 0
) -> int | None:
    """``size`` bytes, ``offset`` bytes into the operand; None: its fault was raised."""
    address = _address(context, insn, offset, size)
    if address is None:
        return None
    port, regs = context.port, PagingRegs.of(context.state)
    value = read_virt_u(memory, regs, address, size, regs.data_access())
    if isinstance(value, PageFault):
        port.on_exception(14, value.error_code, value.address)
        return None
    if isinstance(value, IoNeeded):
        ones = (1 << 8 * size) - 1
        return ones if port.is_users(value.gpa, size) else port.on_mmio_read(value.gpa, size) & ones
    return value


def store_operand(context: UnicornContext, memory: GuestMemory, insn: Instruction, *pieces: bytes) -> bool:
    """Store ``pieces`` one behind the other, a device's each by itself; whether it was done, else its fault came."""
    data = b"".join(pieces)
    address = _address(context, insn, 0, len(data))
    if address is None:
        return False
    regs = PagingRegs.of(context.state)
    refused = write_virt(memory, regs, address, data, regs.data_access(write=True))
    if isinstance(refused, PageFault):
        context.port.on_exception(14, refused.error_code, refused.address)
        return False
    if isinstance(refused, IoNeeded):
        gpa = refused.gpa
        for piece in pieces:
            context.port.on_mmio_write(gpa, len(piece), int.from_bytes(piece, "little"))
            gpa += len(piece)
    return True
