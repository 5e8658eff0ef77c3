"""The paper table: published results, reproduced on the laboratory's scheduler or honestly not.

    for outcome in run_paper(select("1,2,A"), seeds=10): ...

Each row says which scenarios it runs and which gates must hold; docs/paper-table.md says how each workload was modelled
and what moves the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from aiovm.errors import ConfigError
from aiovm.sim.jobs import run_jobs
from aiovm.sim.paper import hosts, locks, yields
from aiovm.sim.paper.row import Row, Runs
from aiovm.sim.sweep import Point, changed, run_sweep, split_setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from aiovm.sim.result import SimResult

__all__ = ["ROWS", "Outcome", "Row", "judge", "run_paper", "select", "vary"]

_ORDER = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "A", "B", "C", "D"]

#: Every row, in the table's order.
ROWS: tuple[Row, ...] = tuple(sorted((*locks.ROWS, *yields.ROWS, *hosts.ROWS), key=lambda row: _ORDER.index(row.row)))


class Outcome(msgspec.Struct, frozen=True, rename={"passed": "pass"}):
    """One row's result: ``measured`` is the median over the seeds, ``low`` and ``high`` their range."""

    row: str
    title: str
    expected: str
    measured: float
    low: float
    high: float
    passed: bool
    source: str
    figure: str
    detail: str


def select(names: str | None) -> list[Row]:
    """The rows that ``names`` lists (``1,2,A``); all without it."""
    if names is None:
        return list(ROWS)
    by_name = {row.row.lower(): row for row in ROWS}
    chosen = []
    for name in names.split(","):
        row = by_name.get(name.strip().lower())
        if row is None:
            raise ConfigError(f"no row is called {name.strip()!r}; there are {', '.join(r.row for r in ROWS)}")
        chosen.append(row)
    return chosen


def vary(rows: Sequence[Row], settings: Sequence[str]) -> list[Row]:
    """``rows`` with every scenario changed: ``path=value`` as in a sweep. To see on which assumption a result rests."""
    pairs = dict(split_setting(setting, "path=value") for setting in settings)
    return [replace(r, scenarios={label: changed(s, pairs) for label, s in r.scenarios.items()}) for r in rows]


def run_paper(
    rows: Sequence[Row],
    *,
    seeds: int = 10,
    executor: str = "process",
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Outcome]:
    """Run ``rows``, each scenario with seeds 1 to ``seeds``; outcomes in the rows' order as they are complete.

    ``out``: the directory in which each run is stored as it comes, as a sweep's; what it holds is not run again.
    ``progress`` is called with (runs done, runs in all).
    """
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"1 to 1000 seeds, not {seeds}")
    todo: list[Point] = []
    wanted: list[dict[str, list[str]]] = []
    for row in rows:
        wanted.append({})
        for label, scenario in row.scenarios.items():
            points = [Point({}, seed, scenario) for seed in range(1, seeds + 1)]
            wanted[-1][label] = [point.name for point in points]
            todo += points
    runs = _unstored(todo, executor) if out is None else run_sweep(todo, out, executor=executor)
    results: dict[str, SimResult] = {}
    at = 0
    for done, (point, result) in enumerate(runs, 1):
        results[point.name] = result
        if progress is not None:
            progress(done, len(todo))
        while at < len(rows):
            if any(name not in results for names in wanted[at].values() for name in names):
                break
            yield judge(rows[at], {label: [results[name] for name in names] for label, names in wanted[at].items()})
            at += 1


def _unstored(todo: Sequence[Point], executor: str) -> Iterator[tuple[Point, SimResult]]:
    for place, result in run_jobs([(p.scenario, p.seed) for p in todo], executor=executor):
        yield todo[place], result


def judge(row: Row, runs: Runs) -> Outcome:
    """The row's outcome; ``runs``: each scenario's results, one a seed."""
    verdict = row.judge(runs)
    failed = [gate for gate, holds in verdict.gates.items() if not holds]
    detail = verdict.detail
    if failed:
        detail += f"; does not hold: {', '.join(failed)}" + (f" ({row.remark})" if row.remark else "")
    return Outcome(
        row=row.row,
        title=row.title,
        expected=row.expected,
        measured=verdict.measured,
        low=min(verdict.values),
        high=max(verdict.values),
        passed=verdict.passed,
        source=row.source,
        figure=row.headline,
        detail=detail,
    )
