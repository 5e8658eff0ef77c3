"""Task gates: both tasks' segments, the link, and the faults of table 7-1 (SDM vol. 3A, chapter 7)."""

from __future__ import annotations

import struct

import pytest
from fake_cpu import (
    CODE0,
    CODE3,
    CODE16,
    CONFORMING,
    DATA0,
    DATA3,
    GDT,
    LDT,
    LDT_SEL,
    STACK16,
    TR,
    TSS,
    descriptor,
    gate,
    new_memory,
    protected,
    put_entry,
    put_gate,
    words,
)

from aiovm.delivery import deliver
from aiovm.engine.base import Seg, Segment
from aiovm.events import EventKind
from aiovm.segmentation import Fault

NEW, NEW_SEL = 0x6000, 0x68
PLAIN = {
    "cr3": 0, "eip": 0x700, "eflags": 0x2, "eax": 0xA0, "ecx": 0xC0, "edx": 0xD0, "ebx": 0xB0, "esp": 0xC000,
    "ebp": 0xB9, "esi": 0x51, "edi": 0xD1, "es": DATA0, "cs": CODE0, "ss": DATA0, "ds": DATA0, "fs": 0, "gs": 0,
    "ldt": 0,
}  # fmt: skip


@pytest.fixture
def memory():
    memory = new_memory()
    put_gate(memory, 8, gate(NEW_SEL, 0, 0x5))
    put_gate(memory, 0x30, gate(NEW_SEL, 0, 0x5, dpl=3))
    new_task(memory)
    return memory


def new_task(memory, **changes):
    """A 32-bit task-state segment at 0x6000."""
    values = PLAIN | changes
    put_entry(memory, NEW_SEL, descriptor(NEW, 0x67, 0x89))
    memory.write(NEW, bytes(0x1C) + struct.pack("<18I", *(values[name] for name in PLAIN)))


def test_everything_of_both_tasks(memory):
    cpu = protected(cpl=3)
    cpu.gpr[:8] = [0x10, 0x11, 0x12, 0x13, 0xA000, 0x15, 0x16, 0x17]
    cpu.set_dr(7, 0x7FF)
    assert deliver(cpu, memory, 0x30, kind=EventKind.SOFT_INT, return_rip=0x102) is None
    assert words(memory, TSS + 0x20, 16, 4) == [
        0x102, 0x202, 0x10, 0x11, 0x12, 0x13, 0xA000, 0x15, 0x16, 0x17, 0x23, 0x1B, 0x23, 0x23, 0x23, 0x23,
    ]  # fmt: skip
    assert memory.read_u(NEW, 2) == 0x28
    assert memory.read_u(GDT + NEW_SEL + 5, 1) == 0x8B
    assert memory.read_u(GDT + TR + 5, 1) == 0x8B
    assert cpu.gpr[:8] == [0xA0, 0xC0, 0xD0, 0xB0, 0xC000, 0xB9, 0x51, 0xD1]
    assert (cpu.rip, cpu.rflags, cpu.cpl, cpu.cr0) == (0x700, 0x4002, 0, 0x19)
    assert cpu.segment(Seg.TR) == Segment(NEW_SEL, NEW, 0x67, 0x8B00)
    assert cpu.segment(Seg.CS) == Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B00)
    assert cpu.segment(Seg.SS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xC09300)
    assert cpu.segment(Seg.FS) == Segment(0, 0, 0, 0)
    assert cpu.segment(Seg.LDTR) == Segment(0, 0, 0, 0)
    assert cpu.get_dr(7) == 0x6AA


def test_error_code_goes_to_the_new_stack(memory):
    cpu = protected()
    assert deliver(cpu, memory, 8, kind=EventKind.EXCEPTION, error_code=0) is None
    assert cpu.gpr[4] == 0xBFFC
    assert memory.read_u(TSS + 0x24, 4) == 0x202  # #DF is an abort: RF as it was


def test_sixteen_bit_task(memory):
    cpu = protected()
    cpu.gpr[0] = 0xFFFF_FFFF
    put_entry(memory, NEW_SEL, descriptor(NEW, 0x2B, 0x81))
    memory.write(
        NEW + 0x0E, struct.pack("<15H", 0x700, 2, 1, 2, 3, 4, 0xC000, 6, 7, 8, DATA0, CODE16, STACK16, DATA0, 0)
    )
    assert deliver(cpu, memory, 8, kind=EventKind.EXCEPTION, error_code=0x1234) is None
    assert cpu.gpr[:8] == [1, 2, 3, 4, 0xBFFE, 6, 7, 8]
    assert memory.read_u(0xBFFE, 2) == 0x1234
    assert (cpu.rip, cpu.segment(Seg.CS).selector, cpu.segment(Seg.FS).selector) == (0x700, CODE16, DATA0)
    assert cpu.segment(Seg.TR).flags == 0x8300
    # and back: the outgoing task is the 16-bit one now
    put_gate(memory, 0x31, gate(0x70, 0, 0x5))
    put_entry(memory, 0x70, descriptor(0x7000, 0x67, 0x89))
    memory.write(0x7000 + 0x1C, struct.pack("<18I", *PLAIN.values()))
    assert deliver(cpu, memory, 0x31, kind=EventKind.EXTERNAL) is None
    assert words(memory, NEW + 0x0E, 14, 2) == [
        0x700, 0x4002, 1, 2, 3, 4, 0xBFFE, 6, 7, 8, DATA0, CODE16, STACK16, DATA0,
    ]  # fmt: skip


