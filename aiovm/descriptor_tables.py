"""LLDT, LGDT and LIDT (SDM vol. 2A): the core takes bases that are not canonical, so they are checked here.

Rules: LLDT takes a local descriptor table's entry of the GDT, 16 bytes long in long mode; a null selector leaves no
table. Bases must be canonical in long mode, else #GP with the selector, or with 0 for LGDT and LIDT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.page_walk import PagingRegs, is_canonical
from aiovm.segmentation import Fault, load_descriptor, read_system, segment_of

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["load_ldt", "load_table", "system_segment"]

_LMA: Final = 1 << 10
_LDT: Final = 2


def system_segment(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, types: tuple[int, ...]
) -> Segment | Fault:
    """The system segment of one of ``types`` that ``selector`` names in the GDT, as LLDT and LTR check it."""
    name = selector & 0xFFFC
    long = regs.efer & _LMA
    if selector & 4 or (selector & 0xFFF8) + (15 if long else 7) > cpu.gdt.limit:
        return Fault(13, name)
    descriptor = load_descriptor(cpu, memory, regs, selector, 13, 0)
    if isinstance(descriptor, Fault):
        return descriptor
    if descriptor >> 40 & 0x1F not in types:
        return Fault(13, name)
    if not descriptor & 1 << 47:
        return Fault(11, name)
    segment = segment_of(selector, descriptor)
    if not long:
        return segment
    upper = read_system(memory, regs, cpu.gdt.base + (selector & 0xFFF8) + 8, 8)
    if isinstance(upper, Fault):
        return upper
    base = segment.base | (upper & 0xFFFF_FFFF) << 32
    if upper >> 40 & 0x1F or not is_canonical(base):
        return Fault(13, name)
    return segment._replace(base=base)


def load_ldt(cpu: CpuState, memory: GuestMemory, selector: int) -> Fault | None:
    """LLDT at CPL 0 of protected mode."""
    if not selector & 0xFFFC:
        cpu.set_segment(Seg.LDTR, Segment(selector, 0, 0, 0))
        return None
    segment = system_segment(cpu, memory, PagingRegs.of(cpu), selector, (_LDT,))
    if isinstance(segment, Fault):
        return segment
    cpu.set_segment(Seg.LDTR, segment)
    return None


def load_table(cpu: CpuState, table: DescriptorTable, *, interrupts: bool) -> Fault | None:
    """LIDT if ``interrupts``, else LGDT."""
    if cpu.long_mode and not is_canonical(table.base):
        return Fault(13, 0)
    if interrupts:
        cpu.idt = table
    else:
        cpu.gdt = table
    return None
