"""KVM's CPUID leaves (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

from aiovm.paravirt import DEFAULT_FEATURES, KvmFeature, KvmHint, kvm_cpuid_leaves


def test_signature_and_highest_leaf():
    leaf = kvm_cpuid_leaves(KvmFeature.NONE, tsc_khz=1)[0x40000000]
    assert leaf == (0x40000010, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert b"".join(r.to_bytes(4, "little") for r in leaf[1:]) == b"KVMKVMKVM\0\0\0"


def test_features_and_hints():
    leaves = kvm_cpuid_leaves(KvmFeature.PV_UNHALT | KvmFeature.STEAL_TIME, hints=KvmHint.REALTIME, tsc_khz=1)
    assert leaves[0x40000001] == (0xA0, 0, 0, 1)
    assert set(leaves) == {0x40000000, 0x40000001, 0x40000010}


def test_frequencies():
    assert kvm_cpuid_leaves(KvmFeature.NONE, tsc_khz=2_400_000)[0x40000010] == (2_400_000, 1_000_000, 0, 0)


def test_feature_bits():
    assert {f.name: f.value.bit_length() - 1 for f in KvmFeature} == {
        "CLOCKSOURCE": 0,
        "NOP_IO_DELAY": 1,
        "CLOCKSOURCE2": 3,
        "ASYNC_PF": 4,
        "STEAL_TIME": 5,
        "PV_EOI": 6,
        "PV_UNHALT": 7,
        "PV_TLB_FLUSH": 9,
        "ASYNC_PF_VMEXIT": 10,
        "PV_SEND_IPI": 11,
        "POLL_CONTROL": 12,
        "PV_SCHED_YIELD": 13,
        "ASYNC_PF_INT": 14,
        "MSI_EXT_DEST_ID": 15,
        "HC_MAP_GPA_RANGE": 16,
        "MIGRATION_CONTROL": 17,
        "CLOCKSOURCE_STABLE": 24,
    }


def test_default_is_what_6_16_offers_without_nesting():
    assert DEFAULT_FEATURES == 0x0100_7AFB