def test_virtual_8086_task(memory):
    new_task(memory, eflags=0x2_0202, cs=0x1234, ss=0x100, es=0x200, ds=0x300, fs=0x400, gs=0x500)
    cpu = protected()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) is None
    assert cpu.segment(Seg.CS) == Segment(0x1234, 0x1_2340, 0xFFFF, 0xF300)
    assert cpu.segment(Seg.GS) == Segment(0x500, 0x5000, 0xFFFF, 0xF300)
    assert (cpu.cpl, cpu.rflags) == (3, 0x2_4202)


def test_paging_root_comes_with_the_task(memory):
    for table in (0x2_0000, 0x2_2000):
        memory.write_u(table, 4, table + 0x1067)
        for page in range(0x40):
            memory.write_u(table + 0x1000 + 4 * page, 4, page << 12 | 0x67)
    new_task(memory, cr3=0x2_2000)
    cpu = protected()
    cpu.cr0, cpu.cr3 = 0x8001_0011, 0x2_0000
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) is None
    assert cpu.cr3 == 0x2_2000


def test_local_descriptor_table_of_the_task(memory):
    memory.write_u(LDT + 8, 8, descriptor(0, 0xFFFFF, 0xFA, 0xC))
    memory.write_u(LDT + 16, 8, descriptor(0, 0xFFFFF, 0xF2, 0xC))
    new_task(memory, ldt=LDT_SEL, cs=0x0F, ss=0x17, ds=0x17, es=0x17)
    cpu = protected()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) is None
    assert cpu.segment(Seg.LDTR) == Segment(LDT_SEL, LDT, 0x2F, 0x8200)
    assert (cpu.cpl, memory.read_u(LDT + 13, 1)) == (3, 0xFB)


@pytest.mark.parametrize(
    ("selector", "entry", "fault"),
    [
        (0x6C, None, Fault(13, 0x6D)),
        (0x80, None, Fault(13, 0x81)),
        (0, descriptor(NEW, 0x67, 0x89), Fault(13, 0x01)),
        (NEW_SEL, descriptor(NEW, 0x67, 0x8B), Fault(13, 0x69)),
        (NEW_SEL, descriptor(NEW, 0x67, 0x99), Fault(13, 0x69)),
        (NEW_SEL, descriptor(NEW, 0x67, 0x09), Fault(11, 0x69)),
        (NEW_SEL, descriptor(NEW, 0x66, 0x89), Fault(10, 0x69)),
        (NEW_SEL, descriptor(NEW, 0x2A, 0x81), Fault(10, 0x69)),
    ],
    ids=["local", "limit", "null", "busy", "code", "absent", "short", "short 16-bit"],
)
def test_a_refused_switch_changes_nothing(memory, selector, entry, fault):
    if entry is not None:
        put_entry(memory, selector, entry)
    put_gate(memory, 0x30, gate(selector, 0, 0x5))
    cpu = protected()
    before = cpu.copy()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) == fault
    assert cpu == before


def test_page_faults_before_the_switch_change_nothing(memory):
    cpu = protected()
    cpu.cr0, cpu.cr3 = 0x8001_0011, 0x2_0000
    memory.write_u(0x2_0000, 4, 0x2_1067)
    for page in range(0x40):
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)
    before = cpu.copy()
    for page, bits, fault in (
        (GDT >> 12, 0, Fault(14, 0, GDT + NEW_SEL)),
        (NEW >> 12, 0, Fault(14, 0, NEW)),
        (TSS >> 12, 0, Fault(14, 2, TSS + 0x5C)),
        (NEW >> 12, 0x65, Fault(14, 3, NEW)),
        (GDT >> 12, 0x65, Fault(14, 3, GDT + NEW_SEL + 5)),
    ):
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | bits)
        assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) == fault
        assert cpu == before
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)


def test_pae_task_with_bad_pdptes(memory):
    memory.write_u(0x2_0000, 8, 0x2_1001)
    memory.write_u(0x2_1000, 8, 0xE7)
    memory.write_u(0x2_2000, 8, 0x2_1003)
    new_task(memory, cr3=0x2_2000)
    cpu = protected()
    cpu.cr0, cpu.cr3, cpu.cr4 = 0x8001_0011, 0x2_0000, 0x20
    before = cpu.copy()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) == Fault(13, 0)
    assert cpu == before


