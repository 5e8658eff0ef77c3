"""Delivering an event to its handler, as the processor does, in every mode (SDM vol. 3A, chapter 6; vol. 2A, INT n).

Ways in: the IVT (real mode; vol. 3B, 21.1.4), interrupt, trap and task gates of 16 and 32 bits, also out of
virtual-8086 mode (21.3), and the 16-byte gates of long mode with IST (6.14). Tables, task-state segments and frames
are reached through the page walker as implicit supervisor accesses.

Rules:

* All checks and pushes come first: when :func:`deliver` answers with a :class:`~aiovm.segmentation.Fault`, no
  register has changed (but for a task switch past its point of no return: the fault belongs to the new task).
* The fault's error code has EXT set unless the event was the program's own INT n, INT3 or INTO.
* RFLAGS as pushed has RF set for fault-class exceptions (all but 1, 3, 4, 8, 18; KVM ``exception_type``) and clear for
  software events. Entering #DB's handler clears DR7.GD.
* :func:`deliver_event` goes on with the fault, combined by :func:`aiovm.events.combine`, until something is delivered
  or the machine shuts down.

A kernel of 64 bits whose tables are in order gets its events from the engine instead, where that can
(:meth:`aiovm.engine.base.Context.deliver`): to the same last bit.

Modelled also: Accessed bits of CS and SS, the interrupt shadow's end. Not modelled: virtual-8086 mode extensions
(CR4.VME), shadow stacks, FRED, user interrupts; PDPTEs are read from memory.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Reg, Seg, Segment
from aiovm.events import EventKind, combine
from aiovm.page_walk import PagingRegs, is_canonical
from aiovm.segmentation import (
    Fault,
    load_descriptor,
    load_stack,
    mark_accessed,
    push_frame,
    read_system,
    segment_of,
    write_system,
)
from aiovm.task_switch import switch_task

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["SHUTDOWN", "deliver", "deliver_event"]

#: The answer of :func:`deliver_event` when a fault struck #DF's delivery (SDM vol. 3A, 6.15).
SHUTDOWN: Final = -1

_PE: Final = 1
_LMA: Final = 1 << 10
_TF: Final = 1 << 8
_IF: Final = 1 << 9
_NT: Final = 1 << 14
_RF: Final = 1 << 16
_VM: Final = 1 << 17
_AC: Final = 1 << 18
#: What a gate leaves of RFLAGS.
_KEPT: Final = ~(_TF | _NT | _RF | _VM)
#: Members of enums are dear to look up.
_RSP: Final = int(Reg.RSP)
_ES, _CS, _SS, _DS, _FS, _GS, _TR = Seg.ES, Seg.CS, Seg.SS, Seg.DS, Seg.FS, Seg.GS, Seg.TR
_DR7_GD: Final = 1 << 13
_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF

_NOT_FAULTS: Final = frozenset({1, 3, 4, 8, 18})
_EXCEPTION: Final = int(EventKind.EXCEPTION)
_SOFT_INT: Final = int(EventKind.SOFT_INT)
_ICEBP: Final = int(EventKind.ICEBP)
_SOFTWARE: Final = 4  # the bit of EventKind
_NULL: Final = Segment(0, 0, 0, 0)
_FRAME: Final = struct.Struct("<5Q")
_FRAME_WITH_ERROR: Final = struct.Struct("<6Q")


def deliver(
    cpu: CpuState,
    memory: GuestMemory,
    vector: int,
    kind: EventKind,
    error_code: int | None = None,
    return_rip: int | None = None,
) -> Fault | None:
    """Enter ``vector``'s handler; or answer the fault that doing so raised.

    ``return_rip``: what is pushed, by default RIP; for software events the address after the instruction.
    """
    kind_ = int(kind)
    rflags = cpu.rflags
    if kind_ == _EXCEPTION:
        if vector not in _NOT_FAULTS:
            rflags |= _RF
    elif kind_ & _SOFTWARE:
        rflags &= ~_RF
    asks = kind_ & 5 == 4
    rip = cpu.rip if return_rip is None else return_rip
    regs = PagingRegs.of(cpu)
    fault: Fault | None
    if regs.efer & _LMA:
        fault = _deliver_long(cpu, memory, regs, vector, error_code, asks, rip, rflags)
    elif not regs.cr0 & _PE:
        fault = _deliver_real(cpu, memory, regs, vector, rip, rflags)
    elif rflags & _VM and kind_ == _SOFT_INT and rflags >> 12 & 3 < 3:
        fault = Fault(13, 0)  # INT n in virtual-8086 mode needs IOPL 3
    else:
        fault = _deliver_protected(cpu, memory, regs, vector, error_code, asks, rip, rflags)
    if fault is None:
        if cpu.interrupt_shadow:
            cpu.interrupt_shadow = False
        if vector == 1 and kind_ in (_EXCEPTION, _ICEBP):
            cpu.set_dr(7, cpu.get_dr(7) & ~_DR7_GD)
    return fault


def deliver_event(
    cpu: CpuState,
    memory: GuestMemory,
    vector: int,
    kind: EventKind,
    error_code: int | None = None,
    return_rip: int | None = None,
) -> int:
    """Deliver, and whatever faults arise from it: the vector that reached its handler, or :data:`SHUTDOWN`.

    CR2 follows each page fault, delivered or not.
    """
    fault = deliver(cpu, memory, vector, kind, error_code, return_rip)
    if fault is None:
        return vector
    exception = vector if kind in (EventKind.EXCEPTION, EventKind.ICEBP, EventKind.SOFT_EXC) else None
    while fault is not None:
        if fault.vector == 14:
            cpu.cr2 = fault.cr2
        following = fault.vector if exception is None else combine(exception, fault.vector)
        if following is None:
            return SHUTDOWN
        vector = exception = following
        error_code = fault.error_code if following == fault.vector else 0
        fault = deliver(cpu, memory, vector, EventKind.EXCEPTION, error_code)
    return vector


# ---- real mode ---------------------------------------------------------------------------------------------------


def _deliver_real(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, vector: int, rip: int, rflags: int
) -> Fault | None:
    """Four bytes a vector, IP then CS; FLAGS, CS and IP are pushed. Faults have no error code here."""
    base, limit = cpu.idt
    at = vector * 4
    if at + 3 > limit:
        return Fault(13)
    entry = read_system(memory, regs, base + at, 4)
    if isinstance(entry, Fault):
        return entry
    cs = cpu.segment(_CS)
    frame = [rflags, cs.selector, rip]
    esp = push_frame(memory, regs, cpu.segment(_SS), cpu.gpr[_RSP] & _M32, frame, 2, None)
    if isinstance(esp, Fault):
        return esp
    cpu.gpr[_RSP] = esp
    cpu.set_segment(_CS, cs._replace(selector=entry >> 16, base=entry >> 16 << 4))
    cpu.rip = entry & 0xFFFF
    cpu.rflags = rflags & ~(_IF | _TF | _AC | _RF)
    return None


# ---- protected mode ----------------------------------------------------------------------------------------------


def _deliver_protected(
    cpu: CpuState,
    memory: GuestMemory,
    regs: PagingRegs,
    vector: int,
    error_code: int | None,
    asks_privilege: bool,
    rip: int,
    rflags: int,
) -> Fault | None:
    """Eight-byte gates of the IDT (SDM vol. 3A, 6.11 and 6.12)."""
    ext = 0 if asks_privilege else 1
    virtual = rflags & _VM
    cpl = 3 if virtual else regs.cpl
    base, limit = cpu.idt
    at = vector * 8
    if at + 7 > limit:
        return Fault(13, at | 2 | ext)
    gate = read_system(memory, regs, base + at, 8)
    if isinstance(gate, Fault):
        return gate
    type_ = gate >> 40 & 0x1F
    if type_ not in (0x5, 0x6, 0x7, 0xE, 0xF) or (asks_privilege and gate >> 45 & 3 < cpl):
        return Fault(13, at | 2 | ext)
    if not gate & 1 << 47:
        return Fault(11, at | 2 | ext)
    selector = gate >> 16 & 0xFFFF
    if type_ == 0x5:
        return switch_task(cpu, memory, regs, selector, ext, rip, rflags, error_code)

    descriptor = _handler_code(cpu, memory, regs, selector, cpl, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    dpl = descriptor >> 45 & 3
    inner = dpl < cpl and not descriptor & 1 << 42
    if virtual and (not inner or dpl):
        return Fault(13, selector & 0xFFFC | ext)

    esp = cpu.gpr[_RSP] & _M32
    frame = [rflags, cpu.segment(_CS).selector, rip]
    if inner:
        found = _inner_stack(cpu, memory, regs, dpl, ext)
        if isinstance(found, Fault):
            return found
        ss, new_esp = found
        frame[:0] = [cpu.segment(_SS).selector, esp]
        if virtual:
            frame[:0] = [cpu.segment(which).selector for which in (_GS, _FS, _DS, _ES)]
        ss_error = ss.selector & 0xFFFC | ext
    else:
        ss, new_esp, ss_error = cpu.segment(_SS), esp, ext
    if error_code is not None:
        frame.append(error_code)

    wide = type_ & 8
    target = gate & 0xFFFF | (gate >> 32 & 0xFFFF_0000 if wide else 0)
    cs = segment_of(selector & 0xFFFC | (dpl if inner else cpl), descriptor)
    if target > cs.limit:
        return Fault(13, ext)
    pushed = push_frame(memory, regs, ss, new_esp, frame, 4 if wide else 2, ss_error)
    if isinstance(pushed, Fault):
        return pushed

    rflags &= _KEPT
    cpu.rflags = rflags if type_ & 1 else rflags & ~_IF
    cpu.gpr[_RSP] = pushed
    cpu.rip = target
    cpu.set_segment(_CS, cs)
    if inner:
        cpu.set_segment(_SS, ss)
        if virtual:
            for which in (_ES, _DS, _FS, _GS):
                cpu.set_segment(which, _NULL)
        cpu.cpl = dpl
    return None


def _handler_code(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, selector: int, cpl: int, ext: int
) -> int | Fault:
    """The descriptor of a gate's code segment, checked but for its size, with Accessed set."""
    if not selector & 0xFFFC:
        return Fault(13, ext)
    descriptor = load_descriptor(cpu, memory, regs, selector, 13, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    if descriptor & 0x1800 << 32 != 0x1800 << 32 or descriptor >> 45 & 3 > cpl:
        return Fault(13, selector & 0xFFFC | ext)
    if regs.efer & _LMA and descriptor & 0x60_0000 << 32 != 0x20_0000 << 32:  # L set, D clear
        return Fault(13, selector & 0xFFFC | ext)
    if not descriptor & 1 << 47:
        return Fault(11, selector & 0xFFFC | ext)
    return mark_accessed(cpu, memory, regs, selector, descriptor)


def _inner_stack(
    cpu: CpuState, memory: GuestMemory, regs: PagingRegs, dpl: int, ext: int
) -> tuple[Segment, int] | Fault:
    """SS and ESP for privilege ``dpl`` from the task-state segment (SDM vol. 3A, 6.12.1)."""
    tr = cpu.segment(_TR)
    width = 4 if tr.type & 8 else 2
    at = width * (2 * dpl + 1)
    if at + width + 1 > tr.limit:
        return Fault(10, tr.selector & 0xFFFC | ext)
    pointer = read_system(memory, regs, tr.base + at, width + 2)
    if isinstance(pointer, Fault):
        return pointer
    esp, selector = pointer & (1 << 8 * width) - 1, pointer >> 8 * width
    if not selector & 0xFFFC:
        return Fault(10, ext)
    ss = load_stack(cpu, memory, regs, selector, dpl, 10, ext)
    return ss if isinstance(ss, Fault) else (ss, esp)


# ---- long mode ---------------------------------------------------------------------------------------------------


def _deliver_long(
    cpu: CpuState,
    memory: GuestMemory,
    regs: PagingRegs,
    vector: int,
    error_code: int | None,
    asks_privilege: bool,
    rip: int,
    rflags: int,
) -> Fault | None:
    """Sixteen-byte gates, 64-bit handlers, a frame that always holds SS:RSP (SDM vol. 3A, 6.14)."""
    ext = 0 if asks_privilege else 1
    cpl = regs.cpl
    base, limit = cpu.idt
    at = vector * 16
    if at + 15 > limit:
        return Fault(13, vector << 3 | 2 | ext)
    gate = read_system(memory, regs, base + at, 16)
    if isinstance(gate, Fault):
        return gate
    type_ = gate >> 40 & 0x1F
    if type_ & 0x1E != 0xE or (asks_privilege and gate >> 45 & 3 < cpl):
        return Fault(13, vector << 3 | 2 | ext)
    if not gate & 0x8000_0000_0000:
        return Fault(11, vector << 3 | 2 | ext)
    selector = gate >> 16 & 0xFFFF
    descriptor = _handler_code(cpu, memory, regs, selector, cpl, ext)
    if isinstance(descriptor, Fault):
        return descriptor
    dpl, ist = descriptor >> 45 & 3, gate >> 32 & 7
    inner = dpl < cpl and not descriptor & 1 << 42

    old_rsp = rsp = cpu.gpr[_RSP]
    if ist or inner:
        tr = cpu.segment(_TR)
        offset = 28 + 8 * ist if ist else 4 + 8 * dpl
        if offset + 7 > tr.limit:
            return Fault(10, tr.selector & 0xFFFC | ext)
        found = read_system(memory, regs, tr.base + offset, 8)
        if isinstance(found, Fault):
            return found
        rsp = found
    old_cs = cpu.segment(_CS)
    frame = rip, old_cs.selector, rflags, old_rsp, cpu.selector(_SS)
    data = _FRAME.pack(*frame) if error_code is None else _FRAME_WITH_ERROR.pack(error_code, *frame)
    top = rsp & ~0xF
    rsp = top - len(data) & _M64
    if not is_canonical(rsp) or not is_canonical(top - 1 & _M64):
        return Fault(12, ext)
    target = gate & 0xFFFF | gate >> 32 & 0xFFFF_FFFF_FFFF_0000
    if not is_canonical(target):
        return Fault(13, ext)
    fault = write_system(memory, regs, rsp, data, 8)
    if fault is not None:
        return fault

    rflags &= _KEPT
    cpu.rflags = rflags if type_ & 1 else rflags & ~_IF
    cpu.gpr[_RSP] = rsp
    cpu.rip = target
    cs = segment_of(selector & 0xFFFC | (dpl if inner else cpl), descriptor)
    if cs != old_cs:  # kernel to kernel: a load is dear, and changes nothing
        cpu.set_segment(_CS, cs)
    if inner:
        cpu.set_segment(_SS, Segment(dpl, 0, 0, dpl << 13))
        cpu.cpl = dpl
    return None
