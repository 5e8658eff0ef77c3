"""``aiovm sim``: one scenario of model guests."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import Annotated

import typer
from rich.console import Console

from aiovm.cli.files import check_writable, write_file
from aiovm.cli.options import TraceFiles  # noqa: TC001  (typer reads the annotations)
from aiovm.cli.progress import progress_bar
from aiovm.results import to_json
from aiovm.sim.lab import simulate
from aiovm.sim.plot import check_plots, plot_sim
from aiovm.sim.scenario import load_scenario
from aiovm.sim.table import print_result
from aiovm.sinks import open_sinks
from aiovm.trace import ListSink, Tracer

__all__ = ["register"]

_STEPS = 1000


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="sim")(_sim)


def _sim(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the scenario's.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
    trace: TraceFiles = None,
    plot: Annotated[Path | None, typer.Option(help="Draw waits, shares and a timeline into this directory.")] = None,
) -> None:
    """Simulate a scenario: thousands of vCPUs, no instructions, the same scheduler.

    Example: aiovm sim scenario.toml --json result.json
    """
    spec = load_scenario(scenario)
    if json is not None:
        check_writable(json)
    tracer = Tracer()
    records = ListSink()
    if trace is not None:
        open_sinks(tracer, trace)
    if plot is not None:
        check_plots(plot)
        tracer.add(records)
    try:
        with progress_bar() as bar:
            task = bar.add_task(spec.name, total=_STEPS)
            result = simulate(
                spec, seed=seed, trace=tracer, progress=lambda share: bar.update(task, completed=round(share * _STEPS))
            )
    finally:
        tracer.close()
    print_result(result, Console())
    if json is not None:
        write_file(json, to_json(result))
    if plot is not None:
        plot_sim(result, records.records, plot)
