"""Exceptions that the C hook delivers by itself, and where they go without it."""

from core_machine import CODE, DATA, LONG, NOWHERE, STACK, start64

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.exits import Budget, GuestException, Hlt

HANDLER = CODE + 0x100


def with_handler(make, *parts):
    """``parts``, and a handler of #PF that is HLT. Nothing is left to be set in the page tables."""
    m = make(*parts)
    for at, entry in ((0x1000, 0x2027), (0x2000, 0x3027), (0x3000, 0xE7)):
        m.memory.write_u(at, 8, entry)
    m.memory.write(HANDLER, b"\xf4")
    m.memory.write_u(DATA + 8, 8, 0x00AF_9B00_0000_FFFF)
    m.memory.write_u(DATA + 0x100 + 14 * 16, 8, HANDLER & 0xFFFF | 8 << 16 | 0x8E << 40 | HANDLER >> 16 << 48)
    m.state.gdt, m.state.idt = DescriptorTable(DATA, 0xF), DescriptorTable(DATA + 0x100, 0xFFF)
    m.port.hears_exceptions = False
    return m


LOAD = "a0 0000004000000000 f4"  # mov al, [NOWHERE]; hlt


def test_a_page_fault_is_delivered_without_asking(make):
    m = with_handler(make, "f9", LOAD)  # stc
    end = m.run()
    if not (make.pointers and m.engine.native):
        assert end == GuestException(14, 0, NOWHERE)
        assert m.context.take_delivered() == b""
        return
    assert (end, m.seen("exception")) == (Hlt(False), [])
    assert (m.state.rip, m.state.cr2, m.state.cpl) == (HANDLER + 1, NOWHERE, 0)
    assert [m.memory.read_u(STACK - 48 + 8 * n, 8) for n in range(6)] == [0, CODE + 1, 8, 0x1_0003, STACK, 0x10]
    assert m.state.rflags == 3
    assert m.cells[0] == 12 * 64 // 256 + 100 + 600  # its code, an injection, and HLT's exit
    assert m.context.take_delivered() == bytes([14])
    assert m.context.take_delivered() == b""


def test_who_hears_of_exceptions_is_asked(make):
    m = with_handler(make, LOAD)
    m.port.hears_exceptions = True
    assert m.run() == GuestException(14, 0, NOWHERE)
    assert m.seen("exception") == [(CODE, 14, 0, NOWHERE)]


def test_a_single_stepped_page_fault_is_the_ports(make):
    m = with_handler(make, LOAD)
    m.state.rflags = 0x102
    assert m.run() == GuestException(14, 0, NOWHERE)


def test_what_was_delivered_is_remembered_by_each_vcpu(make):
    m = with_handler(make, LOAD)
    other = m.engine.create_context(1, m.port)
    start64(other, HANDLER)
    m.run()
    other.run(LONG)
    assert other.take_delivered() == b""
    assert m.context.take_delivered() == (bytes([14]) if make.pointers and m.engine.native else b"")


def test_faults_on_the_way_to_every_handler_take_time(make):
    """No block is ever reached, and IST begins each frame at the same place: the slice ends all the same."""
    m = with_handler(make, LOAD)
    m.memory.write_u(DATA + 0x100 + 14 * 16, 8, NOWHERE & 0xFFFF | 8 << 16 | 1 << 32 | 0x8E << 40 | NOWHERE >> 16 << 48)
    m.memory.write_u(DATA + 0x1800 + 36, 8, STACK - 0x1000)
    m.state.set_segment(Seg.TR, Segment(0x20, DATA + 0x1800, 0x67, 0x8B00))
    end = m.run(1_000_000)
    if make.pointers and m.engine.native:
        assert end == Budget()
        assert (m.state.rip, m.state.cr2) == (NOWHERE, NOWHERE)
        assert 1_000_000 <= m.cells[0] < 1_000_100
    else:
        assert end == GuestException(14, 0, NOWHERE)
