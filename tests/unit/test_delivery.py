"""Event delivery: frames, masks, stacks, privileges and every way to fail, per the manual (SDM vol. 3A, chapter 6)."""

from __future__ import annotations

import pytest
from fake_cpu import (
    ABSENT,
    CODE0,
    CODE3,
    CODE16,
    CODE64,
    CODE64_3,
    CONFORMING,
    DATA0,
    DATA3,
    GDT,
    IDT,
    LDT,
    LDT_SEL,
    STACK16,
    TR,
    TSS,
    FakeCpu,
    descriptor,
    gate,
    gate64,
    load,
    long_mode,
    new_memory,
    protected,
    put_entry,
    put_gate,
    words,
)

from aiovm.delivery import SHUTDOWN, deliver, deliver_event
from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.events import EventKind
from aiovm.segmentation import Fault

EXTERNAL, NMI, EXCEPTION = EventKind.EXTERNAL, EventKind.NMI, EventKind.EXCEPTION
SOFT_INT, SOFT_EXC, ICEBP = EventKind.SOFT_INT, EventKind.SOFT_EXC, EventKind.ICEBP
INT32, TRAP32, INT16, TRAP16 = 0xE, 0xF, 0x6, 0x7


@pytest.fixture
def memory():
    return new_memory()


def refused(cpu, memory, vector, **how):
    """The fault of a delivery that must leave the CPU as it was."""
    before = cpu.copy()
    fault = deliver(cpu, memory, vector, **({"kind": EXTERNAL} | how))
    assert cpu == before
    return fault


# ---- real mode ---------------------------------------------------------------------------------------------


def real_mode(memory, *, sp=0x8000, handler=0x1234_5678):
    cpu = FakeCpu(rip=0x7C05, rflags=0x5_4302)  # AC, RF, NT, IF, TF
    cpu.set_segment(Seg.CS, Segment(0x07C0, 0x7C00, 0xFFFF, 0x9B00))
    cpu.set_segment(Seg.SS, Segment(0x1000, 0x1_0000, 0xFFFF, 0x9300))
    cpu.gpr[4] = 0xABCD_0000 | sp
    memory.write_u(0x21 * 4, 4, handler)
    return cpu


def test_real_mode_pushes_flags_cs_ip_and_clears_if_tf_ac(memory):
    cpu = real_mode(memory)
    cpu.interrupt_shadow = True
    assert deliver(cpu, memory, 0x21, kind=SOFT_INT, return_rip=0x7C07) is None
    assert words(memory, 0x1_7FFA, 3, 2) == [0x7C07, 0x07C0, 0x4302]
    assert cpu.segment(Seg.CS) == Segment(0x1234, 0x1_2340, 0xFFFF, 0x9B00)
    assert (cpu.rip, cpu.gpr[4], cpu.rflags) == (0x5678, 0xABCD_7FFA, 0x4002)
    assert not cpu.interrupt_shadow


def test_real_mode_stack_pointer_wraps(memory):
    cpu = real_mode(memory, sp=2)
    assert deliver(cpu, memory, 0x21, kind=EXTERNAL) is None
    assert cpu.gpr[4] == 0xABCD_FFFC
    assert memory.read_u(0x1_0000, 2) == 0x4302
    assert words(memory, 0x1_FFFC, 2, 2) == [0x7C05, 0x07C0]


def test_real_mode_limits(memory):
    cpu = real_mode(memory, sp=1)
    assert refused(cpu, memory, 0x21) == Fault(12, None)
    cpu = real_mode(memory)
    cpu.idt = DescriptorTable(0, 0x86)
    assert refused(cpu, memory, 0x21) == Fault(13, None)
    cpu.idt = DescriptorTable(0, 0x87)
    assert deliver(cpu, memory, 0x21, kind=EXTERNAL) is None


def test_real_mode_exceptions_push_no_error_code(memory):
    cpu = real_mode(memory)
    memory.write_u(13 * 4, 4, 0x0000_1111)
    assert deliver(cpu, memory, 13, kind=EXCEPTION, error_code=0) is None
    assert cpu.gpr[4] == 0xABCD_7FFA


