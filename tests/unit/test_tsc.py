"""The guest's TSC: conversions, offset, TSC_ADJUST, scaling (``x86.c`` of Linux 6.16; SDM vol. 3B, 17.17)."""

import pytest

from aiovm.errors import ConfigError
from aiovm.tsc import GuestTsc, ns_to_tsc, scaling_ratio, tsc_to_ns

M64 = (1 << 64) - 1


def test_conversions_are_exact_integers():
    assert ns_to_tsc(1_000_000_000, 2_400_000) == 2_400_000_000
    assert ns_to_tsc(1, 2_400_000) == 2
    assert ns_to_tsc(10**18, 2_893_202) == 2_893_202 * 10**12
    assert tsc_to_ns(2_400_000_000, 2_400_000) == 1_000_000_000
    assert tsc_to_ns(3, 2_400_000) == 2  # 1.25 ns: not before 2
    assert tsc_to_ns(0, 2_400_000) == 0


def test_a_tsc_starts_as_the_shared_counter():
    tsc = GuestTsc()
    assert tsc.read(12345) == 12345
    assert tsc.adjust == 0


def test_a_guest_store_to_the_tsc_moves_tsc_adjust_too():
    tsc = GuestTsc()
    tsc.write(100, 1_000)
    assert tsc.read(1_000) == 100
    assert tsc.read(1_500) == 600
    assert tsc.adjust == (1 << 64) - 900


def test_a_guest_store_to_tsc_adjust_moves_the_tsc_by_the_difference():
    tsc = GuestTsc()
    tsc.write_adjust(50)
    assert tsc.read(1_000) == 1_050
    tsc.write_adjust(M64)  # -1
    assert tsc.read(1_000) == 999
    assert tsc.adjust == M64


def test_host_stores_do_not_couple():
    tsc = GuestTsc()
    tsc.write_adjust(50, host_initiated=True)
    assert (tsc.read(1_000), tsc.adjust) == (1_000, 50)
    tsc.host_write(7, 1_000)
    assert (tsc.read(1_000), tsc.adjust) == (7, 50)


def test_the_tsc_wraps():
    tsc = GuestTsc()
    tsc.write(M64, 10)
    assert tsc.read(11) == 0


@pytest.mark.parametrize("khz", [0, 2_000_000, 1_999_500, 2_000_500])
def test_within_250_ppm_nothing_is_scaled(khz):
    assert scaling_ratio(khz, 2_000_000) == 1 << 48


def test_scaling():
    assert scaling_ratio(1_000_000, 2_000_000) == 1 << 47
    assert scaling_ratio(2_000_501, 2_000_000) == (2_000_501 << 48) // 2_000_000
    assert scaling_ratio(1_999_499, 2_000_000) < 1 << 48
    tsc = GuestTsc(3 << 47)  # 1.5
    tsc.host_write(0, 1_000)
    assert tsc.read(1_000) == 0
    assert tsc.read(1_003) == 4  # floor(1504.5) - 1500
    assert tsc.scale(2_000_000) == 3_000_000


@pytest.mark.parametrize(("guest", "host"), [(-1, 2_000_000), (1 << 40, 1_000)])
def test_impossible_speeds_are_the_callers_mistake(guest, host):
    with pytest.raises(ConfigError, match="kHz"):
        scaling_ratio(guest, host)


def test_reach_is_the_first_count_that_is_there():
    tsc = GuestTsc(3 << 47)
    tsc.write(1_000, 500)
    for target in (1_001, 1_002, 1_003, 5_000):
        host = tsc.reach(target, 500)
        assert tsc.read(host) >= target > tsc.read(host - 1)
    assert tsc.reach(1_000, 500) == 500
    assert tsc.reach(0, 500) == 500
    assert GuestTsc().reach(M64, 500) == M64


def test_state_travels_and_resets():
    tsc = GuestTsc(3 << 47)
    tsc.write(100, 1_000)
    other = GuestTsc()
    other.restore(tsc.save())
    assert other.save() == tsc.save()
    assert other.read(1_000) == 100
    other.reset()
    assert other.read(1_000) == 1_500
    assert tsc.read(1_000) == 100


def test_whoever_makes_the_counter_is_told_of_every_change():
    told = []
    tsc = GuestTsc(1 << 47, on_change=lambda *values: told.append(values))
    tsc.write(1000, 100)
    tsc.write_adjust(5)
    tsc.host_write(0, 100)
    state = tsc.save()
    tsc.reset()
    tsc.restore(state)
    assert told == [
        (1 << 47, 0),
        (1 << 47, 950),
        (1 << 47, 5),
        (1 << 47, (1 << 64) - 50),
        (1 << 47, 0),
        (1 << 47, (1 << 64) - 50),
    ]
