"""Many runs at once: on this machine's processes, or on an existing Dask cluster.

Both are the same: a list of (scenario, seed), results as they come. A run is a pure function of the two, so where it
runs changes nothing in what it says.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

from aiovm.errors import AiovmError, ConfigError, EngineError
from aiovm.sim.lab import simulate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiovm.sim.result import SimResult
    from aiovm.sim.scenario import Scenario

__all__ = ["Job", "RunFailed", "run_jobs"]

Job = tuple["Scenario", int]


class RunFailed(Exception):
    """A run raised what is none of our errors: where, and what in words, as an exception may not survive the way."""

    def __init__(self, filename: str, line: int, what: str) -> None:
        super().__init__(filename, line, what)
        self.filename, self.line, self.what = filename, line, what

    def __str__(self) -> str:
        return f"{self.filename}, line {self.line}: {self.what}"

    @classmethod
    def of(cls, error: Exception) -> RunFailed:
        """``error`` as one, with the place that raised it."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        return cls(last.filename, last.lineno or 0, f"{type(error).__name__}: {error}")


def _run(job: Job) -> SimResult:
    try:
        return simulate(job[0], seed=job[1])
    except AiovmError:
        raise
    except Exception as error:
        raise RunFailed.of(error) from error


def _begin() -> None:
    """A process of the pool dies at once, with its parent and at Ctrl-C, which all processes get.

    A KeyboardInterrupt may leave the queue of results locked for ever. A parent that was killed tells nobody.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_jobs(
    jobs: Sequence[Job], *, executor: str = "process", workers: int | None = None
) -> Iterator[tuple[int, SimResult]]:
    """Run every job; yields (its place in ``jobs``, its result) as they end.

    ``executor``: ``process``, ``dask`` (a cluster of its own on this machine) or ``dask:address``.
    """
    kind, _, address = executor.partition(":")
    if kind == "process" and not address:
        return _on_processes(jobs, workers)
    if kind == "dask":
        return _on_dask(jobs, address or None)
    raise ConfigError(f"no executor is called {executor!r}: process, dask or dask:address")


def _on_processes(jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[int, SimResult]]:
    count = min(workers or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        for place, job in enumerate(jobs):
            yield place, _run(job)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin) as pool:
        places = {pool.submit(_run, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except BrokenProcessPool as error:
            raise EngineError("a process of the pool was killed from outside: is there enough memory?") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_dask(jobs: Sequence[Job], address: str | None) -> Iterator[tuple[int, SimResult]]:
    try:
        from distributed import Client
        from distributed import as_completed as dask_as_completed
    except ImportError as error:
        raise ConfigError("the dask executor needs the package distributed") from error
    try:
        client = Client(address, timeout="10s") if address else Client(processes=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        futures = client.map(_run, list(jobs), pure=False)
        places = {future.key: place for place, future in enumerate(futures)}
        for future in dask_as_completed(futures):
            yield places[future.key], future.result()
