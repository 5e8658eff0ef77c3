"""``aiovm locks``: what overcommit does to spinlocks, on real guest code."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from aiovm.cli.files import check_writable, write_file
from aiovm.cli.measure import measure_all, trace_paths
from aiovm.cli.options import TraceFiles, check_jobs, check_seed, parse_counts
from aiovm.locks.plot import check as check_plot
from aiovm.locks.plot import plot
from aiovm.locks.runner import Experiment, Measurement, Workload, measure, report
from aiovm.locks.table import print_table
from aiovm.policy import by_name
from aiovm.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["register"]

_DEFAULT = "tas,ttas,ticket,pvticket,mcs,qspinlock,pvqspinlock"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="locks")(_locks)


def _locks(
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs of the guest, 1 to 255.")] = 8,
    pcpus: Annotated[str, typer.Option(help="Physical CPUs they share; several, as in 8,4,2.")] = "2",
    locks: Annotated[str, typer.Option(help="Which locks, in this order.")] = _DEFAULT,
    ple: Annotated[bool, typer.Option(help="Pause-loop exiting and directed yield.")] = True,
    policy: Annotated[str, typer.Option(help="Scheduling policy, or module:Class of your own.")] = "fair",
    slice_: Annotated[str, typer.Option("--slice", help="How long a vCPU may run while others wait.")] = "6ms",
    seed: Annotated[int, typer.Option(help="Of the host's choices and of the guest's think times.")] = 0,
    duration: Annotated[str, typer.Option(help="Virtual time that is measured.")] = "200ms",
    warmup: Annotated[
        str | None, typer.Option(help="Before measuring.", show_default="until queues are steady")
    ] = None,
    hold: Annotated[str, typer.Option(help="Time in the critical section.")] = "2us",
    think: Annotated[str, typer.Option(help="Mean time between critical sections.")] = "20us",
    hold_dist: Annotated[str, typer.Option(help="fixed, exp or uniform.")] = "fixed",
    think_dist: Annotated[str, typer.Option(help="fixed, exp or uniform.")] = "exp",
    nlocks: Annotated[int, typer.Option(help="Locks to choose from, 1 to 64.")] = 1,
    spin: Annotated[int, typer.Option(help="PAUSEs before a paravirtual lock halts.")] = 512,
    jobs: Annotated[int, typer.Option(help="Processes to measure in.", show_default="one a CPU of this machine")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    trace: TraceFiles = None,
    plot_: Annotated[Path | None, typer.Option("--plot", help="Draw the comparison, as in locks.png.")] = None,
) -> None:
    """Run each lock on the same workload and compare.

    Every vCPU thinks, takes the lock, holds it, and starts again. Efficiency is throughput per physical CPU relative to
    the same guest with a physical CPU for each vCPU. All of it happens in virtual time: the same seed gives the
    same rows, to the byte.

    Example: aiovm locks --vcpus 8 --pcpus 8,4,2 --no-ple --plot locks.png
    """
    check_seed(seed)
    check_jobs(jobs)
    workload = Workload(
        hold_ns=parse_duration(hold),
        think_ns=parse_duration(think),
        hold_dist=hold_dist,
        think_dist=think_dist,
        nlocks=nlocks,
        spin=spin,
        duration_ns=parse_duration(duration),
        warmup_ns=None if warmup is None else parse_duration(warmup),
    )
    by_name(policy, slice_ns=parse_duration(slice_))  # a mistake is said before anything runs
    wanted = [
        Experiment(
            lock.strip(), vcpus, count, workload, policy=policy, slice_ns=parse_duration(slice_), ple=ple, seed=seed
        )
        for count in parse_counts(pcpus)
        for lock in locks.split(",")
    ]
    for path in (json, plot_):
        if path is not None:
            check_writable(path)
    if plot_ is not None:
        check_plot(plot_)
    if trace is not None:
        paths = trace_paths(trace, [f"{e.lock}-{e.vcpus}on{e.pcpus}" for e in wanted])
        wanted = [replace(e, trace=path) for e, path in zip(wanted, paths, strict=True)]
    baselines = [replace(e, pcpus=vcpus, trace=None) for e in {e.lock: e for e in wanted}.values()]
    extra = [b for b in baselines if not any(replace(e, trace=None) == b for e in wanted)]

    # The ones with the most physical CPUs take longest: begin with them.
    results = measure_all(measure, [*wanted, *extra], jobs or os.cpu_count() or 1, weight=lambda e: e.pcpus)
    found = {replace(m.experiment, trace=None): m for m in results}
    rows = report([found[replace(e, trace=None)] for e in wanted], {b.lock: found[b] for b in baselines})
    print_table(rows.rows)
    _say_broken(results)
    if json is not None:
        write_file(json, rows.to_json())
    if plot_ is not None:
        plot(rows.rows, plot_, title=f"{workload.text()}, policy {policy}, seed {seed}")


def _say_broken(results: Sequence[Measurement]) -> None:
    broken = sorted({m.experiment.lock for m in results if m.status != 1})
    if broken:
        typer.echo(f"mutual exclusion was violated by: {', '.join(broken)}", err=True)
        raise typer.Exit(3)