def test_tables_beyond_memory_read_all_ones_and_stores_there_vanish(memory):
    cpu = real_mode(memory)
    cpu.idt = DescriptorTable(0x100_0000, 0x3FF)
    cpu.set_segment(Seg.SS, Segment(0x1000, 0x200_0000, 0xFFFF, 0x9300))
    assert deliver(cpu, memory, 0x21, kind=EXTERNAL) is None
    assert (cpu.segment(Seg.CS).selector, cpu.rip) == (0xFFFF, 0xFFFF)


# ---- protected mode, same privilege ------------------------------------------------------------------------


def test_interrupt_gate_clears_if(memory):
    cpu = protected()
    cpu.rflags = 0x2_4302 & ~0x2_0000 | 0x1_0000  # NT, IF, TF, RF
    put_gate(memory, 0x30, gate(CODE0, 0x1_2345, INT32))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert words(memory, 0x8FF4, 3, 4) == [0x100, 0x08, 0x1_4302]
    assert (cpu.rip, cpu.gpr[4], cpu.rflags) == (0x1_2345, 0x8FF4, 0x2)


def test_trap_gate_keeps_if(memory):
    cpu = protected()
    put_gate(memory, 0x30, gate(CODE0, 0x400, TRAP32))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert cpu.rflags == 0x202


def test_error_code_is_pushed_last(memory):
    cpu = protected()
    put_gate(memory, 13, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, 13, kind=EXCEPTION, error_code=0x1234) is None
    assert words(memory, 0x8FF0, 4, 4) == [0x1234, 0x100, 0x08, 0x1_0202]


@pytest.mark.parametrize(
    ("vector", "kind", "before", "pushed"),
    [
        (13, EXCEPTION, 0x202, 0x1_0202),
        (1, EXCEPTION, 0x202, 0x202),
        (8, EXCEPTION, 0x202, 0x202),
        (18, EXCEPTION, 0x202, 0x202),
        (3, SOFT_EXC, 0x1_0202, 0x202),
        (0x80, SOFT_INT, 0x1_0202, 0x202),
        (1, ICEBP, 0x1_0202, 0x202),
        (0x80, EXTERNAL, 0x1_0202, 0x1_0202),
        (2, NMI, 0x202, 0x202),
    ],
)
def test_rf_as_pushed(memory, vector, kind, before, pushed):
    cpu = protected()
    cpu.rflags = before
    put_gate(memory, vector, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, vector, kind=kind) is None
    assert memory.read_u(0x8FFC, 4) == pushed


def test_sixteen_bit_gate_pushes_words_and_uses_a_word_of_offset(memory):
    cpu = protected()
    cpu.rip, cpu.gpr[4] = 0x5_6789, 0x1_0002
    load(cpu, Seg.SS, STACK16)
    put_gate(memory, 0x30, gate(CODE16, 0x7777_0400, INT16))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert cpu.gpr[4] == 0x1_FFFC  # SP wraps, ESP's upper half stays
    assert memory.read_u(0x0, 2) == 0x202
    assert words(memory, 0xFFFC, 2, 2) == [0x6789, 0x08]
    assert cpu.rip == 0x400
    put_gate(memory, 0x31, gate(CODE16, 0x500, TRAP16))
    assert deliver(cpu, memory, 0x31, kind=EXTERNAL) is None
    assert cpu.rip == 0x500


def test_conforming_handler_keeps_the_privilege(memory):
    cpu = protected(cpl=3)
    put_gate(memory, 0x30, gate(CONFORMING, 0x400, INT32))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert (cpu.cpl, cpu.segment(Seg.CS).selector, cpu.gpr[4]) == (3, 0x33, 0x9FF4)


def test_accessed_bit_of_the_handlers_segment(memory):
    cpu = protected()
    put_entry(memory, CODE0, descriptor(0, 0xFFFFF, 0x9A, 0xC))
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert memory.read_u(GDT + 8 + 5, 1) == 0x9B
    assert cpu.segment(Seg.CS).flags == 0xC09B00


