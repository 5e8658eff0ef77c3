"""The hardware task switch through a task gate (SDM vol. 3A, chapter 7).

An event whose gate is a task gate enters a whole new context: the outgoing task's registers go to its task-state
segment, the incoming task's come from its own, the two are linked (previous-task link, NT) and both stay busy.

Rules:

* Everything that can refuse the switch itself is checked first, and no register changes then.
* Past that point the incoming task's segments are loaded one by one; a fault among them (SDM vol. 3A, table 7-1:
  #TS, #NP, #SS) is the new task's, with its own CS:EIP to return to.
* As in KVM's emulator, CR3 comes with a 32-bit task-state segment, a 16-bit one zero-extends the registers and leaves
  FS and GS, and the local breakpoint enables of DR7 (bits 8, 6, 4, 2, 0) are cleared.

Modelled: 16- and 32-bit task-state segments, also one to the other, and into virtual-8086 tasks. Not modelled: the
debug trap (T) bit, task switches by CALL, JMP and IRET.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg, Seg, Segment
from aiovm.mmu import IoNeeded, read_virt
from aiovm.page_walk import Access, PageFault, PagingRegs, load_pdptrs
from aiovm.segmentation import (
    Fault,
    load_code,
    load_descriptor,
    load_stack,
    mark_accessed,
    page_fault,
    push_frame,
    segment_of,
    write_system,
)

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["switch_task"]

_IMPLICIT: Final = int(Access.IMPLICIT)
_M32: Final = 0xFFFF_FFFF
_CR0_TS: Final = 1 << 3
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_NT: Final = 1 << 14
_VM: Final = 1 << 17
_DR7_LOCAL: Final = 0x155

#: EIP, EFLAGS, eight registers, then the selectors in the order of ``_SELECTORS``, then LDTR; and where they start.
_WIDE: Final = struct.Struct("<10I7I")
_WIDE_SAVED: Final = struct.Struct("<10I6I")
_WIDE_AT: Final = 0x20
_CR3_AT: Final = 0x1C
_NARROW: Final = struct.Struct("<10H5H")
_NARROW_SAVED: Final = struct.Struct("<10H4H")
_NARROW_AT: Final = 0x0E
_SELECTORS: Final = (Seg.ES, Seg.CS, Seg.SS, Seg.DS, Seg.FS, Seg.GS)


def switch_task(
    cpu: CpuState,
    memory: GuestMemory,
    regs: PagingRegs,
    selector: int,
    ext: int,
    rip: int,
    rflags: int,
    error_code: int | None,
) -> Fault | None:
    """Enter the task that a gate's ``selector`` names; ``rip`` and ``rflags`` are saved for the outgoing one."""
    name = selector & 0xFFFC | ext
    if selector & 4:
        return Fault(13, name)
    descriptor = load_descriptor(cpu, memory, regs, selector, 13, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    type_ = descriptor >> 40 & 0x1F
    if not selector & 0xFFF8 or type_ not in (1, 9):  # an available task-state segment
        return Fault(13, name)
    if not descriptor & 1 << 47:
        return Fault(11, name)
    wide = type_ == 9
    size = 0x68 if wide else 0x2C
    incoming = segment_of(selector, descriptor)
    if incoming.limit < size - 1:
        return Fault(10, name)
    image = read_virt(memory, regs, incoming.base, size, _IMPLICIT)
    if isinstance(image, PageFault):
        return page_fault(image)
    if isinstance(image, IoNeeded):
        image = b"\xff" * size
    cr3 = int.from_bytes(image[_CR3_AT : _CR3_AT + 4], "little") if wide else regs.cr3
    if wide and regs.cr0 & _CR0_PG and regs.cr4 & _CR4_PAE and load_pdptrs(memory, cr3, regs.maxphyaddr) is None:
        return Fault(13, 0)
    fault = _link(cpu, memory, regs, incoming, descriptor, rip, rflags)
    if fault is not None:
        return fault

    # From here on the incoming task runs.
    cpu.set_segment(Seg.TR, incoming._replace(flags=incoming.flags | 0x200))
    cpu.cr0 |= _CR0_TS
    cpu.set_dr(7, cpu.get_dr(7) & ~_DR7_LOCAL)
    if wide:
        cpu.cr3 = cr3
        eip, eflags, *rest = _WIDE.unpack_from(image, _WIDE_AT)
    else:
        eip, eflags, *rest = _NARROW.unpack_from(image, _NARROW_AT)
    for register in range(8):
        cpu.gpr[register] = rest[register]
    ldt, *selectors = rest[-1], *(value & 0xFFFF for value in rest[8:-1])
    cpu.rip = eip
    cpu.rflags = eflags | 2 | _NT
    fault = _load_segments(cpu, memory, ldt & 0xFFFF, selectors, ext)
    if fault is not None:
        return fault
    if error_code is not None:
        ss = cpu.segment(Seg.SS)
        esp = push_frame(memory, PagingRegs.of(cpu), ss, cpu.gpr[Reg.RSP] & _M32, [error_code], 4 if wide else 2, ext)
        if isinstance(esp, Fault):
            return esp
        cpu.gpr[Reg.RSP] = esp
    return Fault(13, ext) if eip > cpu.segment(Seg.CS).limit else None


def _link(
    cpu: CpuState,
    memory: GuestMemory,
    regs: PagingRegs,
    incoming: Segment,
    descriptor: int,
    rip: int,
    rflags: int,
) -> Fault | None:
    """Save the outgoing task, point back to it, and mark the incoming one busy."""
    tr = cpu.segment(Seg.TR)
    registers = [cpu.gpr[register] for register in range(8)]
    selectors = [cpu.segment(which).selector for which in _SELECTORS]
    if tr.type & 8:
        words = [value & _M32 for value in (rip, rflags, *registers)]
        saved, at, width = _WIDE_SAVED.pack(*words, *selectors), _WIDE_AT, 4
    else:
        words = [value & 0xFFFF for value in (rip, rflags, *registers)]
        saved, at, width = _NARROW_SAVED.pack(*words, *selectors[:4]), _NARROW_AT, 2
    busy = bytes((descriptor >> 40 & 0xFF | 2,))
    return (
        write_system(memory, regs, tr.base + at, saved, width)
        or write_system(memory, regs, incoming.base, tr.selector.to_bytes(2, "little"), 2)
        or write_system(memory, regs, cpu.gdt.base + (incoming.selector & 0xFFF8) + 5, busy, 1)
    )


def _load_segments(cpu: CpuState, memory: GuestMemory, ldt: int, selectors: list[int], ext: int) -> Fault | None:
    """Load LDTR, then the others; the selectors are visible at once, so that a fault finds them."""
    pairs = list(zip(_SELECTORS, selectors, strict=False))
    for which, selector in pairs:
        cpu.set_segment(which, cpu.segment(which)._replace(selector=selector))
    cpl = 3 if cpu.rflags & _VM else selectors[1] & 3
    cpu.cpl = cpl
    regs = PagingRegs.of(cpu)
    fault = _load_ldt(cpu, memory, regs, ldt, ext)
    if fault is not None:
        return fault
    if cpu.rflags & _VM:
        for which, selector in pairs:
            cpu.set_segment(which, Segment(selector, selector << 4, 0xFFFF, 0xF300))
        cpu.cpl = cpl
        return None
    for which, selector in sorted(pairs, key=lambda pair: (pair[0] != Seg.CS, pair[0] != Seg.SS)):
        loaded = _load_segment(cpu, memory, regs, which, selector, cpl, ext)
        if isinstance(loaded, Fault):
            return loaded
        cpu.set_segment(which, loaded)
    cpu.cpl = cpl
    return None


def _load_ldt(cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, ext: int) -> Fault | None:
    cpu.set_segment(Seg.LDTR, Segment(selector, 0, 0, 0))
    if not selector & 0xFFFC:
        return None
    name = selector & 0xFFFC | ext
    if selector & 4:
        return Fault(10, name)
    descriptor = load_descriptor(cpu, memory, regs, selector, 10, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    if descriptor >> 40 & 0x1F != 2 or not descriptor & 1 << 47:
        return Fault(10, name)
    cpu.set_segment(Seg.LDTR, segment_of(selector, descriptor))
    return None


def _load_segment(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, which: Seg, selector: int, cpl: int, ext: int
) -> Segment | Fault:
    """One segment register as a task switch checks it (SDM vol. 3A, table 7-1)."""
    name = selector & 0xFFFC | ext
    if not selector & 0xFFFC:
        return Fault(10, name) if which in (Seg.CS, Seg.SS) else Segment(selector, 0, 0, 0)
    if which == Seg.CS:
        return load_code(cpu, memory, regs, selector, 10, ext)
    if which == Seg.SS:
        return load_stack(cpu, memory, regs, selector, cpl, 10, ext)
    descriptor = load_descriptor(cpu, memory, regs, selector, 10, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    flags = descriptor >> 32
    code, conforming, readable = flags & 0x800, flags & 0x400, flags & 0x200
    fits = (code and conforming) or flags >> 13 & 3 >= max(cpl, selector & 3)
    if not flags & 0x1000 or (code and not readable) or not fits:
        return Fault(10, name)
    if not flags & 0x8000:
        return Fault(11, name)
    marked = mark_accessed(cpu, memory, regs, selector, descriptor)
    return marked if isinstance(marked, Fault) else segment_of(selector, marked)
