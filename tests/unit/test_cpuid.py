"""CPUID as guests see it: what the core executes, no more; the topology; KVM's leaves (SDM vol. 2A, CPUID)."""

import pytest

from aiovm.cpuid import SIGNATURE, CpuidTable
from aiovm.paravirt import KvmFeature


def table(vcpus=1, **options):
    return CpuidTable(vcpus=vcpus, tsc_khz=2_000_000, features=KvmFeature(0x80), **options)


def bits(value):
    return {n for n in range(32) if value >> n & 1}


def words(*registers):
    return b"".join(r.to_bytes(4, "little") for r in registers)


def test_vendor_and_highest_leaves():
    eax, ebx, ecx, edx = table().answer(0, 0, 0)
    assert eax == 0xD
    assert words(ebx, edx, ecx) == b"GenuineIntel"
    assert table().answer(0x8000_0000, 0, 0)[0] == 0x8000_0008
    assert table().answer(0x4000_0000, 0, 0)[0] == 0x4000_0010


def test_family_model_stepping():
    assert SIGNATURE == 0x306C4  # family 6, model 0x3C (Haswell), stepping 4
    assert table().answer(1, 0, 0)[0] == 0x306C4


def test_features_of_leaf_1():
    _, _, ecx, edx = table().answer(1, 0, 0)
    # SSE3 PCLMUL SSSE3 CX16 SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES XSAVE hypervisor
    assert bits(ecx) == {0, 1, 9, 13, 19, 20, 21, 22, 23, 24, 25, 26, 31}
    # FPU DE PSE TSC MSR PAE CX8 APIC SEP PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
    assert bits(edx) == {0, 2, 3, 4, 5, 6, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26}


@pytest.mark.parametrize(
    ("name", "register", "bit"),
    [
        ("MONITOR", 2, 3),
        ("FMA", 2, 12),
        ("OSXSAVE", 2, 27),
        ("AVX", 2, 28),
        ("F16C", 2, 29),
        ("RDRAND", 2, 30),
        ("MCE", 3, 7),
        ("MTRR", 3, 12),
        ("MCA", 3, 14),
    ],
)
def test_what_the_core_does_not_do_is_not_claimed(name, register, bit):
    assert not table().answer(1, 0, 0)[register] >> bit & 1, name


def test_features_of_leaf_7():
    eax, ebx, ecx, edx = table().answer(7, 0, 0)
    assert eax == 2  # the last subleaf
    # FSGSBASE TSC_ADJUST BMI1 SMEP BMI2 SMAP CLFLUSHOPT CLWB: no ERMS (9), AVX2 (5), RDSEED (18), ADX (19)
    assert bits(ebx) == {0, 1, 3, 7, 8, 20, 23, 24}
    assert bits(ecx) == {2, 3}  # UMIP, PKU
    assert bits(table().answer(7, 0, 0, cr4=1 << 22)[2]) == {2, 3, 4}  # OSPKE
    assert table().answer(7, 2, 0, cr4=1 << 22) == (0, 0, 0, 0x10)
    assert bits(edx) == {26, 27, 29}  # IBRS and IBPB, STIBP, ARCH_CAPABILITIES
    assert table().answer(7, 1, 0) == (0, 0, 0, 0)
    assert table().answer(7, 2, 0) == (0, 0, 0, 0x10)  # BHI_CTRL


def test_xsave():
    # x87, SSE, PKRU. EBX: the bytes for what XCR0 has, at first the legacy area and the header; ECX: for all.
    assert table().answer(0xD, 0, 0) == (0x203, 576, 2696, 0)
    assert table().answer(0xD, 0, 0, xcr0=3) == (0x203, 576, 2696, 0)
    assert table().answer(0xD, 0, 0, xcr0=0x201) == (0x203, 2696, 2696, 0)
    assert table().answer(0xD, 9, 0, xcr0=0x203) == (8, 2688, 0, 0)
    assert table().answer(0xD, 1, 0) == (5, 0, 0, 0)  # XSAVEOPT and XGETBV with ECX 1; no XSAVEC, no XSAVES
    assert table().answer(0xD, 2, 0) == (0, 0, 0, 0)
    assert table().answer(1, 0, 0, cr4=1 << 18)[2] >> 27 & 1