def test_handler_in_the_ldt(memory):
    cpu = protected()
    put_gate(memory, 0x30, gate(0x0C, 0x400, INT32))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x0D)  # no LDT
    load(cpu, Seg.LDTR, LDT_SEL)
    memory.write_u(LDT + 8, 8, descriptor(0, 0xFFFFF, 0x9A, 0xC))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert cpu.segment(Seg.CS).selector == 0x0C
    assert memory.read_u(LDT + 8 + 5, 1) == 0x9B
    put_gate(memory, 0x30, gate(0x34, 0x400, INT32))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x35)  # beyond the LDT's limit


def test_debug_exception_clears_general_detect(memory):
    cpu = protected()
    put_gate(memory, 1, gate(CODE0, 0x400, INT32))
    for kind, left in ((EXCEPTION, 0x400), (ICEBP, 0x400), (SOFT_INT, 0x2400)):
        cpu.set_dr(7, 0x2400)
        assert deliver(cpu, memory, 1, kind=kind) is None
        assert cpu.get_dr(7) == left


# ---- protected mode, inner privilege -----------------------------------------------------------------------


def user(memory, *, ss=DATA0, esp=0xB000):
    cpu = protected(cpl=3)
    memory.write_u(TSS + 4, 4, esp)
    memory.write_u(TSS + 8, 4, ss)
    return cpu


def test_inner_privilege_takes_the_stack_of_the_task_state_segment(memory):
    cpu = user(memory)
    put_gate(memory, 14, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, 14, kind=EXCEPTION, error_code=4) is None
    assert words(memory, 0xAFE8, 6, 4) == [4, 0x100, 0x1B, 0x1_0202, 0xA000, 0x23]
    assert (cpu.cpl, cpu.gpr[4], cpu.rip) == (0, 0xAFE8, 0x400)
    assert cpu.segment(Seg.CS) == Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B00)
    assert cpu.segment(Seg.SS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xC09300)
    assert cpu.segment(Seg.DS).selector == 0x23


def test_inner_privilege_through_a_16_bit_task_state_segment(memory):
    cpu = user(memory)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 0x2B, 0x8300))
    memory.write_u(TSS + 2, 2, 0xB000)
    memory.write_u(TSS + 4, 2, DATA0)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT16))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert words(memory, 0xAFF6, 5, 2) == [0x100, 0x1B, 0x202, 0xA000, 0x23]
    assert cpu.gpr[4] == 0xAFF6


def test_stack_segments_accessed_bit(memory):
    cpu = user(memory)
    put_entry(memory, DATA0, descriptor(0, 0xFFFFF, 0x92, 0xC))
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert memory.read_u(GDT + 0x10 + 5, 1) == 0x93


@pytest.mark.parametrize(
    ("selector", "entry", "fault"),
    [
        (0, None, Fault(10, 0x01)),
        (0x80, None, Fault(10, 0x81)),
        (DATA3 | 3, None, Fault(10, 0x21)),
        (DATA0 | 1, None, Fault(10, 0x11)),
        (DATA0, descriptor(0, 0xFFFFF, 0xB3, 0xC), Fault(10, 0x11)),
        (DATA0, descriptor(0, 0xFFFFF, 0x91, 0xC), Fault(10, 0x11)),
        (DATA0, descriptor(0, 0xFFFFF, 0x9B, 0xC), Fault(10, 0x11)),
        (DATA0, descriptor(0, 0xFFFFF, 0x83, 0xC), Fault(10, 0x11)),
        (DATA0, descriptor(0, 0xFFFFF, 0x13, 0xC), Fault(12, 0x11)),
        (DATA0, descriptor(0, 0xAFEF, 0x93, 0x4), Fault(12, 0x11)),
    ],
    ids=["null", "limit", "dpl", "rpl", "dpl1", "read-only", "code", "system", "absent", "no room"],
)
def test_inner_stack_segment_checks(memory, selector, entry, fault):
    cpu = user(memory, ss=selector)
    if entry is not None:
        put_entry(memory, selector, entry)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    assert refused(cpu, memory, 0x30) == fault


