"""``aiovm locks``: what overcommit does to spinlocks, on real guest code."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aiovm.cli.files import check_writable, write_file
from aiovm.cli.progress import progress_bar
from aiovm.errors import ConfigError, InternalError
from aiovm.locks.plot import check as check_plot
from aiovm.locks.plot import plot
from aiovm.locks.runner import Experiment, Measurement, Workload, measure, report
from aiovm.locks.table import print_table
from aiovm.policy import by_name
from aiovm.sinks import check_suffix
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
    warmup: Annotated[str | None, typer.Option(help="Before measuring. [default: until queues are steady]")] = None,
    hold: Annotated[str, typer.Option(help="Time in the critical section.")] = "2us",
    think: Annotated[str, typer.Option(help="Mean time between critical sections.")] = "20us",
    hold_dist: Annotated[str, typer.Option(help="fixed, exp or uniform.")] = "fixed",
    think_dist: Annotated[str, typer.Option(help="fixed, exp or uniform.")] = "exp",
    nlocks: Annotated[int, typer.Option(help="Locks to choose from, 1 to 64.")] = 1,
    spin: Annotated[int, typer.Option(help="PAUSEs before a paravirtual lock halts.")] = 512,
    jobs: Annotated[int, typer.Option(help="Processes to measure in. [default: one a CPU of this machine]")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    trace: Annotated[str | None, typer.Option(help="Record to .pftrace (Perfetto), .json (Chrome) or .jsonl.")] = None,
    plot_: Annotated[Path | None, typer.Option("--plot", help="Draw the comparison, as in locks.png.")] = None,
) -> None:
    """Run each lock on the same workload and compare.

    Every vCPU thinks, takes the lock, holds it, and starts again. Efficiency is throughput per physical CPU relative to
    the same guest with a physical CPU for each vCPU. All of it happens in virtual time: the same seed gives the
    same rows, to the byte.

    Example: aiovm locks --vcpus 8 --pcpus 8,4,2 --no-ple --plot locks.png
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"bad seed {seed}: 64 bits at most")
    if jobs < 0:
        raise ConfigError(f"bad number of processes {jobs}")
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
            lock.strip(), vcpus, _count(p), workload, policy=policy, slice_ns=parse_duration(slice_), ple=ple, seed=seed
        )
        for p in pcpus.split(",")
        for lock in locks.split(",")
    ]
    for path in (json, plot_):
        if path is not None:
            check_writable(path)
    if plot_ is not None:
        check_plot(plot_)
    if trace is not None:
        for part in trace.split(","):
            check_suffix(part)
            check_writable(part)
        wanted = [replace(e, trace=_trace_path(trace, e, wanted)) for e in wanted]
    baselines = [replace(e, pcpus=vcpus, trace=None) for e in {e.lock: e for e in wanted}.values()]
    extra = [b for b in baselines if not any(replace(e, trace=None) == b for e in wanted)]

    results = _measure_all([*wanted, *extra], jobs or os.cpu_count() or 1)
    found = {replace(m.experiment, trace=None): m for m in results}
    rows = report([found[replace(e, trace=None)] for e in wanted], {b.lock: found[b] for b in baselines})
    print_table(rows.rows)
    _say_broken(results)
    if json is not None:
        write_file(json, rows.to_json())
    if plot_ is not None:
        plot(rows.rows, plot_, title=f"{workload.text()}, policy {policy}, seed {seed}")


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"bad number of physical CPUs {text!r}") from None


def _trace_path(path: str, experiment: Experiment, all_: Sequence[Experiment]) -> str:
    """One file a row when there are several: ``out.pftrace`` becomes ``out.ticket-8on2.pftrace``."""
    if len(all_) == 1:
        return path
    mark = f".{experiment.lock}-{experiment.vcpus}on{experiment.pcpus}"
    return ",".join(str(Path(p).with_suffix(mark + Path(p).suffix)) for p in path.split(","))


def _measure_all(experiments: list[Experiment], jobs: int) -> list[Measurement]:
    """Measure in parallel; each measurement is a world of its own, so the order does not matter."""
    # The ones with the most physical CPUs take longest: begin with them.
    order = sorted(range(len(experiments)), key=lambda i: (-experiments[i].pcpus, i))
    results: dict[int, Measurement] = {}
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(experiments))
        if jobs == 1 or len(experiments) == 1:
            for i in order:
                results[i] = measure(experiments[i])
                progress.advance(task)
        else:
            with ProcessPoolExecutor(min(jobs, len(experiments)), get_context("spawn")) as pool:
                futures = {pool.submit(measure, experiments[i]): i for i in order}
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        progress.advance(task)
                except BrokenProcessPool as error:
                    raise InternalError(f"a measuring process ended: {error}") from error
                finally:
                    pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(experiments))]


def _say_broken(results: Sequence[Measurement]) -> None:
    broken = sorted({m.experiment.lock for m in results if m.status != 1})
    if broken:
        typer.echo(f"mutual exclusion was violated by: {', '.join(broken)}", err=True)
        raise typer.Exit(3)
