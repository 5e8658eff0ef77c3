"""Guest page walking: known answers and each branch, numbers as the manual writes them."""

from __future__ import annotations

import pytest
from fake_cpu import FakeCpu

from aiovm.memory import GuestMemory, SlotFlags
from aiovm.page_walk import (
    Access,
    PageFault,
    PagingRegs,
    Translation,
    is_canonical,
    load_pdptrs,
    translate_debug,
    walk,
)

READ, WRITE, USER, FETCH, IMPLICIT = 0, 2, 4, 0x10, 1 << 48
PG_PE = 0x8000_0001
WP = 1 << 16
PSE, PAE, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 20, 1 << 21, 1 << 22
LONG, LONG_NX = 0x500, 0xD00
NX = 1 << 63
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


def two_level(m, pte, *, pde=0x2067):
    m.write_u(0x1000, 4, pde)
    m.write_u(0x2000 + 5 * 4, 4, pte)
    return PagingRegs(cr0=PG_PE | WP, cr3=0x1000, cr4=0, efer=0)


# ---- known answers ------------------------------------------------------------------------------------------------


def test_absent_pde_user_write(memory):
    long_tables(memory, 0x6067, pde=0)
    assert walk(memory, long_regs(), 0x5000, USER | WRITE) == PageFault(0x6, 0x5000)


def test_read_only_page_supervisor_write_with_wp(memory):
    long_tables(memory, 0x6065)
    assert walk(memory, long_regs(), 0x5008, WRITE) == PageFault(0x3, 0x5008)


def test_read_only_page_supervisor_write_without_wp_sets_dirty(memory):
    long_tables(memory, 0x6005)
    assert walk(memory, long_regs(cr0=PG_PE), 0x5008, WRITE) == Translation(0x6008, 0x1000)
    assert memory.read_u(0x4028, 8) == 0x6065


def test_supervisor_page_user_read(memory):
    long_tables(memory, 0x6063)
    assert walk(memory, long_regs(), 0x5000, USER) == PageFault(0x5, 0x5000)


def test_user_write_to_read_only_page_whatever_wp(memory):
    long_tables(memory, 0x6065)
    assert walk(memory, long_regs(cr0=PG_PE), 0x5000, USER | WRITE) == PageFault(0x7, 0x5000)


def test_nx_page_user_fetch(memory):
    long_tables(memory, NX | 0x6067)
    assert walk(memory, long_regs(), 0x5000, USER | FETCH) == PageFault(0x15, 0x5000)


def test_nx_bit_without_nxe_is_reserved(memory):
    long_tables(memory, NX | 0x6067)
    assert walk(memory, long_regs(efer=LONG), 0x5000) == PageFault(0x9, 0x5000)


def test_smep_supervisor_fetch_of_user_page(memory):
    long_tables(memory, 0x6067)
    assert walk(memory, long_regs(cr4=PAE | SMEP), 0x5000, FETCH) == PageFault(0x11, 0x5000)


def test_smap_needs_ac_and_implicit_accesses_ignore_ac(memory):
    long_tables(memory, 0x6067)
    regs = long_regs(cr4=PAE | SMAP)
    with_ac = regs._replace(rflags=0x4_0002)
    assert walk(memory, regs, 0x5000) == PageFault(0x1, 0x5000)
    assert walk(memory, with_ac, 0x5000) == Translation(0x6000, 0x1000)
    assert walk(memory, with_ac, 0x5000, IMPLICIT) == PageFault(0x1, 0x5000)
    assert walk(memory, regs, 0x5000, FETCH) == Translation(0x6000, 0x1000)
    assert walk(memory, regs, 0x5000, USER) == Translation(0x6000, 0x1000)


def test_fetch_bit_only_where_nx_or_smep_exists(memory):
    long_tables(memory, 0)
    assert walk(memory, long_regs(efer=LONG), 0x5000, USER | FETCH) == PageFault(0x4, 0x5000)
    assert walk(memory, long_regs(), 0x5000, USER | FETCH) == PageFault(0x14, 0x5000)
    regs = two_level(memory, 0)._replace(efer=0x800)
    assert walk(memory, regs, 0x5000, FETCH) == PageFault(0x0, 0x5000)
    assert walk(memory, regs._replace(cr4=SMEP), 0x5000, FETCH) == PageFault(0x10, 0x5000)


