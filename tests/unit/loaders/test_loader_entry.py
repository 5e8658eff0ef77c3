"""Entry states: the three modes, their tables in memory, and putting them into a vCPU."""

from __future__ import annotations

import struct

from images import MIB, memory

from aiovm.engine.base import DescriptorTable, Reg, Seg, Segment
from aiovm.loaders.entry import apply, identity_tables, long_mode, protected_mode, real_mode, stack
from aiovm.loaders.ram import Ram


class Cpu:
    """Registers that remember."""

    def __init__(self):
        self.gpr = [0xDEAD] * 16
        self.segments = {}
        self.cr2 = 0xDEAD
        self.interrupt_shadow = True

    def set_segment(self, which, value):
        self.segments[which] = value


def test_apply_writes_every_register():
    m = memory()
    entry = long_mode(Ram(m, "x"), 0x123456, gpr={Reg.RSI: 7}, executable=[])
    cpu = Cpu()
    apply(entry, cpu)
    assert cpu.gpr == [0, 0, 0, 0, 0, 0, 7] + [0] * 9
    assert (cpu.rip, cpu.rflags, cpu.cr2, cpu.interrupt_shadow) == (0x123456, 2, 0, False)
    assert (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) == (0x80010033, entry.cr3, 0x620, 0xD00)
    assert set(cpu.segments) == set(Seg)
    assert cpu.segments[Seg.CS] == Segment(8, 0, 0xFFFFFFFF, 0xA09B00)
    assert cpu.segments[Seg.TR] == Segment(0, 0, 0x67, 0x8B00)
    assert cpu.idt == DescriptorTable(0, 0)
    assert cpu.gdt == entry.gdt


def test_real_mode_begins_in_segment_0_where_it_reaches():
    low = real_mode(0xFFFF, gpr={})
    assert (low.rip, low.segments[Seg.CS]) == (0xFFFF, Segment(0, 0, 0xFFFF, 0x9B00))
    high = real_mode(0x12345, gpr={})
    assert (high.rip, high.segments[Seg.CS]) == (5, Segment(0x1234, 0x12340, 0xFFFF, 0x9B00))
    assert high.segments[Seg.DS] == Segment(0, 0, 0xFFFF, 0x9300)
    assert (high.cr0 & 0x80000001, high.idt) == (0, (0, 0x3FF))


def test_the_gdt_in_memory_says_what_the_segments_say():
    m = memory()
    entry = protected_mode(Ram(m, "x"), 0x100000, gpr={})
    assert entry.gdt.limit == 23
    assert m.read(entry.gdt.base, 24) == struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    assert entry.segments[Seg.CS] == Segment(0x08, 0, 0xFFFFFFFF, 0xC09B00)
    assert entry.segments[Seg.SS] == entry.segments[Seg.GS] == Segment(0x10, 0, 0xFFFFFFFF, 0xC09300)
    assert (entry.cr0 & 0x80000001, entry.cr3, entry.cr4, entry.efer, entry.rflags) == (1, 0, 0, 0, 2)


def test_other_selectors_have_their_places_in_the_gdt():
    m = memory()
    entry = long_mode(Ram(m, "x"), 0, gpr={}, executable=[], code_selector=0x10, data_selector=0x18)
    assert m.read(entry.gdt.base, 32) == struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    assert entry.segments[Seg.DS].selector == 0x18


def walk(tables, base, address):
    """The 2 MiB entry for an address below 4 GiB."""

    def word(at):
        return struct.unpack_from("<Q", tables, at - base)[0]

    pml4e = word(base + (address >> 39) * 8)
    assert pml4e & 0x83 == 3
    pdpte = word((pml4e & ~0xFFF) + (address >> 30) * 8)
    assert pdpte & 0x83 == 3
    return word((pdpte & ~0xFFF) + (address >> 21 & 511) * 8)


def test_identity_tables_map_four_gib():
    tables = identity_tables(0x10000, [])
    assert len(tables) == 6 * 4096
    for address in (0, 0x200000, 0x3FE00000, 0x40000000, 0xFFE00000):
        entry = walk(tables, 0x10000, address)
        assert entry & 0x000F_FFFF_FFE0_0000 == address
        assert entry & 0x83 == 0x83
    assert tables[8:4096] == bytes(4088)


def test_only_pages_with_code_are_executable():
    tables = identity_tables(0, [(0x3FFFFF, 0x400001), (0x800000, 0xA00000)])
    executable = [n for n in range(2048) if not walk(tables, 0, n << 21) >> 63]
    assert executable == [0, 1, 2, 4]


def test_the_stack_is_at_the_end_of_ram():
    ram = Ram(memory(4 * MIB), "x")
    assert stack(ram) == 0x400000
    assert ram.regions[0][:2] == (0x3FC000, 0x400000)
