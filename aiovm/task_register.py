"""What hangs on the task register: loading it, and the I/O permission bitmap (SDM vol. 2A, LTR; vol. 1, 19.5.2).

The core checks no I/O permission, and aborts on a task register that it loaded from a null selector; so both are here.

Rules: outside CPL 0 (CPL above IOPL) or in virtual-8086 mode a port needs a clear bit in the bitmap of a 32-bit
task-state segment, one bit a byte of the access; the processor reads two bytes, and both must lie in the segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.descriptor_tables import system_segment
from aiovm.engine.base import Seg
from aiovm.page_walk import PagingRegs
from aiovm.segmentation import Fault, read_system, write_system

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["io_permitted", "load_tr"]

_LMA: Final = 1 << 10
_VM: Final = 1 << 17
_BITMAP_AT: Final = 0x66


def io_permitted(cpu: CpuState, memory: GuestMemory, port: int, size: int) -> bool:
    """Whether ``size`` ports from ``port`` on may be touched now. A page fault on the way counts as no."""
    rflags = cpu.rflags
    if not cpu.cr0 & 1 or (cpu.cpl <= (rflags >> 12 & 3) and not rflags & _VM):
        return True
    tr = cpu.segment(Seg.TR)
    if not tr.type & 8 or tr.limit < _BITMAP_AT + 1:
        return False
    regs = PagingRegs.of(cpu)
    base = read_system(memory, regs, tr.base + _BITMAP_AT, 2)
    if isinstance(base, Fault):
        return False
    at = base + (port >> 3)
    if at + 1 > tr.limit:
        return False
    bits = read_system(memory, regs, tr.base + at, 2)
    return not isinstance(bits, Fault) and not bits >> (port & 7) & (1 << size) - 1


def load_tr(cpu: CpuState, memory: GuestMemory, selector: int) -> Fault | None:
    """LTR in protected mode at CPL 0: an available task-state segment of the GDT, which becomes busy."""
    if not selector & 0xFFFC:
        return Fault(13, 0)
    regs = PagingRegs.of(cpu)
    segment = system_segment(cpu, memory, regs, selector, (9,) if regs.efer & _LMA else (1, 9))
    if isinstance(segment, Fault):
        return segment
    at = cpu.gdt.base + (selector & 0xFFF8)
    fault = write_system(memory, regs, at + 5, bytes((segment.flags >> 8 & 0xFF | 2,)), 1)
    if fault is None:
        cpu.set_segment(Seg.TR, segment._replace(flags=segment.flags | 0x200))
    return fault
