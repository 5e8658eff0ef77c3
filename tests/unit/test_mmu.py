"""Memory by linear address and nested contexts."""

from __future__ import annotations

import pytest

from aiovm.memory import GuestMemory, SlotFlags
from aiovm.mmu import IoNeeded, Mmu, VcpuMmu, read_virt, read_virt_u, write_virt
from aiovm.page_walk import PageFault, PagingRegs, Translation

WRITE, USER = 2, 4
PG_PE = 0x8000_0001
WP = 1 << 16
PAE = 1 << 5
LONG_NX = 0xD00
ROM = 0x8_0000


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, ROM)
    m.set_region(1, ROM, 0x1_0000, flags=SlotFlags.READONLY)
    return m


def long_regs(**changes):
    values = {"cr0": PG_PE | WP, "cr3": 0x1000, "cr4": PAE, "efer": LONG_NX}
    return PagingRegs(**(values | changes))


def long_tables(m, pte, *, pde=0x4067, pdpte=0x3067, pml4e=0x2067):
    """gva 0x5000 through tables at 0x1000, 0x2000, 0x3000, 0x4000."""
    m.write_u(0x1000, 8, pml4e)
    m.write_u(0x2000, 8, pdpte)
    m.write_u(0x3000, 8, pde)
    m.write_u(0x4000 + 5 * 8, 8, pte)


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_bytes_across_pages(memory):
    long_tables(memory, 0x6067)
    memory.write_u(0x4030, 8, 0x9067)
    regs = long_regs()
    assert write_virt(memory, regs, 0x5FFE, b"abcd") is None
    assert (memory.read(0x6FFE, 2), memory.read(0x9000, 2)) == (b"ab", b"cd")
    assert read_virt(memory, regs, 0x5FFE, 4) == b"abcd"
    assert read_virt(memory, regs, 0x5FFE, 1) == b"a"
    assert write_virt(memory, regs, 0x5000, b"z") is None
    assert memory.read(0x6000, 1) == b"z"


def test_a_write_that_faults_in_its_second_page_stores_nothing(memory):
    long_tables(memory, 0x6067)
    regs = long_regs()
    assert write_virt(memory, regs, 0x5FFE, b"abcd", USER) == PageFault(0x6, 0x6000)
    assert memory.read(0x6FFE, 2) == b"\0\0"
    assert read_virt(memory, regs, 0x5FFE, 4) == PageFault(0x0, 0x6000)
    assert read_virt(memory, regs, 0x7000, 1, USER) == PageFault(0x4, 0x7000)
    assert write_virt(memory, regs, 0x7000, b"a") == PageFault(0x2, 0x7000)


def test_pages_without_memory_are_io(memory):
    long_tables(memory, 0x6067)
    memory.write_u(0x4030, 8, 0x4000_0067)
    memory.write_u(0x4038, 8, ROM | 0x67)
    regs = long_regs()
    assert read_virt(memory, regs, 0x6004, 1) == IoNeeded(0x4000_0004)
    assert write_virt(memory, regs, 0x6004, b"a") == IoNeeded(0x4000_0004)
    assert read_virt(memory, regs, 0x5FFF, 2) == IoNeeded(0x4000_0000)
    assert write_virt(memory, regs, 0x5FFF, b"ab") == IoNeeded(0x4000_0000)
    assert memory.read(0x6FFF, 1) == b"\0"
    assert write_virt(memory, regs, 0x7004, b"a") == IoNeeded(ROM + 4)
    assert read_virt(memory, regs, 0x7004, 1) == b"\0"


def test_integers(memory):
    long_tables(memory, 0x6067)
    memory.write_u(0x4030, 8, 0x4000_0067)
    regs = long_regs()
    memory.write(0x6FF8, b"\x11\x22\x33\x44\x55\x66\x77\x88")
    assert read_virt_u(memory, regs, 0x5FF8, 8) == 0x8877_6655_4433_2211
    assert read_virt_u(memory, regs, 0x5FF8, 4, USER) == 0x4433_2211
    assert read_virt_u(memory, regs, 0x5FFC, 8) == IoNeeded(0x4000_0000)
    assert read_virt_u(memory, regs, 0x6000, 8) == IoNeeded(0x4000_0000)
    assert read_virt_u(memory, regs, 0x8000, 8, USER) == PageFault(0x4, 0x8000)
    assert read_virt_u(memory, PagingRegs(cr0=1, cr3=0, cr4=0, efer=0), 0x6FF8, 2) == 0x2211


def test_linear_addresses_wrap_at_32_bits_outside_long_mode(memory):
    regs = PagingRegs(cr0=1, cr3=0, cr4=0, efer=0)
    memory.set_region(2, 0xFFFF_F000, 0x1000)
    assert write_virt(memory, regs, 0xFFFF_FFFE, b"abcd") is None
    assert memory.read(0, 2) == b"cd"
    assert read_virt(memory, regs, 0xFFFF_FFFE, 4) == b"abcd"


