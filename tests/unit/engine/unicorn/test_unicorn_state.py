"""Registers through the engine: reset, INIT, flags, segments, the FPU."""

import pytest
from core_machine import DATA, code, start64

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.exits import BUDGET, Hlt


def test_reset(make):
    m = make()
    s = m.state
    m.engine.signature = 0x306C4
    s.gpr[5], s.cr2, s.rflags = 5, 6, 0xCD7
    s.set_dr(0, 1)
    m.context.msr_writer(0xC000_0082)(0x1000)
    m.context.reset(init=False)
    assert [s.gpr[n] for n in range(16)] == [0, 0, 0x306C4] + [0] * 13
    assert (s.rip, s.rflags) == (0xFFF0, 2)
    assert (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) == (0x6000_0010, 0, 0, 0, 0)
    assert s.segment(Seg.CS) == Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B00)
    for which in (Seg.DS, Seg.ES, Seg.SS, Seg.FS, Seg.GS):
        assert s.segment(which) == Segment(0, 0, 0xFFFF, 0x9300)
    assert s.segment(Seg.LDTR) == Segment(0, 0, 0xFFFF, 0x8200)
    assert s.segment(Seg.TR) == Segment(0, 0, 0xFFFF, 0x8B00)
    assert s.gdt == s.idt == DescriptorTable(0, 0xFFFF)
    assert [s.get_dr(n) for n in (0, 1, 2, 3, 6, 7)] == [0, 0, 0, 0, 0xFFFF_0FF0, 0x400]
    assert (s.cpl, s.interrupt_shadow, s.long_mode) == (0, False, False)
    assert m.context.read_msr(0xC000_0082) == 0


def test_init_keeps_cache_bits_msrs_and_the_fpu(make):
    m = make("66480f6ec0 f4")  # movq xmm0, rax; hlt
    m.gpr[0] = 0x1234_5678
    assert m.run() == Hlt(False)
    m.context.msr_writer(0xC000_0082)(0xABC0)
    m.state.cr0 = 0xC001_0033  # PG, CD... but not NW
    m.context.reset(init=True)
    s = m.state
    assert (s.cr0, s.cr3, s.cr4, s.efer) == (0x4000_0010, 0, 0, 0)
    assert (s.rip, s.rflags, s.gpr[0]) == (0xFFF0, 2, 0)
    assert s.segment(Seg.CS).base == 0xFFFF_0000
    assert m.context.read_msr(0xC000_0082) == 0xABC0
    m.memory.write(0x11000, code("66480f7ec0 f4"))  # movq rax, xmm0; hlt
    start64(m.context, 0x11000)
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x1234_5678


def test_power_on_fpu_state(make):
    m = make("0fae1c2500000300 9bd93c2508000300 f4")  # stmxcsr [0x30000]; fstcw [0x30008]; hlt
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 4) == 0x1F80
    assert m.memory.read_u(DATA + 8, 2) == 0x37F


@pytest.mark.parametrize("loaded", [False, True])
def test_flags_round_trip(make, loaded):
    m = make("90")
    if loaded:
        m.engine.load(m.context)
    for value in (0x2, 0xCD7, 0x202, 0x10246, 0x3002, 0x24_0002):
        m.state.rflags = value
        assert m.state.rflags == value


def test_segments_and_tables_round_trip(make):
    m = make()
    for which in Seg:
        flags = 0x8200 if which == Seg.LDTR else 0x8B00 if which == Seg.TR else 0x9300
        value = Segment(0x20 + which, 0x1_2345_6000 + which, 0xFFFFF, flags)
        m.state.set_segment(which, value)
        assert m.state.segment(which) == value
    m.state.gdt, m.state.idt = DescriptorTable(0xFFFF_8000_0000_1000, 0x7F), DescriptorTable(0x2000, 0xFFF)
    assert m.state.gdt == DescriptorTable(0xFFFF_8000_0000_1000, 0x7F)
    assert m.state.idt == DescriptorTable(0x2000, 0xFFF)


def test_a_segment_describes_itself():
    s = Segment(0x33, 0, 0xFFFF_FFFF, 0xAF_FB00)
    assert (s.type, s.dpl, s.present, s.long, s.default_big) == (0xB, 3, True, True, False)
    assert Segment(0, 0, 0, 0x40_0000).default_big is True


def test_the_stack_segment_sets_the_privilege_level(make):
    m = make()
    m.state.set_segment(Seg.SS, Segment(0x2B, 0, 0xFFFF_FFFF, 0xCF_F300))
    assert m.state.cpl == 3
    m.state.cpl = 1
    assert m.state.cpl == 1


def test_virtual_8086_code_runs_at_cpl_3(make):
    m = make()
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    m.state.rflags = 0x2_0002
    assert m.state.cpl == 3


def test_the_shadow_can_be_set_and_cleared(make):
    m = make("ffc0 ffc0 f4")
    m.state.rflags = 0x202
    m.state.interrupt_shadow = True
    assert m.state.interrupt_shadow is True
    m.context.request_irq_window(True)
    assert m.run(m.cells[0] + 1) in (BUDGET, Hlt(True))
    assert all(rip >= 0x10002 for rip, *_ in m.seen("window"))
