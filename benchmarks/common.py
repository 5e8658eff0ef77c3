"""What the benchmarks share: a clock, a machine run to its end, a table."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from aiovm import Host, Vm, guests, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["aiovm_seconds", "best", "heartbeat", "interleaved", "qemu_seconds", "show"]

QEMU = shutil.which("qemu-system-x86_64")


async def heartbeat(late: list[int], beats: int) -> None:
    """Note in ``late`` how late each of ``beats`` wake-ups a millisecond apart came, ns."""
    for _ in range(beats):
        wanted = time.monotonic_ns() + 1_000_000
        await asyncio.sleep(0.001)
        late.append(max(0, time.monotonic_ns() - wanted))


def best(measure: Callable[[], float], rounds: int = 3) -> float:
    """The least of some measurements: noise only ever adds."""
    return min(measure() for _ in range(rounds))


def interleaved(*measures: Callable[[], float], rounds: int = 9) -> list[float]:
    """The median of each measurement, taken in turns: a machine that is slower for a while is slower for all."""
    found = [[measure() for measure in measures] for _ in range(rounds)]
    return [median(column) for column in zip(*found, strict=True)]


def aiovm_seconds(
    guest: str,
    cmdline: str,
    *,
    vcpus: int = 1,
    pcpus: int = 1,
    beat_ns: int = 0,
    prepare=None,
    clock=time.perf_counter,
    **options,
) -> float:
    """Host seconds that a guest takes from its first instruction to its end, in virtual time.

    ``beat_ns``: something happens on the clock this often, so that slices are no longer than that. ``prepare`` gets the
    loaded machine. ``clock``: ``time.process_time`` leaves out what other programs take.
    """
    image = guests.path(guest).read_bytes()

    async def main() -> float:
        host = Host(pcpus, seed=1)
        async with Vm(host, vcpus=vcpus, console=lambda _: None, **options) as vm:
            vm.load(image, name=guest, cmdline=cmdline)
            if prepare is not None:
                prepare(vm)
            if beat_ns:

                def beat() -> None:
                    host.clock.call_at(host.clock.now() + beat_ns, beat)

                beat()
            begin = clock()
            outcome = await vm.run()
            assert outcome.status == 1, outcome
            return clock() - begin

    return run(main())


def qemu_seconds(cmdline: str, *extra: str, cpu: bool = False) -> float | None:
    """Host seconds, or CPU seconds, that QEMU TCG takes for the bench guest from process start to its end; None without
    QEMU."""
    if QEMU is None:
        return None
    command = [
        QEMU, "-accel", "tcg", "-m", "64M", "-nographic", "-no-reboot", "-display", "none", "-serial", "null",
        "-monitor", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", str(guests.path("bench")),
        "-append", cmdline, *extra,
    ]  # fmt: skip
    clock = _children if cpu else time.perf_counter
    begin = clock()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stderr
    return clock() - begin


def _children() -> float:
    """CPU seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