def test_upper_level_read_only(memory):
    long_tables(memory, 0x6067, pde=0x4065)
    assert walk(memory, long_regs(), 0x5000, WRITE) == PageFault(0x3, 0x5000)


def test_2m_page_with_bit_13(memory):
    long_tables(memory, 0, pde=0x20_20E7)
    assert walk(memory, long_regs(), 0x5000) == PageFault(0x9, 0x5000)


def test_pdpte_reserved_bits_refuse_the_load(memory):
    memory.write_u(0x1000, 8, 0x2003)
    assert load_pdptrs(memory, 0x1000) is None
    memory.write_u(0x1000, 8, 0x2002)  # not present: nothing else counts
    assert load_pdptrs(memory, 0x1000) == (0x2002, 0, 0, 0)
    memory.write_u(0x1018, 8, 1 << 40 | 1)
    assert load_pdptrs(memory, 0x1000) is None
    assert load_pdptrs(memory, 0x1000, maxphyaddr=41) == (0x2002, 0, 0, 1 << 40 | 1)
    assert load_pdptrs(memory, 0x4000_0000) is None


def test_page_table_in_a_hole(memory):
    long_tables(memory, 0, pde=0x4000_0067)
    assert walk(memory, long_regs(), 0x5000) == PageFault(0x0, 0x5000)
    assert walk(memory, long_regs(cr3=0x4000_0000), 0x5000) == PageFault(0x0, 0x5000)
    regs = two_level(memory, 0, pde=0x4000_0067)
    assert walk(memory, regs, 0x5000, USER) == PageFault(0x4, 0x5000)


def test_page_table_in_rom_keeps_its_bits(memory):
    memory.load_rom(ROM, (0x6007).to_bytes(8, "little"))
    long_tables(memory, 0, pde=ROM | 7)
    assert walk(memory, long_regs(), 0x0, WRITE) == Translation(0x6000, 0x1000)
    assert memory.read_u(ROM, 8) == 0x6007
    assert memory.read_u(0x3000, 8) == ROM | 0x27


def test_entry_that_changes_during_the_walk_restarts_it():
    """The guest moves the page between the read of its entry and the update of Accessed."""

    class Racing(GuestMemory):
        moved = False

        def read_u(self, gpa, size):
            if gpa == 0x4028 and not self.moved:
                self.moved = True
                self.write_u(0x4028, 8, 0x7007)
            return super().read_u(gpa, size)

    memory = Racing()
    memory.set_region(0, 0, 0x1_0000)
    long_tables(memory, 0x6007)
    assert walk(memory, long_regs(), 0x5000) == Translation(0x7000, 0x1000)
    assert memory.read_u(0x4028, 8) == 0x7027


# ---- geometry -----------------------------------------------------------------------------------------------------


def test_no_paging_is_identity_of_32_bits(memory):
    regs = PagingRegs(cr0=1, cr3=0, cr4=0, efer=0)
    assert walk(memory, regs, 0x1_0000_1234, WRITE | USER) == Translation(0x1234, 0x1000)


def test_4_level_large_pages(memory):
    long_tables(memory, 0, pde=0x20_0000 | 0x10E7)  # bit 12 is PAT
    assert walk(memory, long_regs(), 0x12345) == Translation(0x21_2345, 0x20_0000)
    long_tables(memory, 0, pdpte=0x4000_0000 | 0xE7)
    regs = long_regs()
    assert walk(memory, regs, 0x1234_5678) == Translation(0x5234_5678, 0x4000_0000)
    assert walk(memory, regs._replace(gbpages=False), 0x1234_5678) == PageFault(0x9, 0x1234_5678)
    long_tables(memory, 0, pdpte=0x4000_0000 | 1 << 13 | 0xE7)
    assert walk(memory, regs, 0) == PageFault(0x9, 0)


def test_ps_in_a_pml4e_is_reserved(memory):
    long_tables(memory, 0x6067, pml4e=0x20E7)
    assert walk(memory, long_regs(), 0x5000) == PageFault(0x9, 0x5000)


