"""Hypercalls: common rules, PV IPI, sched yield (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import pytest

from aiovm.paravirt import DEFAULT_FEATURES, KvmFeature, decode_send_ipi, refusal


@pytest.mark.parametrize("number", [1, 5, 9, 10, 11])
def test_known_numbers(number):
    assert refusal(number, 0) is None


@pytest.mark.parametrize("number", [0, 2, 3, 4, 6, 7, 8, 12, 13, 0x7_0000_0005, 1 << 63])
def test_unknown_numbers(number):
    assert refusal(number, 0) == -1000


@pytest.mark.parametrize("cpl", [1, 2, 3])
def test_only_the_kernel_may_call(cpl):
    assert refusal(5, cpl) == -1
    assert refusal(77, cpl) == -1


@pytest.mark.parametrize(("number", "feature"), [(5, 1 << 7), (10, 1 << 11), (11, 1 << 13)])
def test_a_feature_gate_bites_only_when_enforced(number, feature):
    without = DEFAULT_FEATURES & ~KvmFeature(feature)
    assert refusal(number, 0) is None
    assert refusal(number, 0, without) == -1000
    assert refusal(number, 0, KvmFeature(feature)) is None


@pytest.mark.parametrize("number", [1, 9])
def test_calls_without_a_gate(number):
    assert refusal(number, 0, KvmFeature.NONE) is None


def test_send_ipi_names_its_targets():
    ipi = decode_send_ipi((0b1011, 1 << 63 | 1, 16, 0x40FD), long_mode=True)
    assert ipi.apic_ids == (16, 17, 19, 80, 143)
    assert (ipi.icr, ipi.vector, ipi.delivery_mode) == (0x40FD, 0xFD, 0)


def test_send_ipi_in_32_bit_code_has_words_of_32_bits():
    ipi = decode_send_ipi((1 << 31, 1, 0, 0x400), long_mode=False)
    assert ipi.apic_ids == (31, 32)
    assert ipi.delivery_mode == 4  # NMI
    assert decode_send_ipi((1 << 32 | 1, 0, 0, 0), long_mode=False).apic_ids == (0,)


@pytest.mark.parametrize("icr", [0x800, 0x40000, 0x80000, 0xC0000, 0x40 | 0x800])
def test_send_ipi_refuses_shorthands_and_logical_destinations(icr):
    assert decode_send_ipi((1, 0, 0, icr), long_mode=True) == -22


def test_send_ipi_of_nothing_and_ids_do_not_wrap():
    assert decode_send_ipi((0, 0, 0, 0xFD), long_mode=True).apic_ids == ()
    assert decode_send_ipi((0b11, 0, 0xFFFF_FFFF, 0xFD), long_mode=True).apic_ids == (0xFFFF_FFFF, 0x1_0000_0000)
