"""``aiovm paper``: published results, reproduced."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aiovm.cli.files import check_writable, write_file
from aiovm.cli.progress import progress_bar
from aiovm.errors import ConfigError
from aiovm.results import to_json
from aiovm.sim.paper import Outcome, run_paper, select, vary
from aiovm.sim.paper.real import REAL_ROWS, run_real

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="paper")(_paper)


def _paper(
    rows: Annotated[str | None, typer.Option(help="Which rows, as in 1,2,A.", show_default="all")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each scenario.")] = 10,
    executor: Annotated[str, typer.Option(help="process, dask or dask:address.")] = "process",
    json: Annotated[Path | None, typer.Option(help="Write the rows here, each as it is complete.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Store each run here as it comes; what is here already is not run again.")
    ] = None,
    vary_: Annotated[
        list[str] | None, typer.Option("--vary", help="Change an assumption: path=value as in aiovm sweep --set.")
    ] = None,
    real: Annotated[bool, typer.Option("--real", help="On real machine code, rows 1, 2 and A.")] = False,
) -> None:
    """Reproduce the paper table: each row's published result beside the measured one.

    A row that does not hold says so; the status is 0 all the same, for the table is the answer.
    docs/paper-table.md tells how each row was modelled.
    """
    if real and out is not None:
        raise ConfigError("--out stores the laboratory's runs, not those of --real")
    if json is not None:
        check_writable(json)
    chosen = vary(select(",".join(REAL_ROWS) if real and rows is None else rows), vary_ or [])
    with progress_bar() as bar:
        task = bar.add_task("runs", total=sum(len(row.scenarios) for row in chosen) * seeds)
        outcomes: list[Outcome] = []

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        for outcome in (
            run_real(chosen, seeds=seeds, progress=progress)
            if real
            else run_paper(chosen, seeds=seeds, executor=executor, out=out, progress=progress)
        ):
            outcomes.append(outcome)
            if json is not None:
                write_file(json, to_json({"rows": outcomes}))
            bar.console.print(f"row {outcome.row}: {'holds' if outcome.passed else 'DOES NOT HOLD'}: {outcome.detail}")
    console = Console()
    if not console.is_terminal:
        console.width = 170
    console.print(_table(outcomes))


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Published results, reproduced")
    for name in ("row", "scenario", "expected", "figure", "median", "range", "holds", "source"):
        table.add_column(name, overflow="fold")
    for o in outcomes:
        table.add_row(
            o.row,
            o.title,
            o.expected,
            o.figure,
            f"{o.measured:.4g}",
            f"{o.low:.4g} to {o.high:.4g}",
            "yes" if o.passed else "no",
            o.source,
        )
    return table
