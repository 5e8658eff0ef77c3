"""RDMSR and WRMSR: who holds what, what is refused; what the embedding program may beyond the guest (SDM vol. 4)."""

import pytest

from aiovm.loop import Host, run
from aiovm.vm import Vm


@pytest.fixture
def msrs():
    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vm.close()
        return vm.vcpus[0].msrs

    return run(main())


@pytest.mark.parametrize(("index", "value"), [(0x17, 0), (0x8B, 0), (0x3A, 1), (0x179, 0), (0x17A, 0)])
def test_identity_reads_as_it_is_and_drops_stores(msrs, index, value):
    assert msrs.read(index) == value
    assert msrs.write(index, 0xFFFF)
    assert msrs.read(index) == value


@pytest.mark.parametrize("index", [0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102])
def test_addresses_are_canonical(msrs, index):
    assert msrs.write(index, 0xFFFF_8000_0000_0000)
    assert not msrs.write(index, 0x8000_0000_0000)
    assert msrs.read(index) == 0xFFFF_8000_0000_0000


@pytest.mark.parametrize(
    ("index", "kept", "refused"),
    [
        (0x277, 0x0007_0406_0007_0406, 0x0007_0406_0007_0402),  # PAT has no type 2
        (0xC000_0103, 0xFFFF_FFFF, 1 << 32),  # TSC_AUX has 32 bits
        (0x1A0, 0x85_0089, None),  # MISC_ENABLE
        (0x48, 0x403, 0x4),  # SPEC_CTRL: IBRS, STIBP, BHI_DIS_S; SSBD has a CPUID bit of its own
        (0x174, 0x10, None),  # SYSENTER_CS
        (0xC000_0081, 0x0023_0010 << 32, None),  # STAR
        (0xC000_0084, 0x4_7700, None),  # FMASK
        (0x3B, 0x1234, None),  # TSC_ADJUST
    ],
)
def test_registers_keep_what_they_take(msrs, index, kept, refused):
    assert msrs.write(index, kept)
    if refused is not None:
        assert not msrs.write(index, refused)
    assert msrs.read(index) == kept


def test_what_does_not_exist_faults(msrs):
    for index in (0, 0x2FF, 0x800, 0xC001_0015):  # 0x800: the x2APIC's, which is off
        assert msrs.read(index) is None
        assert not msrs.write(index, 0)


def test_nothing_is_speculated(msrs):
    # SDM vol. 4, table 2-2: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO; 13-15 the
    # MMIO stale data ones; BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO; ITS_NO. Neither RSBA (2), TSX_CTRL (7) nor FB_CLEAR (17).
    assert msrs.read(0x10A) == 0x4000_0000_0D10_E17B
    assert not msrs.write(0x10A, 0)
    assert msrs.write(0x49, 1)  # IBPB: a command
    assert not msrs.write(0x49, 2)
    assert msrs.read(0x49) is None


def test_smbase_is_there_in_smm_and_for_the_program(msrs):
    assert msrs.read(0x9E) is None
    assert not msrs.write(0x9E, 0x4_0000)
    assert msrs.write(0x9E, 0x4_0000, host_initiated=True)
    assert not msrs.write(0x9E, 1 << 32, host_initiated=True)
    assert msrs.read(0x9E, host_initiated=True) == 0x4_0000


def test_a_guests_store_to_the_tsc_moves_tsc_adjust_and_the_programs_does_not(msrs):
    assert msrs.write(0x10, 1 << 40, host_initiated=True)
    assert (msrs.read(0x10), msrs.read(0x3B)) == (1 << 40, 0)
    assert msrs.write(0x10, 3 << 40)
    assert (msrs.read(0x10), msrs.read(0x3B)) == (3 << 40, 2 << 40)


def test_the_program_may_turn_an_apic_back(msrs):
    assert msrs.write(0x1B, 0xFEE0_0D00)  # x2APIC
    assert not msrs.write(0x1B, 0xFEE0_0900)  # back to xAPIC: SDM vol. 3A, 10.12.5
    assert msrs.write(0x1B, 0xFEE0_0900, host_initiated=True)
    assert msrs.read(0x1B) == 0xFEE0_0900
