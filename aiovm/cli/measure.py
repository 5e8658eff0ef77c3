"""Many measurements, each a world of its own: in processes, with a progress bar; and where their traces go."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aiovm.cli.files import check_writable
from aiovm.cli.progress import progress_bar
from aiovm.errors import InternalError
from aiovm.sinks import check_suffix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["measure_all", "trace_paths"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def measure_all(
    measure: Callable[[Task], Result], tasks: Sequence[Task], jobs: int, *, weight: Callable[[Task], int]
) -> list[Result]:
    """``measure`` of each task, in ``jobs`` processes; the heaviest begin, and the results keep the tasks' order."""
    order = sorted(range(len(tasks)), key=lambda i: (-weight(tasks[i]), i))
    results: dict[int, Result] = {}
    with progress_bar() as progress:
        bar = progress.add_task("measuring", total=len(tasks))
        if jobs == 1 or len(tasks) == 1:
            for i in order:
                results[i] = measure(tasks[i])
                progress.advance(bar)
        else:
            with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
                futures = {pool.submit(measure, tasks[i]): i for i in order}
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        progress.advance(bar)
                except BrokenProcessPool as error:
                    raise InternalError(f"a measuring process ended: {error}") from error
                finally:
                    pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(tasks))]


def trace_paths(paths: str, marks: Sequence[str]) -> list[str]:
    """The files of each measurement: ``out.pftrace`` becomes ``out.MARK.pftrace`` when there are several."""
    parts = paths.split(",")
    for part in parts:
        check_suffix(part)
        check_writable(part)
    if len(marks) == 1:
        return [paths]
    return [",".join(str(Path(p).with_suffix(f".{mark}{Path(p).suffix}")) for p in parts) for mark in marks]
