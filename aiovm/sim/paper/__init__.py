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
from aiovm.sim.jobs import Job, run_jobs
from aiovm.sim.paper import hosts, locks, yields
from aiovm.sim.paper.row import Row, Runs
from aiovm.sim.sweep import changed, split_setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Outcome]:
    """Run ``rows``, each scenario with seeds 1 to ``seeds``; outcomes in the rows' order as they are complete.

    ``progress`` is called with (runs done, runs in all).
    """
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"1 to 1000 seeds, not {seeds}")
    total = sum(len(row.scenarios) for row in rows) * seeds
    jobs: list[Job] = [
        (scenario, seed) for row in rows for scenario in row.scenarios.values() for seed in range(1, seeds + 1)
    ]
    results: list[SimResult | None] = [None] * len(jobs)
    start = 0
    at = 0
    for done, (place, result) in enumerate(run_jobs(jobs, executor=executor), 1):
        results[place] = result
        if progress is not None:
            progress(done, total)
        while at < len(rows):
            end = start + len(rows[at].scenarios) * seeds
            own = results[start:end]
            if None in own:
                break
            found = [r for r in own if r is not None]
            yield judge(rows[at], {k: found[n * seeds : (n + 1) * seeds] for n, k in enumerate(rows[at].scenarios)})
            start, at = end, at + 1


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