def test_physical_width_bounds_every_entry(memory):
    long_tables(memory, 1 << 40 | 0x6067)
    assert walk(memory, long_regs(), 0x5000) == PageFault(0x9, 0x5000)
    assert walk(memory, long_regs(maxphyaddr=41), 0x5000) == Translation(1 << 40 | 0x6000, 0x1000)
    long_tables(memory, 1 << 52 | 0x6067)  # 62:52 are ignored
    assert walk(memory, long_regs(), 0x5000) == Translation(0x6000, 0x1000)


def test_not_present_comes_before_reserved(memory):
    long_tables(memory, 1 << 45 | 0x6066)
    assert walk(memory, long_regs(), 0x5000) == PageFault(0x0, 0x5000)


def test_2_level_small_page_and_bits_set(memory):
    regs = two_level(memory, 0x6007, pde=0x2007)
    assert walk(memory, regs, 0x5678, USER | WRITE) == Translation(0x6678, 0x1000)
    assert memory.read_u(0x1000, 4) == 0x2027
    assert memory.read_u(0x2014, 4) == 0x6067
    assert walk(memory, regs, 0x5678 | 1 << 32) == Translation(0x6678, 0x1000)
    memory.write_u(0x2014, 4, 0)
    assert walk(memory, regs, 0x5678, USER) == PageFault(0x4, 0x5678)


def test_4m_page_needs_pse(memory):
    memory.write_u(0x1004, 4, 0x0080_00E7)
    regs = PagingRegs(cr0=PG_PE | WP, cr3=0x1000, cr4=PSE, efer=0)
    assert walk(memory, regs, 0x0041_2345) == Translation(0x0081_2345, 0x40_0000)
    assert walk(memory, regs._replace(cr4=0), 0x0041_2345) == PageFault(0x0, 0x0041_2345)  # a table in a hole
    memory.write_u(0x1004, 4, 0x0080_0000 | 0xE5)
    assert walk(memory, regs, 0x0041_2345, WRITE) == PageFault(0x3, 0x0041_2345)


def test_pse36(memory):
    memory.write_u(0x1004, 4, 0x0080_00E7 | 0xA << 13)
    regs = PagingRegs(cr0=PG_PE, cr3=0x1000, cr4=PSE, efer=0)
    assert walk(memory, regs, 0x0041_2345) == Translation(0xA_0081_2345, 0x40_0000)
    assert walk(memory, regs._replace(pse36=False), 0x0041_2345) == PageFault(0x9, 0x0041_2345)
    memory.write_u(0x1004, 4, 0x0080_00E7 | 1 << 17)
    assert walk(memory, regs, 0x0041_2345, USER) == PageFault(0xD, 0x0041_2345)


def test_pae_from_cached_pdptrs(memory):
    memory.write_u(0x3000, 8, 0x4067)
    memory.write_u(0x4000 + 5 * 8, 8, 0x6067)
    regs = PagingRegs(cr0=PG_PE | WP, cr3=0x2_0000, cr4=PAE, efer=0, pdptrs=(0, 0, 0, 0x3001))
    assert walk(memory, regs, 0xC000_5678, USER | WRITE) == Translation(0x6678, 0x1000)
    assert walk(memory, regs, 0x5678, USER) == PageFault(0x4, 0x5678)
    memory.write_u(0x4028, 8, 1 << 52 | 0x6067)  # PAE: 62:M are reserved
    assert walk(memory, regs, 0xC000_5678) == PageFault(0x9, 0xC000_5678)
    memory.write_u(0x4028, 8, NX | 0x6067)
    assert walk(memory, regs._replace(efer=0x800), 0xC000_5678, FETCH) == PageFault(0x11, 0xC000_5678)
    memory.write_u(0x3000, 8, 0x20_00E7)
    assert walk(memory, regs, 0xC000_5678) == Translation(0x20_5678, 0x20_0000)


