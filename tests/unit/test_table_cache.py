"""Finds in the guest's tables are found again only while the tables say the same: no store goes unseen."""

import pytest
from fake_cpu import CODE0, CODE64, ENTRIES, GDT, IDT, descriptor, gate64, long_mode, new_memory, put_entry, put_gate

from aiovm.delivery import deliver
from aiovm.engine.base import DescriptorTable
from aiovm.events import EventKind
from aiovm.segmentation import Fault
from aiovm.table_cache import TableCache

VECTOR = 14


class Machine:
    """Long mode with one handler at 0x6000; ``deliver`` uses one cache for all."""

    def __init__(self):
        self.memory = new_memory()
        self.cpu = long_mode(self.memory)
        self.start = self.cpu.copy()
        self.tables = TableCache(self.memory)
        put_gate(self.memory, VECTOR, gate64(CODE64, 0x6000), 16)

    def deliver(self):
        self.cpu = self.start.copy()
        return deliver(self.cpu, self.memory, VECTOR, kind=EventKind.EXCEPTION, error_code=2, tables=self.tables)


@pytest.fixture
def m():
    machine = Machine()
    for _ in range(3):
        assert machine.deliver() is None
        assert (machine.cpu.rip, machine.cpu.gpr[4]) == (0x6000, 0x9000 - 48)
    return machine


def test_a_gate_that_moved(m):
    put_gate(m.memory, VECTOR, gate64(CODE64, 0xFFFF_8000_0000_7000, 0xF), 16)
    assert m.deliver() is None
    assert m.cpu.rip == 0xFFFF_8000_0000_7000
    assert m.cpu.rflags & 0x200  # a trap gate


def test_a_gate_that_went(m):
    put_gate(m.memory, VECTOR, gate64(CODE64, 0x6000, present=0), 16)
    assert m.deliver() == Fault(11, VECTOR << 3 | 3)


def test_a_descriptor_that_is_no_64_bit_code_any_more(m):
    put_entry(m.memory, CODE64, ENTRIES[CODE0])
    assert m.deliver() == Fault(13, CODE64 | 1)


def test_an_accessed_bit_that_is_to_be_set_again(m):
    put_entry(m.memory, CODE64, descriptor(0, 0xFFFFF, 0x9A, 0xA))
    assert m.deliver() is None
    assert m.memory.read_u(GDT + CODE64 + 5, 1) == 0x9B


def test_a_page_table_that_leads_elsewhere(m):
    m.memory.write(0x3_0000, m.memory.read(IDT, 0x1000))
    m.memory.write(0x3_0000 + VECTOR * 16, gate64(CODE64, 0x7000).to_bytes(16, "little"))
    m.memory.write_u(0x1_3000 + 8 * (IDT >> 12), 8, 0x3_0067)
    assert m.deliver() is None
    assert m.cpu.rip == 0x7000


@pytest.mark.parametrize("entry", [0x8066, 0x8065, 0])  # not present, read-only, nothing
def test_a_stack_page_that_was_taken_away(m, entry):
    m.start.cr0 |= 1 << 16  # WP
    m.memory.write_u(0x1_3000 + 8 * 8, 8, entry)
    assert m.deliver() == Fault(14, 3 if entry & 1 else 2, 0x9000 - 8)


def test_a_stack_page_whose_dirty_bit_was_cleared(m):
    m.memory.write_u(0x1_3000 + 8 * 8, 8, 0x8027)
    assert m.deliver() is None
    assert m.memory.read_u(0x1_3000 + 8 * 8, 8) == 0x8067


def test_an_idt_that_became_short_or_moved(m):
    m.start.idt = DescriptorTable(IDT, VECTOR * 16 + 14)
    assert m.deliver() == Fault(13, VECTOR << 3 | 3)
    m.start.idt = DescriptorTable(0x3_0000, 0xFFF)
    m.memory.write(0x3_0000 + VECTOR * 16, gate64(CODE64, 0x7000).to_bytes(16, "little"))
    assert m.deliver() is None
    assert m.cpu.rip == 0x7000


def test_a_privilege_that_the_gate_does_not_give(m):
    """What was found at CPL 0 is looked at again at CPL 3."""
    m.start = long_mode(m.memory, 3)
    soft = deliver(m.start.copy(), m.memory, VECTOR, kind=EventKind.SOFT_INT, tables=m.tables)
    assert soft == Fault(13, VECTOR << 3 | 2)


def test_memory_that_was_replaced(m):
    data = m.memory.read(0, 0x4_0000)
    m.memory.set_region(0, 0, 0)
    m.memory.set_region(0, 0, 0x4_0000)
    m.memory.write(0, data)
    put_gate(m.memory, VECTOR, gate64(CODE64, 0x7000), 16)
    assert m.deliver() is None
    assert m.cpu.rip == 0x7000
    assert m.memory.read_u(0x9000 - 48, 8) == 2


def test_many_settings_and_many_stacks(m):
    """More than are kept: each is found anew, and right."""
    for n in range(300):
        m.start.cr3 = 0x1_0000 | n % 100 << 5 & 0x18
        m.start.idt = DescriptorTable(IDT, 0xFFF - n)
        m.start.gpr[4] = 0x9000 + 16 * n
        assert m.deliver() is None
        assert m.memory.read_u(m.cpu.gpr[4] + 32, 8) == 0x9000 + 16 * n
