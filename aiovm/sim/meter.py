"""What a model workload measures: operations and waits, counted from the end of the warm-up.

Waits go into log-linear buckets at most 1/32 of their value wide, the lock guests' (guests/locks.h), so that a
percentile from either engine means the same.
"""

from __future__ import annotations

from collections import Counter

from aiovm.stats import weighted_percentile

__all__ = ["Meter"]


class Meter:
    """One machine's counts."""

    def __init__(self, vcpus: int) -> None:
        self.ops = [0] * vcpus
        self.longest = 0
        self._waits: Counter[int] = Counter()

    def reset(self) -> None:
        """The warm-up is over."""
        self.ops = [0] * len(self.ops)
        self.longest = 0
        self._waits.clear()

    def waited(self, ns: int) -> None:
        """One wait of ``ns``."""
        if ns > self.longest:
            self.longest = ns
        if ns >= 32:
            shift = ns.bit_length() - 6
            ns = ns >> shift << shift
        self._waits[ns] += 1

    def percentile(self, percent: int) -> int:
        """The wait that ``percent`` % of the waits do not exceed (ns, to 1/32)."""
        return weighted_percentile(self._waits.items(), percent)

    def share_below(self, ns: int) -> float:
        """Which share of the waits lasted less than ``ns``."""
        total = self._waits.total()
        return sum(n for wait, n in self._waits.items() if wait < ns) / total if total else 1.0