def test_task_state_segment_beyond_memory(memory):
    """All ones: a virtual-8086 task at FFFF:FFFFFFFF; its LDT selector is refused first."""
    put_entry(memory, NEW_SEL, descriptor(0x100_0000, 0x67, 0x89))
    cpu = protected()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) == Fault(10, 0xFFFD)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ldt": 0x0C}, Fault(10, 0x0D)),
        ({"ldt": 0x80}, Fault(10, 0x81)),
        ({"ldt": CODE0}, Fault(10, 0x09)),
        ({"cs": 0}, Fault(10, 0x01)),
        ({"cs": 0x80}, Fault(10, 0x81)),
        ({"cs": DATA0}, Fault(10, 0x11)),
        ({"cs": CODE0 | 3}, Fault(10, 0x09)),
        ({"cs": CODE3}, Fault(10, 0x19)),
        ({"cs": TR}, Fault(10, 0x29)),
        ({"ss": 0}, Fault(10, 0x01)),
        ({"ss": DATA3}, Fault(10, 0x21)),
        ({"ss": DATA0 | 1}, Fault(10, 0x11)),
        ({"ss": CODE0}, Fault(10, 0x09)),
        ({"ds": DATA0 | 3}, Fault(10, 0x11)),
        ({"gs": 0x78}, Fault(10, 0x79)),
        ({"cs": CODE3 | 3, "ss": DATA3 | 3}, Fault(10, 0x11)),
        ({"eip": 0x1_0000, "cs": CODE16}, Fault(13, 0x01)),
    ],
)
def test_faults_of_the_incoming_task(memory, changes, fault):
    new_task(memory, **changes)
    cpu = protected()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) == fault
    assert cpu.segment(Seg.TR).selector == NEW_SEL
    assert cpu.rip == changes.get("eip", 0x700)
    assert cpu.segment(Seg.CS).selector == changes.get("cs", CODE0)


@pytest.mark.parametrize(
    ("selector", "access", "name", "fault"),
    [
        (0x70, 0x1B, "cs", Fault(11, 0x71)),
        (0x70, 0x13, "ss", Fault(12, 0x71)),
        (0x70, 0x13, "ds", Fault(11, 0x71)),
        (0x70, 0x99, "es", Fault(10, 0x71)),
        (0x70, 0x91, "ss", Fault(10, 0x71)),
        (0x70, 0x02, "ldt", Fault(10, 0x71)),
    ],
)
def test_absent_or_unfit_segments_of_the_incoming_task(memory, selector, access, name, fault):
    put_entry(memory, selector, descriptor(0, 0xFFFFF, access, 0xC))
    new_task(memory, **{name: selector})
    assert deliver(protected(), memory, 0x30, kind=EventKind.EXTERNAL) == fault


def test_conforming_code_suits_any_outer_privilege(memory):
    new_task(memory, cs=CONFORMING | 3, ss=DATA3 | 3, ds=CONFORMING, es=0)
    cpu = protected()
    assert deliver(cpu, memory, 0x30, kind=EventKind.EXTERNAL) is None
    assert (cpu.cpl, cpu.segment(Seg.DS).selector) == (3, 0x30)


def test_page_faults_while_loading_the_incoming_task(memory):
    """The GDT is mapped read-only, or not at all, in the new task's tables."""
    cpu = protected()
    for table in (0x2_0000, 0x2_2000):
        memory.write_u(table, 4, table + 0x1067)
        for page in range(0x40):
            memory.write_u(table + 0x1000 + 4 * page, 4, page << 12 | 0x67)
    put_entry(memory, CODE0, descriptor(0, 0xFFFFF, 0x9A, 0xC))
    new_task(memory, cr3=0x2_2000)
    memory.write_u(0x2_3000 + 4, 4, 0x1065)
    cpu.cr0, cpu.cr3 = 0x8001_0011, 0x2_0000
    assert deliver(cpu.copy(), memory, 0x30, kind=EventKind.EXTERNAL) == Fault(14, 3, GDT + 0x0D)
    for changes, address in (({}, GDT + 8), ({"ldt": LDT_SEL}, GDT + LDT_SEL)):
        new_task(memory, cr3=0x2_2000, **changes)
        memory.write_u(0x2_3000 + 4, 4, 0)
        assert deliver(cpu.copy(), memory, 0x30, kind=EventKind.EXTERNAL) == Fault(14, 0, address)


def test_no_room_for_the_error_code(memory):
    put_entry(memory, 0x70, descriptor(0, 0xBFFE, 0x93, 0x4))
    new_task(memory, ss=0x70)
    assert deliver(protected(), memory, 8, kind=EventKind.EXCEPTION, error_code=0) == Fault(12, 0x01)
