"""System management mode: entering through an SMI, leaving through RSM (SDM vol. 3C, ch. 32; AMD APM vol. 2, ch. 10).

The save area is AMD's of 64 bits at SMBASE + 0xFE00, which KVM uses for every CPU with long mode whatever its vendor
(``arch/x86/kvm/smm.c`` of Linux 6.16). The handler starts at SMBASE + 0x8000 in a real mode with 4-GiB data segments.

Rules:

* Registers change only after the whole area could be stored; an area without memory is a shutdown.
* RSM takes what the area holds, with the checks of MOV to CR and WRMSR; a value that they refuse is a shutdown.
* RSM leaves a halted CPU behind its HLT; the SMBASE field relocates the next SMI.

Not modelled: I/O restart, auto-halt restart, the SMRAM address space (SMRAM is ordinary memory here).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aiovm.control import write_cr0, write_cr3, write_cr4
from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.memory import NoMemory

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["RESET_SMBASE", "enter_smm", "leave_smm"]

RESET_SMBASE: Final = 0x3_0000

_AREA: Final = 0xFE00
_SIZE: Final = 512
_REVISION: Final = 0x0002_0064
#: Offsets from the area's start.
_SEGMENTS: Final = (
    (Seg.ES, 0x00), (Seg.CS, 0x10), (Seg.SS, 0x20), (Seg.DS, 0x30), (Seg.FS, 0x40), (Seg.GS, 0x50),
    (Seg.LDTR, 0x70), (Seg.TR, 0x90),
)  # fmt: skip
_GDT, _IDT, _SHADOW, _EFER, _REVISION_AT, _SMBASE = 0x60, 0x80, 0xCB, 0xD0, 0xFC, 0x100
_CR4, _CR3, _CR0, _DR7, _DR6, _RFLAGS, _RIP, _R15 = 0x148, 0x150, 0x158, 0x160, 0x168, 0x170, 0x178, 0x180
_SEGMENT: Final = struct.Struct("<HHIQ")
_TABLE: Final = struct.Struct("<4xIQ")
_FLAT: Final = 0x80_9300  # G, present, data, writable, accessed
_LMA: Final = 1 << 10


def enter_smm(cpu: CpuState, memory: GuestMemory, smbase: int) -> bool:
    """Save the CPU's state and start the SMI handler. False: shutdown."""
    area = bytearray(_SIZE)
    for which, at in _SEGMENTS:
        s = cpu.segment(which)
        _SEGMENT.pack_into(area, at, s.selector, s.flags >> 8 & 0xF0FF, s.limit, s.base)
    for table, at in ((cpu.gdt, _GDT), (cpu.idt, _IDT)):
        _TABLE.pack_into(area, at, table.limit, table.base)
    words = [(_EFER, cpu.efer), (_CR4, cpu.cr4), (_CR3, cpu.cr3), (_CR0, cpu.cr0), (_DR7, cpu.get_dr(7))]
    words += [(_DR6, cpu.get_dr(6)), (_RFLAGS, cpu.rflags), (_RIP, cpu.rip)]
    words += [(_R15 + 8 * (15 - register), cpu.gpr[register]) for register in range(16)]
    for at, value in words:
        struct.pack_into("<Q", area, at, value)
    area[_SHADOW] = int(cpu.interrupt_shadow)
    struct.pack_into("<I", area, _REVISION_AT, _REVISION)
    struct.pack_into("<I", area, _SMBASE, smbase)
    try:
        memory.write(smbase + _AREA, area)
    except NoMemory:
        return False

    cpu.rflags = 2
    cpu.interrupt_shadow = False
    cpu.cr0 &= ~0x8000_000D  # PE, EM, TS, PG
    cpu.cr4 = 0
    cpu.efer = 0
    cpu.idt = DescriptorTable(0, 0)
    cpu.set_dr(7, 0x400)
    cpu.set_segment(Seg.CS, Segment(smbase >> 4 & 0xFFFF, smbase, 0xFFFF_FFFF, _FLAT))
    for which in (Seg.DS, Seg.ES, Seg.SS, Seg.FS, Seg.GS):
        cpu.set_segment(which, Segment(0, 0, 0xFFFF_FFFF, _FLAT))
    cpu.cpl = 0
    cpu.rip = 0x8000
    return True


def leave_smm(cpu: CpuState, memory: GuestMemory, smbase: int) -> int | None:
    """RSM: put the state back; the new SMBASE, or None for a shutdown."""
    try:
        area = memory.read(smbase + _AREA, _SIZE)
    except NoMemory:
        return None

    def word(at: int) -> int:
        return int.from_bytes(area[at : at + 8], "little")

    def segment(at: int) -> Segment:
        selector, attributes, limit, base = _SEGMENT.unpack_from(area, at)
        return Segment(selector, base, limit, attributes << 8 & 0xF0_FF00)

    cpu.cr0 &= ~0x8000_0001
    cpu.cr4 = 0
    cpu.efer = 0
    for register in range(16):
        cpu.gpr[register] = word(_R15 + 8 * (15 - register))
    cpu.set_dr(6, word(_DR6) & 0xE00F | 0xFFFF_0FF0)
    cpu.set_dr(7, word(_DR7) & 0xFFFF_2BFF | 0x400)
    for which in (Seg.LDTR, Seg.TR):
        cpu.set_segment(which, segment(dict(_SEGMENTS)[which]))
    limit, base = _TABLE.unpack_from(area, _GDT)
    cpu.gdt = DescriptorTable(base, limit)
    limit, base = _TABLE.unpack_from(area, _IDT)
    cpu.idt = DescriptorTable(base, limit)
    # PAE and EFER.LME come before PG, and CS must not be 64-bit when PG turns on.
    cr4, cr3, cr0, efer = word(_CR4), word(_CR3), word(_CR0), word(_EFER)
    cpu.set_segment(Seg.CS, Segment(0, 0, 0xFFFF_FFFF, 0xCF_9B00))
    cpu.efer = efer & 0x901
    cpu.cr3 = cr3
    refused = efer & ~0xD01 or write_cr4(cpu, memory, cr4) or write_cr0(cpu, memory, cr0)
    if refused or write_cr3(cpu, memory, cr3) or (efer ^ cpu.efer) & _LMA:
        return None
    for which, at in _SEGMENTS[:6]:
        cpu.set_segment(which, segment(at))
    cpu.rflags = word(_RFLAGS) & 0x3F_7FD5 | 2
    cpu.cpl = 3 if cpu.rflags >> 17 & 1 else cpu.segment(Seg.SS).dpl if cr0 & 1 else 0
    cpu.rip = word(_RIP)
    cpu.interrupt_shadow = bool(area[_SHADOW])
    return int.from_bytes(area[_SMBASE : _SMBASE + 4], "little")
