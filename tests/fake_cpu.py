"""A CPU that is only its state, and the tables that event delivery reads: built from the manual's bit positions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.memory import GuestMemory

GDT, IDT, LDT, TSS = 0x1000, 0x2000, 0x4000, 0x5000
CODE0, DATA0, CODE3, DATA3, TR, CONFORMING, ABSENT, CODE16, STACK16, CODE64, CODE64_3, LDT_SEL = (
    0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x58, 0x60,
)  # fmt: skip


@dataclass
class FakeCpu:
    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    rip: int = 0
    rflags: int = 2
    cr0: int = 0x10
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    pkru: int = 0
    cpl: int = 0
    interrupt_shadow: bool = False
    gdt: DescriptorTable = field(default_factory=lambda: DescriptorTable(0, 0xFFFF))
    idt: DescriptorTable = field(default_factory=lambda: DescriptorTable(0, 0xFFFF))
    segments: dict[Seg, Segment] = field(
        default_factory=lambda: {which: Segment(0, 0, 0xFFFF, 0x9300) for which in Seg}
    )
    debug: list[int] = field(default_factory=lambda: [0] * 8)

    def segment(self, which):
        return self.segments[which]

    def selector(self, which):
        return self.segments[which].selector

    def set_segment(self, which, value):
        self.segments[which] = value

    def get_dr(self, index):
        return self.debug[index]

    def set_dr(self, index, value):
        self.debug[index] = value

    def copy(self):
        return copy.deepcopy(self)


def descriptor(base, limit, access, size=0):
    """A GDT entry: ``access`` is bits 47:40, ``size`` bits 55:52 (G, D/B, L, AVL)."""
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | size << 52
        | (base >> 24 & 0xFF) << 56
    )


def segment(selector, entry):
    """What loading ``entry`` leaves in the register."""
    limit = entry & 0xFFFF | entry >> 32 & 0xF0000
    if entry >> 55 & 1:
        limit = limit << 12 | 0xFFF
    base = entry >> 16 & 0xFFFFFF | entry >> 32 & 0xFF000000
    return Segment(selector, base, limit, entry >> 32 & 0xF0FF00)


def gate(selector, offset, type_, *, dpl=0, present=1):
    """An 8-byte gate: ``type_`` is bits 44:40."""
    low, high = offset & 0xFFFF, offset >> 16 & 0xFFFF
    return low | selector << 16 | type_ << 40 | dpl << 45 | present << 47 | high << 48


def gate64(selector, offset, type_=0xE, *, dpl=0, present=1, ist=0):
    """A 16-byte gate."""
    return gate(selector, offset, type_, dpl=dpl, present=present) | ist << 32 | (offset >> 32) << 64


ENTRIES = {
    CODE0: descriptor(0, 0xFFFFF, 0x9B, 0xC),
    DATA0: descriptor(0, 0xFFFFF, 0x93, 0xC),
    CODE3: descriptor(0, 0xFFFFF, 0xFB, 0xC),
    DATA3: descriptor(0, 0xFFFFF, 0xF3, 0xC),
    TR: descriptor(TSS, 0x67, 0x8B),
    CONFORMING: descriptor(0, 0xFFFFF, 0x9F, 0xC),
    ABSENT: descriptor(0, 0xFFFFF, 0x1B, 0xC),
    CODE16: descriptor(0, 0xFFFF, 0x9B),
    STACK16: descriptor(0, 0xFFFF, 0x93),
    CODE64: descriptor(0, 0xFFFFF, 0x9B, 0xA),
    CODE64_3: descriptor(0, 0xFFFFF, 0xFB, 0xA),
    LDT_SEL: descriptor(LDT, 0x2F, 0x82),
}


def put_gate(memory, vector, value, width=8):
    memory.write(IDT + vector * width, value.to_bytes(width, "little"))


def put_entry(memory, selector, value):
    memory.write_u(GDT + (selector & ~7), 8, value)


def new_memory():
    memory = GuestMemory()
    memory.set_region(0, 0, 0x4_0000)
    for selector, entry in ENTRIES.items():
        put_entry(memory, selector, entry)
    return memory


def load(cpu, which, selector):
    cpu.set_segment(which, segment(selector, ENTRIES[selector & ~3]))


def protected(cpl=0):
    """32-bit protected mode without paging: CS:EIP 0x100 with a 32-bit stack at 0x9000 (0xA000 at CPL 3)."""
    cpu = FakeCpu(cr0=0x11, rip=0x100, rflags=0x202, cpl=cpl)
    cpu.gdt, cpu.idt = DescriptorTable(GDT, 0x7F), DescriptorTable(IDT, 0x7FF)
    load(cpu, Seg.CS, CODE3 | 3 if cpl else CODE0)
    for which in (Seg.SS, Seg.DS, Seg.ES, Seg.FS, Seg.GS):
        load(cpu, which, DATA3 | 3 if cpl else DATA0)
    load(cpu, Seg.TR, TR)
    cpu.set_segment(Seg.LDTR, Segment(0, 0, 0, 0))
    cpu.gpr[4] = 0xA000 if cpl else 0x9000
    return cpu


def long_mode(memory, cpl=0):
    """64-bit mode; tables at 0x10000 map the first 256 KiB to themselves, also at 0xFFFF800000000000."""
    for address, entry in ((0x1_0000, 0x1_1067), (0x1_0800, 0x1_1067), (0x1_1000, 0x1_2067), (0x1_2000, 0x1_3067)):
        memory.write_u(address, 8, entry)
    for page in range(0x40):
        memory.write_u(0x1_3000 + 8 * page, 8, page << 12 | 0x67)
    cpu = protected(cpl)
    cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer = 0x8001_0011, 0x1_0000, 0x20, 0xD00
    cpu.idt = DescriptorTable(IDT, 0xFFF)
    load(cpu, Seg.CS, CODE64_3 | 3 if cpl else CODE64)
    return cpu


def words(memory, at, count, width):
    """What lies at ``at``, lowest address first."""
    return [memory.read_u(at + width * n, width) for n in range(count)]