# ---- contexts --------------------------------------------------------------------------------------------------------


def nested_tables(m):
    """Outer tables at 0x1_0000 that map guest pages 0..7 to 0x2_0000 and up, and 8 nowhere."""
    m.write_u(0x1_0000, 8, 0x1_1007)
    m.write_u(0x1_1000, 8, 0x1_2007)
    m.write_u(0x1_2000, 8, 0x1_3007)
    for page in range(8):
        m.write_u(0x1_3000 + 8 * page, 8, 0x2_0000 + 0x1000 * page | 7)
    return long_regs(cr3=0x1_0000)


def inner_tables(m, pte):
    """The nested guest's tables at guest 0x1000 and up, that is 0x2_1000 and up."""
    m.write_u(0x2_1000, 8, 0x2007)
    m.write_u(0x2_2000, 8, 0x3007)
    m.write_u(0x2_3000, 8, 0x4007)
    m.write_u(0x2_4028, 8, pte)


def test_nested_walk_goes_through_both_tables(memory):
    tables = nested_tables(memory)
    inner_tables(memory, 0x6007)
    contexts = VcpuMmu(memory, long_regs)
    assert contexts.walk_mmu is contexts.mmu
    assert contexts.mmu.translate_gpa(0x1234, WRITE) == 0x1234
    contexts.enter_nested(lambda: tables)
    walker = contexts.walk_mmu
    assert walker is contexts.nested_mmu
    assert walker.translate_debug(0x5004) == 0x2_6004
    assert memory.read_u(0x1_0000, 8) == 0x1_1007
    assert walker.gva_to_gpa(0x5004, WRITE) == Translation(0x2_6004, 0x1000)
    assert memory.read_u(0x2_4028, 8) == 0x6067
    assert memory.read_u(0x1_3000 + 6 * 8, 8) == 0x2_6067  # the page: written
    assert memory.read_u(0x1_3000 + 4 * 8, 8) == 0x2_4067  # a table page: written, for its Accessed bits
    contexts.leave_nested()
    assert contexts.walk_mmu is contexts.mmu
    assert contexts.nested_mmu is None


def test_nested_faults_say_whose_they_are(memory):
    tables = nested_tables(memory)
    inner_tables(memory, 0x8007)
    contexts = VcpuMmu(memory, long_regs)
    contexts.enter_nested(lambda: tables)
    assert contexts.walk_mmu.gva_to_gpa(0x5004, WRITE) == PageFault(0x6, 0x8004, nested=True)
    assert contexts.walk_mmu.gva_to_gpa(0x6004, WRITE) == PageFault(0x2, 0x6004, nested=False)
    inner_tables(memory, 0x6007)
    memory.write_u(0x1_3000 + 3 * 8, 8, 0)  # the page directory's page
    assert contexts.walk_mmu.gva_to_gpa(0x5004) == PageFault(0x6, 0x3000, nested=True)
    assert contexts.walk_mmu.translate_debug(0x5004) is None


def test_nested_walk_of_the_other_modes(memory):
    tables = nested_tables(memory)
    outer = Mmu(memory, lambda: tables)
    real_mode = PagingRegs(cr0=0, cr3=0, cr4=0, efer=0)
    assert Mmu(memory, lambda: real_mode, outer).gva_to_gpa(0x7001) == Translation(0x2_7001, 0x1000)
    assert Mmu(memory, lambda: real_mode, outer).gva_to_gpa(0x8001) == PageFault(0x4, 0x8001, nested=True)

    memory.write_u(0x2_1000, 4, 0x2007)
    memory.write_u(0x2_2014, 4, 0x6007)
    memory.write_u(0x2_2018, 4, 0x9007)
    two = Mmu(memory, lambda: PagingRegs(cr0=PG_PE, cr3=0x1000, cr4=0, efer=0), outer)
    assert two.gva_to_gpa(0x5001) == Translation(0x2_6001, 0x1000)
    assert two.gva_to_gpa(0x6001) == PageFault(0x4, 0x9001, nested=True)
    lost = Mmu(memory, lambda: PagingRegs(cr0=PG_PE, cr3=0x8000, cr4=0, efer=0), outer)
    assert lost.gva_to_gpa(0x5001) == PageFault(0x6, 0x8000, nested=True)

    memory.write_u(0x2_3000, 8, 0x4001)
    memory.write_u(0x2_4000, 8, 0x5007)
    memory.write_u(0x2_5000 + 8 * 5, 8, 0x6007)
    pae = PagingRegs(cr0=PG_PE, cr3=0x3000, cr4=PAE, efer=0)
    assert Mmu(memory, lambda: pae, outer).gva_to_gpa(0x5001) == Translation(0x2_6001, 0x1000)
    assert Mmu(memory, lambda: pae._replace(cr3=0x8000), outer).gva_to_gpa(0x5001) == PageFault(
        0x4, 0x8000, nested=True
    )
