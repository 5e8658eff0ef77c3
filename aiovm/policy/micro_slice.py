"""Micro-slices: the fair policy with slices far below a millisecond (Ahn et al., EuroSys 2018).

A waiter waits for a preempted holder at most a round of slices, so shorter slices mean shorter waits, paid for with
more context switches. Not modelled: the paper's separate pool of micro-sliced CPUs to which only vCPUs in critical
services are moved.
"""

from __future__ import annotations

from aiovm.policy.fair import Fair

__all__ = ["MicroSlice"]


class MicroSlice(Fair):
    """Slices of 0.1 ms; wake-up granularity and sleeper credit shrink in proportion to the fair policy's 6 ms."""

    name = "micro-slice"

    def __init__(
        self,
        *,
        slice_ns: int = 100_000,
        jitter: int = 100,
        wakeup_granularity: int = 16_667,
        sleeper_credit: int = 50_000,
    ) -> None:
        super().__init__(
            slice_ns=slice_ns, jitter=jitter, wakeup_granularity=wakeup_granularity, sleeper_credit=sleeper_credit
        )
