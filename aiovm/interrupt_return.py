"""IRET in long mode, as the processor does it (SDM vol. 2A, IRET; vol. 3A, 6.14.3).

The core executes IRET by itself, but when it leaves for an outer level it clears the bases of FS and GS together with
selectors that the new level may not have. A processor clears the selector alone: so a kernel whose FS or GS names a
segment of its own, and whose base comes from an MSR, has its IRET done here (:mod:`aiovm.engine.unicorn.intercepts`).

Rules: all checks come first; when a :class:`~aiovm.segmentation.Fault` is answered no register has changed. In 64-bit
mode SS:RSP is always popped. Modelled: returns to 64-bit and compatibility mode, to the same and to outer levels, the
flags that each level may change, the end of the NMI mask. Not modelled: stacks on devices, which read as all ones, and
shadow stacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg, Seg, Segment
from aiovm.mmu import read_virt
from aiovm.page_walk import PageFault, PagingRegs, is_canonical
from aiovm.segmentation import Fault, load_code, load_stack, page_fault

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["interrupt_return", "loses_selector"]

_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF
_NT: Final = 1 << 14
_IF, _IOPL = 1 << 9, 3 << 12
#: CF PF AF ZF SF TF DF OF NT; then RF AC ID, which 16 bits do not reach.
_ALWAYS: Final = 0x4DD5
_WIDE: Final = 0x25_0000


def loses_selector(segment: Segment, cpl: int) -> bool:
    """Whether a return to ``cpl`` takes the segment's selector: data or non-conforming code of an inner level."""
    return bool(segment.selector & 0xFFFC) and segment.dpl < cpl and segment.flags & 0xC00 != 0xC00


def interrupt_return(cpu: CpuState, memory: GuestMemory, width: int) -> Fault | None:
    """IRET with an operand size of ``width`` bytes."""
    regs = PagingRegs.of(cpu)
    old_flags = regs.rflags
    if old_flags & _NT:
        return Fault(13, 0)
    cpl, wide_stack = regs.cpl, cpu.long_mode
    popped = _pop(cpu, memory, regs, 3, 0, width)
    if isinstance(popped, Fault):
        return popped
    rip, cs_selector, flags = popped
    cs_selector &= 0xFFFF
    rpl = cs_selector & 3
    if not cs_selector & 0xFFFC or rpl < cpl:
        return Fault(13, cs_selector & 0xFFFC)
    cs = load_code(cpu, memory, regs, cs_selector, 13, 0)
    if isinstance(cs, Fault):
        return cs
    rest: tuple[int, ...] = ()
    if rpl > cpl or wide_stack:
        popped = _pop(cpu, memory, regs, 2, 3, width)
        if isinstance(popped, Fault):
            return popped
        rest = popped
    if not (is_canonical(rip) if cs.long else rip <= cs.limit):
        return Fault(13, 0)
    ss = _stack(cpu, memory, regs, rest[1] & 0xFFFF, rpl, long=cs.long) if rest else None
    if isinstance(ss, Fault):
        return ss

    # From here on nothing refuses.
    size_mask = (1 << 8 * width) - 1
    change = _ALWAYS if width == 2 else _ALWAYS | _WIDE
    if cpl <= old_flags >> 12 & 3:
        change |= _IF
    if cpl == 0:
        change |= _IOPL
    if ss is None:
        mask = _M32 if cpu.segment(Seg.SS).default_big else 0xFFFF
        old = cpu.gpr[Reg.RSP]
        cpu.gpr[Reg.RSP] = old & ~mask | old + 3 * width & mask
    else:
        cpu.set_segment(Seg.SS, ss)
        mask = _M64 if cs.long or ss.default_big else 0xFFFF
        cpu.gpr[Reg.RSP] = cpu.gpr[Reg.RSP] & ~mask | rest[0] & mask & size_mask
    cpu.set_segment(Seg.CS, cs)
    cpu.rip = rip
    cpu.cpl = rpl
    if rpl > cpl:
        for which in (Seg.ES, Seg.FS, Seg.GS, Seg.DS):
            segment = cpu.segment(which)
            if loses_selector(segment, rpl):
                base = segment.base if which in (Seg.FS, Seg.GS) else 0
                cpu.set_segment(which, Segment(0, base, 0, 0))
    cpu.rflags = old_flags & ~change | flags & change
    cpu.interrupt_shadow = False
    cpu.nmi_masked = False
    return None


def _pop(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, count: int, skip: int, width: int
) -> tuple[int, ...] | Fault:
    """``count`` words of the stack above the first ``skip``."""
    ss = cpu.segment(Seg.SS)
    values = []
    for index in range(skip, skip + count):
        offset = cpu.gpr[Reg.RSP] + index * width
        if cpu.long_mode:
            address = offset & _M64
            if not is_canonical(address) or not is_canonical(address + width - 1):
                return Fault(12, 0)
        else:
            address = (offset & (_M32 if ss.default_big else 0xFFFF)) + ss.base & _M32
        data = read_virt(memory, regs, address, width, regs.data_access())
        if isinstance(data, PageFault):
            return page_fault(data)
        values.append(int.from_bytes(data, "little") if isinstance(data, bytes) else (1 << 8 * width) - 1)
    return tuple(values)


def _stack(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, cpl: int, *, long: bool
) -> Segment | Fault:
    if selector & 0xFFFC:
        return load_stack(cpu, memory, regs, selector, cpl, 13, 0)
    # The core lets MOV load a null SS of any RPL, so that one may stand in a frame; the manual wants the new CPL.
    return Segment(selector, 0, 0, cpl << 13) if long and cpl < 3 else Fault(13, 0)
