"""Destination matching (SDM vol. 3A, 10.6.2)."""

import pytest

from aiovm.lapic import DeliveryMode, IpiMessage, Lapic, Shorthand
from aiovm.lapic_map import ApicMap, match_destination


def xapic(n, *, logical=None):
    lapics = [Lapic(i, bsp=i == 0) for i in range(n)]
    for i, lapic in enumerate(lapics):
        lapic.mmio_write(0xF0, 4, 0x1FF, 0)
        if logical is not None:
            lapic.mmio_write(0xD0, 4, logical[i] << 24, 0)
    return lapics


def x2apic(ids):
    lapics = [Lapic(i, bsp=False) for i in ids]
    for lapic in lapics:
        lapic.set_apic_base(0xFEE0_0C00)
        lapic.msr_write(0x80F, 0x1FF, 0)
    return lapics


def message(dest=0, *, logical=False, shorthand=Shorthand.NONE, mode=DeliveryMode.FIXED, vector=0x31, hint=False):
    return IpiMessage(vector, mode, logical, True, False, shorthand, dest, hint)


def match(lapics, msg, source=0):
    found = match_destination(lapics, msg, source)
    cached = ApicMap(lapics)
    assert list(cached.targets(msg, source)) == found
    assert list(cached.targets(msg, source)) == found
    return found


@pytest.mark.parametrize(
    ("shorthand", "expected"),
    [(Shorthand.SELF, [1]), (Shorthand.ALL, [0, 1, 2]), (Shorthand.OTHERS, [0, 2])],
)
def test_shorthands(shorthand, expected):
    assert match(xapic(3), message(shorthand=shorthand), 1) == expected


def test_self_without_a_source_is_nobody():
    assert match(xapic(3), message(shorthand=Shorthand.SELF), None) == []


@pytest.mark.parametrize(("dest", "expected"), [(2, [2]), (0xFF, [0, 1, 2, 3]), (9, []), (0xFFFF_FFFF, [])])
def test_physical_xapic(dest, expected):
    assert match(xapic(4), message(dest)) == expected


@pytest.mark.parametrize(
    ("dest", "source", "expected"),
    [(0x123, 0, [1]), (0xFFFF_FFFF, 0, [0, 1]), (0xFF, 0, []), (0xFF, None, [0, 1])],
)
def test_physical_x2apic(dest, source, expected):
    assert match(x2apic([0, 0x123]), message(dest), source) == expected


def test_xapic_answers_to_a_wide_vcpu_id():
    lapics = [Lapic(0, bsp=True), Lapic(0x105, bsp=False)]
    assert match(lapics, message(0x105)) == [1]
    assert match(lapics, message(0x05)) == [1]


def test_hardware_disabled_is_no_target_software_disabled_is():
    lapics = xapic(3)
    lapics[1].set_apic_base(0xFEE0_0000)
    lapics[2].mmio_write(0xF0, 4, 0xFF, 0)
    assert match(lapics, message(0xFF)) == [0, 2]
    assert match(lapics, message(shorthand=Shorthand.OTHERS)) == [2]


@pytest.mark.parametrize(("dest", "expected"), [(0x01, [0]), (0x06, [1, 2]), (0x80, []), (0xFF, [0, 1, 2])])
def test_logical_flat(dest, expected):
    assert match(xapic(3, logical=[1, 2, 4]), message(dest, logical=True)) == expected


@pytest.mark.parametrize(("dest", "expected"), [(0x01, [0]), (0x13, [1, 2]), (0x23, []), (0xFF, [0, 1, 2])])
def test_logical_cluster(dest, expected):
    lapics = xapic(3, logical=[0x01, 0x11, 0x12])
    for lapic in lapics:
        lapic.mmio_write(0xE0, 4, 0x0FFF_FFFF, 0)
    assert match(lapics, message(dest, logical=True)) == expected


def test_other_models_match_nothing():
    lapics = xapic(1, logical=[1])
    lapics[0].mmio_write(0xE0, 4, 0x7FFF_FFFF, 0)
    assert match(lapics, message(1, logical=True)) == []


@pytest.mark.parametrize(
    ("dest", "expected"), [(0x0002_0008, [1]), (0x0002_0009, [0, 1]), (0x0001_0009, []), (0xFFFF_FFFF, [0, 1])]
)
def test_logical_x2apic(dest, expected):
    assert match(x2apic([0x20, 0x23]), message(dest, logical=True)) == expected


@pytest.mark.parametrize(("vector", "expected"), [(0x30, [0]), (0x31, [2]), (0x33, [2])])
def test_lowest_priority_hashes_the_vector_over_enabled_candidates(vector, expected):
    lapics = xapic(3, logical=[1, 2, 4])
    lapics[1].mmio_write(0xF0, 4, 0xFF, 0)
    msg = message(7, logical=True, mode=DeliveryMode.LOWEST_PRIORITY, vector=vector)
    assert match(lapics, msg) == expected


def test_redirection_hint_delivers_to_one():
    assert match(xapic(3, logical=[1, 2, 4]), message(7, logical=True, hint=True, vector=0x32), None) == [2]


def test_lowest_priority_with_nobody_able():
    assert match(xapic(1), message(5, mode=DeliveryMode.LOWEST_PRIORITY)) == []


def test_physical_broadcast_at_lowest_priority_goes_to_all():
    assert match(xapic(3), message(0xFF, mode=DeliveryMode.LOWEST_PRIORITY)) == [0, 1, 2]


def test_self_at_lowest_priority():
    assert match(xapic(2), message(shorthand=Shorthand.SELF, mode=DeliveryMode.LOWEST_PRIORITY), 1) == [1]


def test_map_remembers_until_recalculated_and_stays_small():
    lapics = xapic(2)
    apic_map = ApicMap(lapics)
    assert list(apic_map.targets(message(7), 0)) == []
    lapics[1].mmio_write(0x20, 4, 0x0700_0000, 0)
    assert list(apic_map.targets(message(7), 0)) == []
    apic_map.recalculate()
    assert list(apic_map.targets(message(7), 0)) == [1]
    for dest in range(3000):
        apic_map.targets(message(dest), 0)
    assert len(apic_map._cache) <= 1024
