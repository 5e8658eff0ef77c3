"""``aiovm linux-locks``: what overcommit does to the spinlocks of a real Linux kernel, and what PV spinlocks save."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from aiovm.cli.files import check_writable, write_file
from aiovm.cli.measure import measure_all, trace_paths
from aiovm.cli.options import ClockName, check_jobs, check_seed, parse_counts, warn_as_lines
from aiovm.errors import ConfigError
from aiovm.locks.linux_runner import LinuxExperiment, linux_measure, linux_report
from aiovm.locks.linux_table import print_table
from aiovm.policy import by_name
from aiovm.units import parse_duration, parse_size

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="linux-locks")(_linux_locks)


def _linux_locks(
    kernel: Annotated[
        Path | None, typer.Option(help="A Linux kernel.", show_default="what make guests left in out/guests")
    ] = None,
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs of the guest, 2 to 255.")] = 8,
    pcpus: Annotated[str, typer.Option(help="Physical CPUs they share; several, as in 8,4,2.")] = "2",
    locks: Annotated[str, typer.Option(help="pvqspinlock, qspinlock (nopvspin), tas.")] = "pvqspinlock,qspinlock",
    loads: Annotated[str, typer.Option(help="directory, futex, files, pipe, memory.")] = "directory",
    ple: Annotated[
        bool | None, typer.Option(help="Pause-loop exiting and directed yield.", show_default="both")
    ] = None,
    entries: Annotated[int, typer.Option(help="Of the directory: the more, the longer its lock is held.")] = 200,
    clock: Annotated[
        ClockName, typer.Option(help="virtual: repeatable to the byte. wall: real time.")
    ] = ClockName.VIRTUAL,
    duration: Annotated[
        str | None, typer.Option(help="Measured, of the guest's time.", show_default="200ms, on the wall clock 3s")
    ] = None,
    warmup: Annotated[
        str | None, typer.Option(help="Under load, before that.", show_default="60ms, on the wall clock 500ms")
    ] = None,
    memory: Annotated[str, typer.Option(help="Guest memory, as in 128M or 1G.")] = "128M",
    policy: Annotated[str, typer.Option(help="Scheduling policy, or module:Class of your own.")] = "fair",
    slice_: Annotated[str, typer.Option("--slice", help="How long a vCPU may run while others wait.")] = "6ms",
    seed: Annotated[int, typer.Option(help="Of the host's choices.")] = 0,
    jobs: Annotated[
        int,
        typer.Option(help="Processes to measure in.", show_default="one a CPU of this machine; one on the wall clock"),
    ] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Record from the first load on to .pftrace (Perfetto), .json (Chrome) or .jsonl.",
            callback=warn_as_lines,
        ),
    ] = None,
) -> None:
    """Boot Linux with its paravirtual spinlocks and without, contend for one lock, and compare.

    The guest is an unmodified kernel and one process: a thread on each vCPU makes the same system call without end, so
    that all want one of the kernel's spinlocks. By default they seek in one directory, which holds its lock for some
    microseconds; futex, files, pipe and memory hold theirs much shorter.

    pvqspinlock waiters halt, and whoever unlocks kicks the next. qspinlock is the same queue without that: a waiter
    whose turn it is may be a vCPU that is not running, and then nobody gets the lock. tas is what Linux takes by
    itself on a host that offers no kicks. With pause-loop exits a spinning vCPU gives way before it would halt: kicks
    are seen without.

    Example: aiovm linux-locks

    Example: aiovm linux-locks --vcpus 4 --pcpus 4,2,1 --locks pvqspinlock,qspinlock,tas --no-ple --json rows.json

    Example: aiovm linux-locks --clock wall --loads directory,files
    """
    wall = clock is ClockName.WALL
    check_jobs(jobs)
    check_seed(seed)
    by_name(policy, slice_ns=parse_duration(slice_))  # a mistake is said before anything runs
    experiments = [
        LinuxExperiment(
            _find(kernel),
            lock.strip(),
            vcpus,
            count,
            with_ple,
            loads=tuple(load.strip() for load in loads.split(",")),
            entries=entries,
            warmup_ns=parse_duration(warmup or ("500ms" if wall else "60ms")),
            duration_ns=parse_duration(duration or ("3s" if wall else "200ms")),
            wall=wall,
            memory=parse_size(memory),
            policy=policy,
            slice_ns=parse_duration(slice_),
            seed=seed,
        )
        for count in parse_counts(pcpus)
        for with_ple in ((True, False) if ple is None else (ple,))
        for lock in locks.split(",")
    ]
    if json is not None:
        check_writable(json)
    if trace is not None:
        marks = [f"{e.lock}-{e.vcpus}on{e.pcpus}-{'ple' if e.ple else 'nople'}" for e in experiments]
        paths = trace_paths(trace, marks)
        experiments = [replace(e, trace=path) for e, path in zip(experiments, paths, strict=True)]
    # Guests on the wall clock would take each other's time.
    processes = jobs or (1 if wall else os.cpu_count() or 1)
    report = linux_report(measure_all(linux_measure, experiments, processes, weight=lambda e: e.pcpus))
    print_table(report.rows)
    if json is not None:
        write_file(json, report.to_json())


def _find(kernel: Path | None) -> Path:
    """The kernel that was named, or the one that ``make guests`` leaves."""
    found = kernel or Path(os.environ.get("AIOVM_GUESTS") or "out/guests") / "vmlinuz"
    if not found.is_file():
        hint = "" if kernel else ": make guests fetches one, or name yours with --kernel"
        raise ConfigError(f"no Linux kernel at {found}{hint}")
    return found