def test_task_state_segment_too_short_for_the_stack(memory):
    cpu = user(memory)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, dpl=3))
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 8, 0x8B00))
    assert refused(cpu, memory, 0x30) == Fault(10, 0x29)
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(10, 0x28)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 4, 0x8300))
    assert refused(cpu, memory, 0x30) == Fault(10, 0x29)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 9, 0x8B00))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None


# ---- what a gate refuses -----------------------------------------------------------------------------------


def test_idt_limit(memory):
    cpu = protected()
    cpu.idt = DescriptorTable(IDT, 0x186)
    assert refused(cpu, memory, 0x30) == Fault(13, 0x183)
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(13, 0x182)
    assert refused(cpu, memory, 0x30, kind=ICEBP) == Fault(13, 0x183)


def test_gate_type_privilege_and_presence(memory):
    cpu = user(memory)
    put_gate(memory, 0x30, gate(CODE0, 0x400, 0xC))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x183)
    put_gate(memory, 0x30, gate(CODE0, 0x400, 0x1E))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x183)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, dpl=2))
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(13, 0x182)
    assert refused(cpu, memory, 0x30, kind=SOFT_EXC) == Fault(13, 0x182)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, dpl=3, present=0))
    assert refused(cpu, memory, 0x30) == Fault(11, 0x183)
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(11, 0x182)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, dpl=3))
    assert deliver(cpu, memory, 0x30, kind=SOFT_INT, return_rip=0x102) is None
    assert memory.read_u(0xAFEC, 4) == 0x102


def test_task_gate_leads_to_a_task_switch(memory):
    cpu = protected()
    put_gate(memory, 8, gate(TR, 0, 0x5))
    assert refused(cpu, memory, 8, kind=EXCEPTION, error_code=0) == Fault(13, 0x29)  # its task is busy


def test_int1_and_hardware_events_ask_no_gate_privilege(memory):
    put_gate(memory, 1, gate(CODE0, 0x400, INT32, dpl=0))
    for kind in (ICEBP, EXCEPTION, EXTERNAL, NMI):
        assert deliver(user(memory), memory, 1, kind=kind) is None


@pytest.mark.parametrize(
    ("selector", "fault"),
    [
        (0x03, Fault(13, 0x01)),
        (0x80, Fault(13, 0x81)),
        (DATA0, Fault(13, 0x11)),
        (TR, Fault(13, 0x29)),
        (CODE3, Fault(13, 0x19)),
        (ABSENT, Fault(11, 0x39)),
    ],
    ids=["null", "limit", "data", "system", "outer", "absent"],
)
def test_handlers_segment_checks(memory, selector, fault):
    cpu = protected()
    put_gate(memory, 0x30, gate(selector, 0x400, INT32))
    assert refused(cpu, memory, 0x30) == fault


def test_handler_beyond_its_segment(memory):
    cpu = protected()
    put_gate(memory, 0x30, gate(CODE16, 0x1_0000, INT32))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x01)


def test_no_room_on_the_same_stack(memory):
    cpu = protected()
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    cpu.set_segment(Seg.SS, Segment(0x10, 0, 0x8FFE, 0xC09300))
    assert refused(cpu, memory, 0x30) == Fault(12, 0x01)
    cpu.set_segment(Seg.SS, Segment(0x10, 0, 0x8FFF, 0xC09300))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None


def test_expand_down_stack(memory):
    cpu = protected()
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    cpu.set_segment(Seg.SS, Segment(0x10, 0, 0x8FF4, 0x409700))
    assert refused(cpu, memory, 0x30) == Fault(12, 0x01)
    cpu.set_segment(Seg.SS, Segment(0x10, 0, 0x8FF3, 0x409700))
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    cpu = protected()
    cpu.gpr[4] = 2
    cpu.set_segment(Seg.SS, Segment(0x10, 0, 0x100, 0x009700))  # 16-bit: up to 0xFFFF
    assert refused(cpu, memory, 0x30) == Fault(12, 0x01)


