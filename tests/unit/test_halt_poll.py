"""Halt polling's adaptation (``virt/kvm/kvm_main.c``)."""

from dataclasses import replace

import pytest

from aiovm.halt_poll import LINUX_4_6, LINUX_4_19, LINUX_6_16, adapt, begin


def test_defaults():
    assert (LINUX_4_6.grow, LINUX_4_6.shrink, LINUX_4_6.limit_ns, LINUX_4_6.grow_start_ns) == (2, 0, 400_000, 10_000)
    assert (LINUX_4_19.grow, LINUX_4_19.shrink, LINUX_4_19.limit_ns) == (2, 0, 200_000)
    assert (LINUX_6_16.grow, LINUX_6_16.shrink, LINUX_6_16.limit_ns, LINUX_6_16.grow_start_ns) == (
        2,
        2,
        200_000,
        10_000,
    )


def test_worked_table_of_4_6():
    window, seen = 0, []
    for block in (30_000, 30_000, 30_000, 30_000, 900_000, 900_000, 400_000):
        window = adapt(window, block, 400_000, LINUX_4_6)
        seen.append(window)
    assert seen == [10_000, 20_000, 40_000, 40_000, 0, 0, 0]


def test_6_16_halves_and_gives_up_below_its_start():
    window, seen = 40_000, []
    for _ in range(3):
        window = adapt(window, 900_000, 200_000)
        seen.append(window)
    assert seen == [20_000, 10_000, 0]  # the third halving, 5000, is below 10000


def test_4_x_growth_is_capped_and_6_16_caps_at_the_next_halt():
    assert adapt(160_000, 190_000, 200_000, LINUX_4_19) == 200_000
    assert adapt(160_000, 190_000, 200_000, LINUX_6_16) == 320_000
    assert begin(320_000, 200_000) == 200_000
    assert begin(80_000, 200_000) == 80_000


def test_growth_starts_at_its_start():
    assert adapt(0, 1, 200_000, LINUX_6_16) == 10_000
    assert adapt(3_000, 4_000, 200_000, LINUX_6_16) == 10_000
    assert adapt(3_000, 4_000, 200_000, LINUX_4_6) == 6_000
    assert adapt(0, 1_000, 5_000, LINUX_4_6) == 5_000


def test_growth_factor_zero():
    """It clears the window up to 4.19 and means no growth in 6.16."""
    assert adapt(20_000, 30_000, 200_000, replace(LINUX_4_19, grow=0)) == 0
    assert adapt(0, 30_000, 200_000, replace(LINUX_4_19, grow=0)) == 0
    assert adapt(20_000, 30_000, 200_000, replace(LINUX_6_16, grow=0)) == 20_000


def test_shrink_divides_or_resets():
    assert adapt(30_000, 900_000, 400_000, replace(LINUX_4_6, shrink=4)) == 7_500
    assert adapt(30_000, 900_000, 400_000, replace(LINUX_6_16, shrink=0)) == 0
    assert adapt(40_000, 900_000, 400_000, replace(LINUX_6_16, shrink=4)) == 10_000


@pytest.mark.parametrize("params", [LINUX_4_6, LINUX_6_16])
def test_edges(params):
    assert adapt(40_000, 30_000, 0, params) == 0
    assert adapt(40_000, 40_000, 200_000, params) == 40_000
    assert adapt(40_000, 200_000, 200_000, params) == 40_000
    assert adapt(0, 200_001, 200_000, params) == 0
    assert adapt(200_000, 200_000, 200_000, params) == 200_000


def test_an_invalid_wakeup_shrinks_before_anything_else():
    assert adapt(40_000, 30_000, 200_000, LINUX_6_16, valid_wakeup=False) == 20_000
    assert adapt(40_000, 30_000, 0, LINUX_6_16, valid_wakeup=False) == 20_000
    assert adapt(40_000, 30_000, 200_000, LINUX_4_6, valid_wakeup=False) == 0