def test_pae_without_cached_pdptrs_reads_memory(memory):
    memory.write_u(0x1028, 8, 0x3001)
    memory.write_u(0x3000, 8, 0x20_00E7)
    regs = PagingRegs(cr0=PG_PE | WP, cr3=0x1020, cr4=PAE, efer=0)
    assert walk(memory, regs, 0x4000_5678) == Translation(0x20_5678, 0x20_0000)
    memory.write_u(0x1028, 8, 0x3021)
    assert walk(memory, regs, 0x4000_5678) == PageFault(0x9, 0x4000_5678)
    assert walk(memory, regs._replace(cr3=0x4000_0000), 0x4000_5678) == PageFault(0x0, 0x4000_5678)


# ---- keys, A/D, debug -----------------------------------------------------------------------------------------------


def test_protection_keys(memory):
    long_tables(memory, 3 << 59 | 0x6067)
    regs = long_regs(cr4=PAE | PKE)
    access_off, write_off = regs._replace(pkru=1 << 6), regs._replace(pkru=2 << 6)
    ok = Translation(0x6000, 0x1000)
    assert walk(memory, regs, 0x5000, USER | WRITE) == ok
    assert walk(memory, access_off, 0x5000, USER) == PageFault(0x25, 0x5000)
    assert walk(memory, access_off, 0x5000) == PageFault(0x21, 0x5000)
    assert walk(memory, access_off, 0x5000, USER | FETCH) == ok
    assert walk(memory, write_off, 0x5000, USER) == ok
    assert walk(memory, write_off, 0x5000, USER | WRITE) == PageFault(0x27, 0x5000)
    assert walk(memory, write_off, 0x5000, WRITE) == PageFault(0x23, 0x5000)
    assert walk(memory, write_off._replace(cr0=PG_PE), 0x5000, WRITE) == ok
    assert walk(memory, access_off._replace(cr4=PAE), 0x5000, USER) == ok
    long_tables(memory, 3 << 59 | 0x6063)
    assert walk(memory, access_off, 0x5000) == ok


def test_accessed_and_dirty_from_top_to_leaf_only_when_asked(memory):
    long_tables(memory, 0x6007, pde=0x4007, pdpte=0x3007, pml4e=0x2007)
    regs = long_regs()
    assert walk(memory, regs, 0x5000, WRITE, set_ad=False) == Translation(0x6000, 0x1000)
    assert memory.read_u(0x1000, 8) == 0x2007
    assert translate_debug(memory, regs, 0x5000) == 0x6000
    assert memory.read_u(0x4028, 8) == 0x6007
    walk(memory, regs, 0x5000, WRITE)
    assert [memory.read_u(a, 8) for a in (0x1000, 0x2000, 0x3000, 0x4028)] == [0x2027, 0x3027, 0x4027, 0x6067]


def test_a_faulting_walk_writes_nothing(memory):
    long_tables(memory, 0x6005, pde=0x4007, pdpte=0x3007, pml4e=0x2007)
    assert walk(memory, long_regs(), 0x5000, WRITE) == PageFault(0x3, 0x5000)
    assert memory.read_u(0x1000, 8) == 0x2007


def test_a_table_that_maps_itself(memory):
    """Each level is the same entry: setting its Accessed bit is a change that the next level meets."""
    memory.write_u(0x1000 + 256 * 8, 8, 0x1003)
    gva = 0xFFFF_8000_0000_0000 | 256 << 30 | 256 << 21 | 256 << 12
    assert walk(memory, long_regs(), gva, WRITE) == Translation(0x1000, 0x1000)
    assert memory.read_u(0x1000 + 256 * 8, 8) == 0x1063


def test_a_directory_that_maps_itself(memory):
    memory.write_u(0x1000 + 4 * 768, 4, 0x1003)
    regs = PagingRegs(cr0=PG_PE, cr3=0x1000, cr4=0, efer=0)
    assert walk(memory, regs, 768 << 22 | 768 << 12, WRITE) == Translation(0x1000, 0x1000)
    assert memory.read_u(0x1000 + 4 * 768, 4) == 0x1063


