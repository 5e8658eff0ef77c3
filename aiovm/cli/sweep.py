"""``aiovm sweep``: a scenario over ranges of parameters."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from aiovm.cli.files import check_writable
from aiovm.cli.progress import progress_bar
from aiovm.errors import ConfigError
from aiovm.sim.plot import check_plots, plot_sweep
from aiovm.sim.scenario import load_scenario
from aiovm.sim.sweep import points, run_sweep

if TYPE_CHECKING:
    from aiovm.sim.result import SimResult

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="sweep")(_sweep)


def _sweep(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=1..16 or path=a,b; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each point, with seeds 1 to N.")] = 1,
    executor: Annotated[str, typer.Option(help="process, dask or dask:address.")] = "process",
    out: Annotated[Path, typer.Option(help="Where each result is stored as it comes.")] = Path("sweep"),
    plot: Annotated[Path | None, typer.Option(help="Draw throughput over the settings, as in sweep.png.")] = None,
) -> None:
    """Run a scenario for every combination of settings; resumes where it was interrupted.

    Example: aiovm sweep scenario.toml --set pcpus=1..16 --seeds 10 --out results
    """
    if not set_:
        raise ConfigError("nothing to sweep: give --set path=1..16")
    if plot is not None:
        check_plots()
        check_writable(plot)
    todo = points(load_scenario(scenario), set_, seeds)
    found: dict[str, list[SimResult]] = {_label(p.settings): [] for p in todo}
    with progress_bar() as bar:
        task = bar.add_task("runs", total=len(todo))
        for point, result in run_sweep(todo, out, executor=executor):
            found[_label(point.settings)].append(result)
            bar.advance(task)
    Console().print(_table(found))
    if plot is not None:
        plot_sweep(found, plot)


def _label(settings: dict[str, str]) -> str:
    return " ".join(f"{path}={value}" for path, value in settings.items())


def _table(found: dict[str, list[SimResult]]) -> Table:
    table = Table(title="Medians over the seeds")
    for name in ("setting", "runs", "ops/s", "lowest", "highest", "spin", "busy"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for label, results in found.items():
        rates = [r.throughput for r in results]
        table.add_row(
            label,
            str(len(results)),
            f"{median(rates):,.0f}",
            f"{min(rates):,.0f}",
            f"{max(rates):,.0f}",
            f"{100 * median(r.spin_share for r in results):.1f} %",
            f"{100 * median(r.busy_share for r in results):.1f} %",
        )
    return table
