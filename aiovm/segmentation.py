"""Segments in protected mode: descriptors, limits, stacks (SDM vol. 3A, chapters 3, 5 and 6).

Descriptor tables, task-state segments and the frames of event delivery are reached by *implicit supervisor*
accesses (4.6.1): CPL does not matter and EFLAGS.AC does not open user pages. A failure is a :class:`Fault`, a value.
A table that lies where no memory is reads all ones, and stores there are dropped, as on a bus that nobody drives.

Modelled: GDT and LDT, expand-down limits, 16- and 32-bit stack pointers, Accessed bits. Not modelled: devices behind
descriptor tables or stacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.engine.base import Seg, Segment
from aiovm.mmu import read_virt_u, write_virt
from aiovm.page_walk import Access, PageFault, walk

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory
    from aiovm.page_walk import PagingRegs

__all__ = [
    "Fault",
    "in_limit",
    "load_code",
    "load_descriptor",
    "load_stack",
    "mark_accessed",
    "page_fault",
    "push_frame",
    "read_system",
    "segment_of",
    "write_system",
]

_LDTR: Final = Seg.LDTR
_IMPLICIT: Final = int(Access.IMPLICIT)
_IMPLICIT_WRITE: Final = Access.IMPLICIT | Access.WRITE
_LMA: Final = 1 << 10
_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Fault(NamedTuple):
    """An exception: vector, error code where it has one, CR2's new value for #PF (14)."""

    vector: int
    error_code: int | None = None
    cr2: int = 0


def page_fault(fault: PageFault) -> Fault:
    """The #PF of a failed walk."""
    return Fault(14, fault.error_code, fault.address)


def read_system(memory: GuestMemory, regs: PagingRegs, gva: int, length: int) -> int | Fault:
    """A little-endian integer of a descriptor table or task-state segment."""
    value = read_virt_u(memory, regs, gva & _M64, length, _IMPLICIT)
    if isinstance(value, int):
        return value
    return page_fault(value) if isinstance(value, PageFault) else (1 << 8 * length) - 1


def write_system(memory: GuestMemory, regs: PagingRegs, gva: int, data: bytes, width: int) -> Fault | None:
    """Store ``data``, made of items of ``width`` bytes that are pushed from the top: that order finds the fault."""
    gva &= _M64
    refused = write_virt(memory, regs, gva, data, _IMPLICIT_WRITE)
    if not isinstance(refused, PageFault):
        return None
    for at in range(gva + len(data) - width, gva, -width):
        found = walk(memory, regs, at & _M64, _IMPLICIT_WRITE)
        if isinstance(found, PageFault):
            return page_fault(found)
    return page_fault(refused)


def load_descriptor(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, vector: int, ext: int
) -> int | Fault:
    """The 8-byte descriptor that ``selector`` names; outside its table: ``vector`` with the selector and ``ext``."""
    if selector & 4:
        ldt = cpu.segment(_LDTR)
        base, limit = ldt.base, ldt.limit if ldt.selector & 0xFFFC else -1
    else:
        base, limit = cpu.gdt
    if selector | 7 > limit:
        return Fault(vector, selector & 0xFFFC | ext)
    return read_system(memory, regs, base + (selector & 0xFFF8), 8)


def segment_of(selector: int, descriptor: int) -> Segment:
    """The segment register that ``descriptor`` makes (SDM vol. 3A, 3.4.5)."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
    if descriptor & 1 << 55:
        limit = limit << 12 | 0xFFF
    base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000
    return Segment(selector, base, limit, descriptor >> 32 & 0x00F0_FF00)


def mark_accessed(cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, descriptor: int) -> int | Fault:
    """``descriptor`` with its Accessed bit, which is set in memory too."""
    if descriptor & 1 << 40:
        return descriptor
    descriptor |= 1 << 40
    table = cpu.segment(_LDTR).base if selector & 4 else cpu.gdt.base
    at = table + (selector & 0xFFF8) + 5
    return write_system(memory, regs, at, bytes((descriptor >> 40 & 0xFF,)), 1) or descriptor


def load_code(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, vector: int, ext: int
) -> Segment | Fault:
    """CS whose selector's RPL becomes the privilege level: by IRET, in task switches (SDM vol. 2A, IRET; vol. 3A, 7.3).

    What does not fit is ``vector`` with the selector and ``ext``; null selectors are the caller's."""
    name = selector & 0xFFFC | ext
    descriptor = load_descriptor(cpu, memory, regs, selector, vector, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    flags, rpl = descriptor >> 32, selector & 3
    dpl = flags >> 13 & 3
    fits = dpl <= rpl if flags & 0x400 else dpl == rpl
    if flags & 0x1800 != 0x1800 or not fits or (regs.efer & _LMA and flags & 0x60_0000 == 0x60_0000):  # L with D
        return Fault(vector, name)
    if not flags & 0x8000:
        return Fault(11, name)
    marked = mark_accessed(cpu, memory, regs, selector, descriptor)
    return marked if isinstance(marked, Fault) else segment_of(selector, marked)


def load_stack(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, cpl: int, vector: int, ext: int
) -> Segment | Fault:
    """SS for code that will run at ``cpl``: writable data of just that level. Refusals as :func:`load_code`'s."""
    name = selector & 0xFFFC | ext
    descriptor = load_descriptor(cpu, memory, regs, selector, vector, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    flags = descriptor >> 32
    if flags & 0x1A00 != 0x1200 or flags >> 13 & 3 != cpl or selector & 3 != cpl:
        return Fault(vector, name)
    if not flags & 0x8000:
        return Fault(12, name)
    marked = mark_accessed(cpu, memory, regs, selector, descriptor)
    return marked if isinstance(marked, Fault) else segment_of(selector, marked)


def in_limit(segment: Segment, offset: int, size: int) -> bool:
    """Whether ``size`` bytes at ``offset`` lie in the segment (SDM vol. 3A, 5.3)."""
    if segment.flags & 0xC00 == 0x400:  # data that expands down
        top = _M32 if segment.default_big else 0xFFFF
        return offset > segment.limit and offset + size - 1 <= top
    return offset + size - 1 <= segment.limit


def push_frame(
    memory: GuestMemory,
    regs: PagingRegs,
    ss: Segment,
    esp: int,
    values: list[int],
    width: int,
    ss_error: int | None,
) -> int | Fault:
    """Push ``values`` in order, ``width`` bytes each; the new ESP, or #SS with ``ss_error``, or #PF.

    The whole frame must fit the segment before anything is stored. A 16-bit stack pointer wraps and keeps ESP's
    upper half.
    """
    mask = _M32 if ss.default_big else 0xFFFF
    size = width * len(values)
    offsets = [esp - width * (n + 1) & mask for n in range(len(values))]
    if not all(in_limit(ss, offset, width) for offset in offsets):
        return Fault(12, ss_error)
    low = offsets[-1]
    cut = (1 << 8 * width) - 1
    items = [(value & cut).to_bytes(width, "little") for value in values]
    if (esp & mask) >= size:
        fault = write_system(memory, regs, ss.base + low & _M32, b"".join(reversed(items)), width)
        if fault is not None:
            return fault
    else:
        for offset, item in zip(offsets, items, strict=True):
            fault = write_system(memory, regs, ss.base + offset & _M32, item, width)
            if fault is not None:
                return fault
    return esp & ~mask | low
