"""Descriptors, limits and frames (SDM vol. 3A, 3.4.5 and 5.3)."""

from __future__ import annotations

import pytest
from fake_cpu import GDT, LDT, descriptor, new_memory, protected

from aiovm.engine.base import Seg, Segment
from aiovm.page_walk import PagingRegs
from aiovm.segmentation import (
    Fault,
    in_limit,
    load_descriptor,
    mark_accessed,
    push_frame,
    read_system,
    segment_of,
    write_system,
)

FLAT = PagingRegs(cr0=1, cr3=0, cr4=0, efer=0)


@pytest.fixture
def memory():
    return new_memory()


def test_descriptor_fields():
    assert segment_of(0x08, 0x00CF_9B00_0000_FFFF) == Segment(0x08, 0, 0xFFFF_FFFF, 0x00C0_9B00)
    assert segment_of(0x1B, 0x1240_F334_5678_9ABC) == Segment(0x1B, 0x1234_5678, 0x9ABC, 0x0040_F300)
    assert segment_of(0x08, 0x008F_9200_0000_0001) == Segment(0x08, 0, 0xF000_1FFF, 0x0080_9200)


@pytest.mark.parametrize(
    ("segment", "offset", "size", "inside"),
    [
        (Segment(0, 0, 0xFFF, 0x9300), 0xFFC, 4, True),
        (Segment(0, 0, 0xFFF, 0x9300), 0xFFD, 4, False),
        (Segment(0, 0, 0xFFF, 0x9B00), 0xFFF, 1, True),
        (Segment(0, 0, 0xFFF, 0x9F00), 0x800, 1, True),  # conforming code does not expand down
        (Segment(0, 0, 0xFFF, 0x9700), 0xFFF, 1, False),
        (Segment(0, 0, 0xFFF, 0x9700), 0x1000, 1, True),
        (Segment(0, 0, 0xFFF, 0x9700), 0xFFFF, 2, False),
        (Segment(0, 0, 0xFFF, 0x40_9700), 0xFFFF, 2, True),
        (Segment(0, 0, 0xFFF, 0x40_9700), 0xFFFF_FFFF, 2, False),
    ],
)
def test_limits(segment, offset, size, inside):
    assert in_limit(segment, offset, size) is inside


def test_tables_and_their_limits(memory):
    cpu = protected()
    assert load_descriptor(cpu, memory, FLAT, 0x08, 13, 1) == 0x00CF_9B00_0000_FFFF
    assert load_descriptor(cpu, memory, FLAT, 0x7B, 13, 1) == 0
    assert load_descriptor(cpu, memory, FLAT, 0x80, 13, 1) == Fault(13, 0x81)
    assert load_descriptor(cpu, memory, FLAT, 0x04, 10, 0) == Fault(10, 0x04)
    cpu.set_segment(Seg.LDTR, Segment(0x60, LDT, 0x0F, 0x8200))
    memory.write_u(LDT + 8, 8, 0x1234)
    assert load_descriptor(cpu, memory, FLAT, 0x0F, 13, 1) == 0x1234
    assert load_descriptor(cpu, memory, FLAT, 0x14, 13, 1) == Fault(13, 0x15)


def test_accessed_is_set_once(memory):
    cpu = protected()
    entry = descriptor(0, 0xFFFF, 0x92)
    assert mark_accessed(cpu, memory, FLAT, 0x70, entry) == descriptor(0, 0xFFFF, 0x93)
    assert memory.read_u(GDT + 0x75, 1) == 0x93
    assert mark_accessed(cpu, memory, FLAT, 0x78, descriptor(0, 0, 0x93)) == descriptor(0, 0, 0x93)
    assert memory.read_u(GDT + 0x7D, 1) == 0


def test_no_memory_reads_all_ones_and_drops_stores(memory):
    assert read_system(memory, FLAT, 0x1000_0000, 6) == 0xFFFF_FFFF_FFFF
    assert write_system(memory, FLAT, 0x1000_0000, b"abcd", 4) is None


def test_frames_wrap_and_keep_the_upper_half_of_esp(memory):
    ss = Segment(0, 0x1_0000, 0xFFFF, 0x9300)
    assert push_frame(memory, FLAT, ss, 0x7777_0002, [0x1111, 0x2222], 2, 0) == 0x7777_FFFE
    assert (memory.read_u(0x1_0000, 2), memory.read_u(0x1_FFFE, 2)) == (0x1111, 0x2222)
    assert push_frame(memory, FLAT, ss, 0x7777_0004, [0x11111, 0x2222], 2, 0) == 0x7777_0000
    assert memory.read_u(0x1_0000, 4) == 0x1111_2222


def test_page_faults_are_values(memory):
    memory.write_u(0x2_0000, 4, 0x2_1067)
    for page in range(8):
        memory.write_u(0x2_1000 + 4 * page, 4, page << 12 | 0x67)
    regs = PagingRegs(cr0=0x8000_0001, cr3=0x2_0000, cr4=0, efer=0)
    assert read_system(memory, regs, 0x8004, 4) == Fault(14, 0, 0x8004)
    assert write_system(memory, regs, 0x7FFC, b"abcdefgh", 4) == Fault(14, 2, 0x8000)
    assert write_system(memory, regs, 0x8000, b"abcdefgh", 4) == Fault(14, 2, 0x8004)
    ss = Segment(0, 0, 0xFFFF, 0x9300)
    assert push_frame(memory, regs, ss, 0x9000, [1, 2], 2, 0) == Fault(14, 2, 0x8FFE)
    assert push_frame(memory, regs, ss, 2, [1, 2], 2, 0) == Fault(14, 2, 0xFFFE)
    assert push_frame(memory, regs, Segment(0, 0, 0xFF, 0x9300), 0x102, [1], 2, 0x11) == Fault(12, 0x11)


def test_an_item_across_two_pages_faults_where_it_is_missing(memory):
    memory.write_u(0x2_0000, 4, 0x2_1067)
    memory.write_u(0x2_1000 + 4 * 8, 4, 0x8067)
    regs = PagingRegs(cr0=0x8000_0001, cr3=0x2_0000, cr4=0, efer=0)
    assert write_system(memory, regs, 0x8FFE, b"abcd", 4) == Fault(14, 2, 0x9000)