def test_a_gate_beyond_memory_is_no_gate(memory):
    cpu = protected()
    cpu.idt = DescriptorTable(0x100_0000, 0x7FF)
    assert refused(cpu, memory, 0x30) == Fault(13, 0x183)


# ---- virtual-8086 mode -------------------------------------------------------------------------------------


def v86(memory):
    cpu = user(memory)
    cpu.rflags = 0x2_3202  # VM, IOPL 3, IF
    for which, selector in zip((Seg.ES, Seg.CS, Seg.SS, Seg.DS, Seg.FS, Seg.GS), range(0x101, 0x107), strict=True):
        cpu.set_segment(which, Segment(selector, selector << 4, 0xFFFF, 0xF300))
    return cpu


def test_out_of_virtual_8086_mode(memory):
    cpu = v86(memory)
    put_gate(memory, 13, gate(CODE0, 0x400, INT32))
    assert deliver(cpu, memory, 13, kind=EXCEPTION, error_code=0) is None
    assert words(memory, 0xAFD8, 10, 4) == [
        0, 0x100, 0x102, 0x3_3202, 0xA000, 0x103, 0x101, 0x104, 0x105, 0x106,
    ]  # fmt: skip
    assert (cpu.cpl, cpu.rflags, cpu.gpr[4]) == (0, 0x3002, 0xAFD8)
    assert all(cpu.segment(which) == Segment(0, 0, 0, 0) for which in (Seg.ES, Seg.DS, Seg.FS, Seg.GS))
    assert cpu.segment(Seg.SS).selector == 0x10


def test_virtual_8086_mode_needs_a_ring_0_handler(memory):
    cpu = v86(memory)
    for selector, error in ((CODE3, 0x19), (CONFORMING, 0x31)):
        put_gate(memory, 0x30, gate(selector, 0x400, INT32))
        assert refused(cpu, memory, 0x30) == Fault(13, error)
    put_entry(memory, CODE0, descriptor(0, 0xFFFFF, 0xBB, 0xC))  # ring 1
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    assert refused(cpu, memory, 0x30) == Fault(13, 0x09)


def test_int_n_in_virtual_8086_mode_needs_iopl_3(memory):
    cpu = v86(memory)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, dpl=3))
    put_gate(memory, 3, gate(CODE0, 0x500, INT32, dpl=3))
    cpu.rflags = 0x2_2202
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(13, 0)
    other = cpu.copy()
    assert deliver(other, memory, 3, kind=SOFT_EXC) is None
    cpu.rflags = 0x2_3202
    assert deliver(cpu, memory, 0x30, kind=SOFT_INT) is None
    assert cpu.rip == 0x400


# ---- long mode ---------------------------------------------------------------------------------------------

HANDLER = 0xFFFF_8000_0000_0400


def test_long_mode_frame_is_aligned_and_holds_ss_rsp(memory):
    cpu = long_mode(memory)
    cpu.gpr[4] = 0x900F
    cpu.rflags = 0x1_4302
    cpu.interrupt_shadow = True
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert words(memory, 0x8FD8, 5, 8) == [0x100, 0x50, 0x1_4302, 0x900F, 0x10]
    assert (cpu.rip, cpu.gpr[4], cpu.rflags, cpu.cpl) == (HANDLER, 0x8FD8, 0x2, 0)
    assert cpu.segment(Seg.CS) == Segment(0x50, 0, 0xFFFF_FFFF, 0xA09B00)
    assert cpu.segment(Seg.SS).selector == 0x10
    assert not cpu.interrupt_shadow


def test_long_mode_error_code_and_trap_gate(memory):
    cpu = long_mode(memory)
    put_gate(memory, 14, gate64(CODE64, HANDLER, 0xF), 16)
    assert deliver(cpu, memory, 14, kind=EXCEPTION, error_code=2) is None
    assert words(memory, 0x8FD0, 6, 8) == [2, 0x100, 0x50, 0x1_0202, 0x9000, 0x10]
    assert cpu.rflags == 0x202


