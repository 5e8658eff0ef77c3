"""One row of the paper table: which scenarios to run, and how to judge what they gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from aiovm.sim.scenario import Features, HostSpec, LockBound, Ns, Scenario, VmSpec

if TYPE_CHECKING:
    from aiovm.sim.result import SimResult
    from aiovm.sim.scenario import Workload

__all__ = ["KVM_2015", "MS", "OLD_PAUSE", "Row", "Runs", "Verdict", "scenario", "throughputs"]

MS = 1_000_000
#: A PAUSE before Skylake: about 10 cycles (Intel Optimization Reference Manual, "Pause Latency in Skylake").
OLD_PAUSE = {"pause_ns": 5}
#: Linux 4.1's KVM, and 4.4's as far as yields go.
KVM_2015 = Features(kernel_mode_filter=False, boost_woken=False, kick_yields=False, halt_poll=Ns(0))

#: The results by scenario label, one for each seed in the same order.
Runs = Mapping[str, "Sequence[SimResult]"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``values``: the headline figure, one a seed. ``detail``: every figure that a gate looks at, and which failed."""

    values: Sequence[float]
    gates: Mapping[str, bool]
    detail: str

    @property
    def passed(self) -> bool:
        """Every gate holds."""
        return all(self.gates.values())

    @property
    def measured(self) -> float:
        """The median of the seeds."""
        return median(self.values)


@dataclass(frozen=True, slots=True)
class Row:
    """``expected`` is the published result, ``gate`` what must hold, ``headline`` the figure that the table shows."""

    row: str
    title: str
    expected: str
    gate: str
    headline: str
    source: str
    scenarios: Mapping[str, Scenario]
    judge: Callable[[Runs], Verdict]
    #: Why it does not hold, where it does not.
    remark: str = ""


def scenario(
    vms: int = 1,
    workload: Workload | None = None,
    *,
    vcpus: int = 8,
    pcpus: int = 8,
    policy: str = "fair",
    slice_ns: int = 6 * MS,
    jitter: int = 100,
    warmup_ms: int = 300,
    duration_ms: int = 300,
    features: Features | None = None,
    costs: dict[str, int] | None = None,
    options: dict[str, int] | None = None,
) -> Scenario:
    """``vms`` equal machines; by default the toy's: 8 vCPUs on 8 CPUs, 6 ms slices that vary by 10 %, PLE off."""
    return Scenario(
        warmup=Ns(warmup_ms * MS),
        duration=Ns(duration_ms * MS),
        host=HostSpec(pcpus=pcpus, policy=policy, slice=Ns(slice_ns), jitter=jitter, options=options or {}),
        features=Features(ple=False) if features is None else features,
        costs=costs or {},
        vm=[VmSpec(count=vms, vcpus=vcpus, workload=LockBound() if workload is None else workload)],
    )


def throughputs(runs: Runs, label: str) -> list[float]:
    """Operations a second of all machines, by seed."""
    return [result.throughput for result in runs[label]]
