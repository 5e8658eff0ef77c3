"""Rows of the table on real machine code: the lock guests in place of the model guests, judged by the same gates.

The lock guest is one machine, so *n* machines of eight vCPUs on eight physical CPUs become one that is overcommitted as
much, on 8/*n* (two machines: 8 vCPUs on 4; three: 6 on 2). Everything else is the row's: lock, slice, policy, hold and
think times. Rows 1, 2 and A, whose locks the guests have; the preemptable ticket lock is not among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.errors import ConfigError
from aiovm.locks.layout import LOCKS
from aiovm.locks.runner import Experiment, Measurement, Workload, measure
from aiovm.sim.paper import Outcome, judge
from aiovm.sim.result import SimResult, VmResult
from aiovm.sim.scenario import LockBound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiovm.sim.paper.row import Row
    from aiovm.sim.scenario import Scenario

__all__ = ["REAL_ROWS", "as_result", "experiment", "run_real"]

REAL_ROWS = ("1", "2", "A")
_DURATION_NS = 60_000_000


def experiment(scenario: Scenario, seed: int, duration_ns: int = _DURATION_NS) -> Experiment:
    """What the lock guest does instead of ``scenario``."""
    spec = scenario.vm[0]
    load = spec.workload
    assert isinstance(load, LockBound)
    pcpus = max(1, scenario.host.pcpus // spec.count)
    return Experiment(
        load.lock,
        pcpus * spec.count,
        pcpus,
        Workload(int(load.hold), int(load.think), load.hold_dist, load.think_dist, spin=512, duration_ns=duration_ns),
        policy=scenario.host.policy,
        slice_ns=int(scenario.host.slice),
        ple=scenario.features.ple,
        seed=seed,
    )


def run_real(
    rows: Sequence[Row], *, seeds: int = 1, progress: Callable[[int, int], None] | None = None
) -> Iterator[Outcome]:
    """Run ``rows`` on machine code, one run after another."""
    for row in rows:
        if row.row not in REAL_ROWS:
            raise ConfigError(f"row {row.row} has no counterpart in machine code; {', '.join(REAL_ROWS)} have")
    chosen = [
        (row, {k: s for k, s in row.scenarios.items() if getattr(s.vm[0].workload, "lock", "") in LOCKS})
        for row in rows
    ]
    done, total = 0, sum(len(scenarios) for _, scenarios in chosen) * seeds
    for row, scenarios in chosen:
        runs: dict[str, list[SimResult]] = {}
        for label, scenario in scenarios.items():
            runs[label] = []
            for seed in range(1, seeds + 1):
                runs[label].append(as_result(label, measure(experiment(scenario, seed))))
                done += 1
                if progress is not None:
                    progress(done, total)
        yield judge(row, runs)


def as_result(name: str, m: Measurement) -> SimResult:
    """What the lock guest measured, as a simulation's result. What it does not measure is 0."""
    e = m.experiment
    vm = VmResult(
        name=name,
        vcpus=e.vcpus,
        throughput_ops_per_s=m.throughput,
        wait_p50_ns=m.wait_p50_ns,
        wait_p99_ns=m.wait_p99_ns,
        wait_max_ns=m.wait_max_ns,
        spin_share=m.spin_share,
        cpu_share=e.pcpus / e.vcpus,
        steal_share=0.0,
        fairness=m.fairness,
        holder_preemptions=m.lhp,
        waiter_preemptions=m.lwp,
        exits=0,
        ple_exits=m.ple_exits,
        yields_tried=m.yields_tried,
        yields_won=m.yields_won,
        yields_ignored=0,
        kicks=m.kicks,
        halts=m.halts,
        polls_tried=0,
        polls_won=0,
    )
    return SimResult(
        scenario=name,
        seed=e.seed,
        duration_ns=e.workload.duration_ns,
        pcpus=e.pcpus,
        policy=e.policy,
        busy_share=0.0,
        switches=0,
        operations=m.ops,
        vms=[vm],
    )