def test_straight_path_leaves_every_doubt_to_the_full_walk(memory):
    regs = long_regs()
    full = {"pml4e": 0x2063, "pdpte": 0x3063, "pde": 0x4063, "pte": 0x6063}
    for level in full:
        for bits in (full[level] & ~1, full[level] | 1 << 45):
            long_tables(memory, **(full | {level: bits}))
            assert walk(memory, regs, 0x5000, WRITE) == PageFault(0x2 if not bits & 1 else 0xB, 0x5000)
        if level != "pte":
            long_tables(memory, **(full | {level: 0x4000_0063}))
            assert walk(memory, regs, 0x5000, WRITE) == PageFault(0x2, 0x5000)
    long_tables(memory, **full)
    assert walk(memory, regs, 0x5FF8, WRITE) == Translation(0x6FF8, 0x1000)


def test_debug_translation_ignores_permissions(memory):
    long_tables(memory, 0x6067)
    assert translate_debug(memory, long_regs(cr4=PAE | SMAP | PKE, pkru=1), 0x5001) == 0x6001
    long_tables(memory, 0)
    assert translate_debug(memory, long_regs(), 0x5001) is None


def test_canonical():
    assert is_canonical(0x7FFF_FFFF_FFFF)
    assert not is_canonical(0x8000_0000_0000)
    assert not is_canonical(0xFFFF_7FFF_FFFF_FFFF)
    assert is_canonical(0xFFFF_8000_0000_0000)


def test_registers_of_a_cpu():
    cpu = FakeCpu(cr0=0x11, cr3=0x5000, cr4=0x20, efer=0x100, rflags=0x202, cpl=3)
    assert PagingRegs.of(cpu, (1, 2, 3, 4)) == PagingRegs(0x11, 0x5000, 0x20, 0x100, 0x202, 3, (1, 2, 3, 4), 40)


def test_data_access_of_the_current_privilege_level():
    assert long_regs(cpl=3).data_access(write=True) == USER | WRITE
    assert long_regs(cpl=0).data_access() == READ
    assert (Access.WRITE, Access.USER, Access.FETCH, Access.IMPLICIT) == (2, 4, 0x10, 1 << 48)


def test_addresses_pass_the_outer_tables_in_every_mode(memory):
    """The outer context adds 0x1000, and refuses page 0x9000."""
    asked = []

    def outer(gpa, access, set_ad):
        asked.append((gpa, access, set_ad))
        return PageFault(0x7, gpa) if gpa & ~0xFFF == 0x9000 else gpa + 0x1000

    regs = two_level(memory, 0)
    memory.write_u(0x2000, 4, 0x2007)
    memory.write_u(0x3014, 4, 0x6007)
    memory.write_u(0x3018, 4, 0x9007)
    memory.write_u(0x2004, 4, 0x9007)
    assert walk(memory, regs, 0x5001, USER, translate=outer) == Translation(0x7001, 0x1000)
    assert asked == [(0x1000, 2, True), (0x2014, 2, True), (0x6001, 4, True)]
    assert walk(memory, regs, 0x6001, translate=outer) == PageFault(0x7, 0x9001)
    assert walk(memory, regs, 0x40_0000, translate=outer) == PageFault(0x7, 0x9000)

    memory.write_u(0x4000, 8, 0x4001)
    memory.write_u(0x5000, 8, 0x5007)
    memory.write_u(0x6028, 8, 0x6007)
    memory.write_u(0x6030, 8, 0x9007)
    memory.write_u(0x5008, 8, 0x9007)
    asked.clear()
    regs = PagingRegs(cr0=PG_PE, cr3=0x3000, cr4=PAE, efer=0)
    assert translate_debug(memory, regs, 0x5001, outer) == 0x7001
    assert asked == [(0x3000, 0, False), (0x4000, 0, False), (0x5028, 0, False), (0x6001, 0, False)]
    assert walk(memory, regs, 0x6001, translate=outer) == PageFault(0x7, 0x9001)
    assert walk(memory, regs, 0x20_0000, translate=outer) == PageFault(0x7, 0x9000)
    assert walk(memory, regs._replace(cr3=0x9000), 0, translate=outer) == PageFault(0x7, 0x9000)
    assert walk(memory, PagingRegs(cr0=0, cr3=0, cr4=0, efer=0), 7, translate=outer) == Translation(0x1007, 0x1000)