def test_long_mode_inner_privilege_loads_a_null_ss(memory):
    cpu = long_mode(memory, cpl=3)
    memory.write_u(TSS + 4, 8, 0xB008)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert words(memory, 0xAFD8, 5, 8) == [0x100, 0x5B, 0x202, 0xA000, 0x23]
    assert (cpu.cpl, cpu.gpr[4]) == (0, 0xAFD8)
    assert cpu.segment(Seg.CS).selector == 0x50
    assert cpu.segment(Seg.SS) == Segment(0, 0, 0, 0)


def test_ist_is_used_at_any_privilege(memory):
    memory.write_u(TSS + 0x24 + 8 * 6, 8, 0xC000)
    put_gate(memory, 2, gate64(CODE64, HANDLER, ist=7), 16)
    for cpl, ss in ((0, 0x10), (3, 0)):
        cpu = long_mode(memory, cpl=cpl)
        assert deliver(cpu, memory, 2, kind=NMI) is None
        assert cpu.gpr[4] == 0xBFD8
        assert cpu.segment(Seg.SS).selector == ss


def test_long_mode_conforming_handler(memory):
    cpu = long_mode(memory, cpl=3)
    put_entry(memory, CODE64, descriptor(0, 0xFFFFF, 0x9F, 0xA))
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert (cpu.cpl, cpu.segment(Seg.CS).selector, cpu.gpr[4]) == (3, 0x53, 0x9FD8)


def test_long_mode_gate_checks(memory):
    cpu = long_mode(memory, cpl=3)
    cpu.idt = DescriptorTable(IDT, 0x30E)
    assert refused(cpu, memory, 0x30) == Fault(13, 0x183)
    cpu.idt = DescriptorTable(IDT, 0x30F)
    for type_ in (0x5, 0x6, 0xC, 0x1E):
        put_gate(memory, 0x30, gate64(CODE64, HANDLER, type_), 16)
        assert refused(cpu, memory, 0x30) == Fault(13, 0x183)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER, dpl=2), 16)
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(13, 0x182)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER, dpl=3, present=0), 16)
    assert refused(cpu, memory, 0x30, kind=SOFT_INT) == Fault(11, 0x182)


@pytest.mark.parametrize(
    ("selector", "entry", "fault"),
    [
        (0, None, Fault(13, 0x01)),
        (CODE0, None, Fault(13, 0x09)),
        (CODE64, descriptor(0, 0xFFFFF, 0x9B, 0xE), Fault(13, 0x51)),
        (CODE64_3, None, Fault(13, 0x59)),
        (CODE64, descriptor(0, 0xFFFFF, 0x1B, 0xA), Fault(11, 0x51)),
    ],
    ids=["null", "32-bit", "L and D", "outer", "absent"],
)
def test_long_mode_handler_checks(memory, selector, entry, fault):
    cpu = long_mode(memory)
    if entry is not None:
        put_entry(memory, selector, entry)
    put_gate(memory, 0x30, gate64(selector, HANDLER), 16)
    assert refused(cpu, memory, 0x30) == fault


def test_long_mode_canonical_checks(memory):
    cpu = long_mode(memory)
    put_gate(memory, 0x30, gate64(CODE64, 0x8000_0000_0000), 16)
    assert refused(cpu, memory, 0x30) == Fault(13, 0x01)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    for rsp in (0x8000_0000_0010, 0xFFFF_8000_0000_0010):
        cpu.gpr[4] = rsp
        assert refused(cpu, memory, 0x30) == Fault(12, 0x01)


def test_long_mode_stack_beyond_the_task_state_segment(memory):
    cpu = long_mode(memory, cpl=3)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 10, 0x8B00))
    assert refused(cpu, memory, 0x30) == Fault(10, 0x29)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER, ist=1), 16)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 0x2A, 0x8B00))
    assert refused(cpu, memory, 0x30) == Fault(10, 0x29)
    cpu.set_segment(Seg.TR, Segment(TR, TSS, 0x2B, 0x8B00))
    memory.write_u(TSS + 0x24, 8, 0xC000)
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None


# ---- page faults on the way --------------------------------------------------------------------------------


def unmap(memory, page, bits=0):
    memory.write_u(0x1_3000 + 8 * page, 8, page << 12 | bits)