def test_extended_features():
    eax, ebx, ecx, edx = table().answer(0x8000_0001, 0, 0)
    assert (eax, ebx) == (0x306C4, 0)
    assert bits(ecx) == {0, 5}  # LAHF64, LZCNT
    assert bits(edx) == {11, 20, 26, 27, 29}  # SYSCALL NX PDPE1GB RDTSCP LM


def test_power_and_address_widths():
    assert table().answer(6, 0, 0) == (4, 0, 0, 0)  # ARAT
    assert table().answer(0x8000_0007, 0, 0) == (0, 0, 0, 0x100)  # invariant TSC
    assert table().answer(0x8000_0008, 0, 0) == (0x3028, 0, 0, 0)  # 40 physical, 48 linear


def test_the_brand():
    t = table()
    text = b"".join(words(*t.answer(leaf, 0, 0)) for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004))
    assert len(text) == 48
    assert text.rstrip(b"\0") == b"Intel Core Processor (Haswell)"


def test_caches():
    t = table()
    # Type and level, line 64, ways 8 or 16, sets 64 or 4096.
    assert [t.answer(4, n, 0) for n in range(4)] == [
        (0x121, 0x01C0_003F, 0x3F, 1),
        (0x122, 0x01C0_003F, 0x3F, 1),
        (0x143, 0x03C0_003F, 0xFFF, 1),
        (0, 0, 0, 0),
    ]


@pytest.mark.parametrize(("vcpus", "apic_id"), [(1, 0), (4, 3), (255, 254)])
def test_leaf_1_names_the_cpu_and_counts_the_logical_ones(vcpus, apic_id):
    _, ebx, _, edx = table(vcpus).answer(1, 0, apic_id)
    assert ebx == apic_id << 24 | vcpus << 16 | 8 << 8
    assert bool(edx >> 28 & 1) is (vcpus > 1)


@pytest.mark.parametrize(("vcpus", "shift"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)])
def test_topology(vcpus, shift):
    t = table(vcpus)
    assert t.answer(0xB, 0, 7) == (0, 1, 0x100, 7)  # one thread a core
    assert t.answer(0xB, 1, 7) == (shift, vcpus, 0x201, 7)
    assert t.answer(0xB, 2, 7) == (0, 0, 2, 7)
    assert vcpus <= 1 << shift


def test_kvms_leaves():
    t = table(hints=1)
    assert t.answer(0x4000_0001, 0, 0) == (0x80, 0, 0, 1)
    assert t.answer(0x4000_0010, 0, 0)[0] == 2_000_000
    _, ebx, ecx, edx = t.answer(0x4000_0000, 0, 0)
    assert words(ebx, ecx, edx) == b"KVMKVMKVM\0\0\0"


@pytest.mark.parametrize("leaf", [3, 5, 8, 0xA, 0xC, 0x4000_0002, 0x8000_0009, 0xFFFF_FFFF])
def test_other_leaves_are_zero(leaf):
    assert table().answer(leaf, 0, 5) == (0, 0, 0, 0)


def test_the_subleaf_matters_only_where_there_is_one():
    t = table()
    assert t.answer(1, 99, 0) == t.answer(1, 0, 0)
    assert t.answer(0x8000_0001, 5, 0) == t.answer(0x8000_0001, 0, 0)


def test_leaves_that_are_the_same_everywhere():
    t = table(4)
    assert {0, 2, 6, 0x8000_0001, 0x4000_0001} <= t.same.keys()
    assert not {1, 4, 7, 0xB, 0xD} & t.same.keys()
    for leaf, found in t.same.items():
        assert (
            found == t.answer(leaf, 0, 0) == t.answer(leaf, 5, 3, apic_enabled=False, cr4=1 << 18 | 1 << 22, xcr0=0x203)
        )
