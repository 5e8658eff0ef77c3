"""The few statistics the project reports, from whole numbers and without rounding on the way.

Percentiles are by nearest rank: always a value that was measured, never one between two. Fairness is Jain's index
(R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination", DEC TR-301, 1984).
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["jain", "percentile", "weighted_percentile"]


def percentile(values: Sequence[int], percent: int) -> int:
    """The smallest of ``values`` (any order) that at least ``percent`` % of them do not exceed; 0 without values."""
    return weighted_percentile(((value, 1) for value in values), percent)


def weighted_percentile(pairs: Iterable[tuple[int, int]], percent: int) -> int:
    """:func:`percentile` of a histogram: pairs of a value and how often it occurred; 0 when nothing did."""
    if not 0 <= percent <= 100:
        raise ConfigError(f"a percentile lies between 0 and 100, not at {percent}")
    histogram = sorted((value, count) for value, count in pairs if count > 0)
    ends = list(accumulate(count for _, count in histogram))
    if not ends:
        return 0
    # Rank 1 is the smallest value; the 0th percentile is that too.
    rank = max(1, -(-ends[-1] * percent // 100))
    return histogram[bisect_left(ends, rank)][0]


def jain(shares: Sequence[int]) -> float:
    """Jain's index: 1 when all ``shares`` are equal, 1/n when one takes all; 1 when there is nothing to share."""
    squares = sum(share * share for share in shares)
    if not squares:
        return 1.0
    total = sum(shares)
    return total * total / (len(shares) * squares)