def test_page_faults_while_delivering(memory):
    memory.write_u(TSS + 4, 8, 0xB000)
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    for page, fault in (
        (IDT >> 12, Fault(14, 0, IDT + 0x300)),
        (GDT >> 12, Fault(14, 0, GDT + 0x50)),
        (TSS >> 12, Fault(14, 0, TSS + 4)),
        (0xA, Fault(14, 2, 0xAFF8)),
    ):
        cpu = long_mode(memory, cpl=3)
        unmap(memory, page)
        assert refused(cpu, memory, 0x30) == fault


def test_read_only_stack_and_descriptor(memory):
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    cpu = long_mode(memory)
    unmap(memory, 8, 0x65)
    assert refused(cpu, memory, 0x30) == Fault(14, 3, 0x8FF8)
    cpu = long_mode(memory)
    put_entry(memory, CODE64, descriptor(0, 0xFFFFF, 0x9A, 0xA))
    unmap(memory, 1, 0x65)
    assert refused(cpu, memory, 0x30) == Fault(14, 3, GDT + 0x55)


def test_frame_across_two_pages_faults_where_the_pushes_first_fail(memory):
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    for missing, address in (((8,), 0x8FF8), ((9,), 0x9008), ((8, 9), 0x9008)):
        cpu = long_mode(memory)
        cpu.gpr[4] = 0x9010
        for page in missing:
            unmap(memory, page)
        assert refused(cpu, memory, 0x30) == Fault(14, 2, address)
    cpu = long_mode(memory)
    cpu.gpr[4] = 0x9010
    assert deliver(cpu, memory, 0x30, kind=EXTERNAL) is None
    assert words(memory, 0x8FE8, 5, 8) == [0x100, 0x50, 0x202, 0x9010, 0x10]


def test_smap_guards_frames_whatever_ac_says(memory):
    put_gate(memory, 0x30, gate64(CODE64, HANDLER), 16)
    cpu = long_mode(memory)
    for page in range(6):
        unmap(memory, page, 0x63)
    cpu.cr4 |= 1 << 21
    cpu.rflags |= 0x4_0000
    assert refused(cpu, memory, 0x30) == Fault(14, 3, 0x8FF8)


def test_protected_mode_page_faults(memory):
    cpu = user(memory)
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    memory.write_u(0x2_0000, 4, 0x2_1067)
    cpu.cr0, cpu.cr3 = 0x8001_0011, 0x2_0000
    for page in range(0x40):
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)
    for page, fault in (
        (IDT >> 12, Fault(14, 0, IDT + 0x180)),
        (GDT >> 12, Fault(14, 0, GDT + 8)),
        (TSS >> 12, Fault(14, 0, TSS + 4)),
        (0xA, Fault(14, 2, 0xAFFC)),
    ):
        memory.write_u(0x2_1000 + 4 * page, 4, 0)
        assert refused(cpu, memory, 0x30) == fault
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)
    put_entry(memory, DATA0, descriptor(0, 0xFFFFF, 0x92, 0xC))
    memory.write_u(0x2_1000 + 4, 4, 0x1065)
    assert refused(cpu, memory, 0x30) == Fault(14, 3, GDT + 0x15)
    memory.write_u(TSS + 8, 4, 0x0C)  # an LDT on a missing page
    cpu.set_segment(Seg.LDTR, Segment(LDT_SEL, LDT, 0x2F, 0x8200))
    memory.write_u(0x2_1000 + 4 * 4, 4, 0)
    assert refused(cpu, memory, 0x30) == Fault(14, 0, LDT + 8)


def test_wrapping_frame_faults_push_by_push(memory):
    cpu = protected()
    load(cpu, Seg.SS, STACK16)
    cpu.gpr[4] = 4
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32))
    memory.write_u(0x2_0000, 4, 0x2_1067)
    cpu.cr0, cpu.cr3 = 0x8001_0011, 0x2_0000
    for page in range(0xF):
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)
    assert refused(cpu, memory, 0x30) == Fault(14, 2, 0xFFFC)


