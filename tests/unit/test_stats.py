"""Percentiles by nearest rank and Jain's index, against figures worked out by hand."""

import pytest

from aiovm.errors import ConfigError
from aiovm.stats import jain, percentile, weighted_percentile


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 15), (5, 15), (20, 15), (21, 20), (30, 20), (40, 20), (50, 35), (99, 50), (100, 50)]
)
def test_nearest_rank(percent, value):
    assert percentile([40, 15, 50, 20, 35], percent) == value


def test_no_values_give_zero():
    assert percentile([], 50) == 0
    assert weighted_percentile([(7, 0)], 50) == 0


def test_a_histogram_is_the_list_it_stands_for():
    pairs = [(100, 2), (3, 97), (7, 1)]
    assert [weighted_percentile(pairs, p) for p in (50, 97, 98, 99, 100)] == [3, 3, 7, 100, 100]


@pytest.mark.parametrize("percent", [-1, 101])
def test_percent_has_limits(percent):
    with pytest.raises(ConfigError, match=str(percent)):
        percentile([1], percent)


@pytest.mark.parametrize(
    ("shares", "index"),
    [([5, 5, 5, 5], 1.0), ([9, 0, 0], 1 / 3), ([1, 3], 0.8), ([], 1.0), ([0, 0], 1.0), ([10**18, 10**18], 1.0)],
)
def test_jain(shares, index):
    assert jain(shares) == index