def test_real_mode_reads_through_no_tables_but_faults_are_values():
    """Paging cannot be on in real mode; a state load may still say so, and the answer is a fault."""
    memory = new_memory()
    cpu = real_mode(memory)
    cpu.cr0, cpu.cr3 = 0x8000_0010, 0x2_0000
    assert refused(cpu, memory, 0x21) == Fault(14, 0, 0x84)
    memory.write_u(0x2_0000, 4, 0x2_1067)
    memory.write_u(0x2_1000, 4, 0x67)
    assert refused(cpu, memory, 0x21) == Fault(14, 2, 0x1_7FFE)


# ---- faults upon faults ------------------------------------------------------------------------------------


def test_a_fault_while_delivering_an_interrupt_is_delivered_instead(memory):
    cpu = protected()
    put_gate(memory, 11, gate(CODE0, 0xB00, INT32))
    put_gate(memory, 0x30, gate(CODE0, 0x400, INT32, present=0))
    assert deliver_event(cpu, memory, 0x30, kind=EXTERNAL) == 11
    assert words(memory, 0x8FF0, 4, 4) == [0x183, 0x100, 0x08, 0x1_0202]
    cpu = protected()
    assert deliver_event(cpu, memory, 0x30, kind=SOFT_INT, return_rip=0x102) == 11
    assert words(memory, 0x8FF0, 2, 4) == [0x182, 0x100]  # the INT itself faults: RIP at it


def test_contributory_upon_contributory_is_a_double_fault(memory):
    cpu = protected()
    put_gate(memory, 13, gate(CODE0, 0xD00, INT32, present=0))
    put_gate(memory, 8, gate(CODE0, 0x800, INT32))
    assert deliver_event(cpu, memory, 13, kind=EXCEPTION, error_code=0x18) == 8
    assert words(memory, 0x8FF0, 4, 4) == [0, 0x100, 0x08, 0x202]


def test_a_fault_upon_a_double_fault_shuts_down(memory):
    cpu = protected()
    cpu.idt = DescriptorTable(IDT, 0)
    before = cpu.copy()
    assert deliver_event(cpu, memory, 0x30, kind=EXTERNAL) == SHUTDOWN
    assert cpu == before


def test_a_page_fault_upon_a_page_fault(memory):
    cpu = long_mode(memory, cpl=3)
    cpu.cr2 = 0x1111
    memory.write_u(TSS + 4, 8, 0xB000)
    memory.write_u(TSS + 0x24, 8, 0xD000)
    put_gate(memory, 14, gate64(CODE64, HANDLER), 16)
    put_gate(memory, 8, gate64(CODE64, HANDLER + 0x100, ist=1), 16)
    unmap(memory, 0xA)
    assert deliver_event(cpu, memory, 14, kind=EXCEPTION, error_code=6) == 8
    assert cpu.cr2 == 0xAFF8
    assert words(memory, 0xCFD0, 3, 8) == [0, 0x100, 0x5B]


def test_a_page_fault_after_a_contributory_fault_is_delivered(memory):
    cpu = long_mode(memory)
    put_gate(memory, 13, gate64(CODE64, HANDLER, ist=1), 16)
    put_gate(memory, 14, gate64(CODE64, HANDLER + 0x100), 16)
    memory.write_u(TSS + 0x24, 8, 0xD000)
    unmap(memory, 0xC)
    assert deliver_event(cpu, memory, 13, kind=EXCEPTION, error_code=0) == 14
    assert (cpu.cr2, words(memory, 0x8FD0, 1, 8)) == (0xCFF8, [2])


def test_the_first_event_counts_as_an_exception_only_if_it_is_one(memory):
    """INT 13 is benign, #GP is not."""
    put_gate(memory, 13, gate(CODE0, 0xD00, INT32, dpl=3, present=0))
    put_gate(memory, 11, gate(CODE0, 0xB00, INT32))
    put_gate(memory, 8, gate(CODE0, 0x800, INT32))
    assert deliver_event(protected(), memory, 13, kind=SOFT_INT) == 11
    assert deliver_event(protected(), memory, 13, kind=EXCEPTION, error_code=0) == 8
