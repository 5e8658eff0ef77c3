"""Pictures of a simulation (waits, where the time went, who ran where) and of a sweep (throughput), by matplotlib.

No display and no global state; the same result gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from aiovm.errors import ConfigError
from aiovm.locks.plot import time_axis
from aiovm.trace import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiovm.sim.result import SimResult
    from aiovm.trace import Record

__all__ = ["check_plots", "plot_sim", "plot_sweep"]

#: Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_MOST_MACHINES = 40
#: A logarithmic axis has no place for 0.
_SHORTEST_NS = 10
#: The timeline shows the run's last part, so much of it.
_TIMELINE_NS = 100_000_000


def check_plots(directory: Path | None = None) -> None:
    """Refuse what could not be drawn or written; to be asked before a long run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'aiovm[plot]'") from None
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the directory {directory}: {error.strerror}") from error


def plot_sim(result: SimResult, records: Sequence[Record], directory: Path) -> None:
    """Draw ``waits.png``, ``time.png`` and ``timeline.png`` into ``directory``."""
    check_plots(directory)
    title = f"{result.scenario}, seed {result.seed}, {result.pcpus} physical CPUs, {result.policy}"
    figure, axes = _figure(f"Waits\n{title}")
    vms = result.vms[:_MOST_MACHINES]
    places = range(len(vms))
    time_axis(axes)
    # Where a median is a p99, its ring stays to be seen around the smaller mark.
    for name, label, colour, look in (
        ("p50", "median", _COLOURS[0], {"marker": "o", "markersize": 9, "fillstyle": "none"}),
        ("p99", "99th percentile", _COLOURS[1], {"marker": "s", "markersize": 5}),
        ("max", "longest", _COLOURS[3], {"marker": "^"}),
    ):
        values = [max(_SHORTEST_NS, getattr(vm, f"wait_{name}_ns")) for vm in vms]
        axes.plot(values, places, linestyle="none", color=colour, label=label, **look)
    axes.set_xlabel(f"wait for a lock, or a transaction's time (tcp-rr); below {_SHORTEST_NS} ns drawn there")
    _finish(figure, axes, [vm.name for vm in vms], directory / "waits.png")

    figure, axes = _figure(f"Where the vCPUs' time went\n{title}")
    spin = [100 * vm.spin_share * vm.cpu_share for vm in vms]
    work = [100 * vm.cpu_share - s for vm, s in zip(vms, spin, strict=True)]
    steal = [100 * vm.steal_share for vm in vms]
    left = [0.0] * len(vms)
    for label, values, colour in (
        ("working", work, _COLOURS[2]),
        ("spinning", spin, _COLOURS[3]),
        ("stolen", steal, _COLOURS[1]),
    ):
        axes.barh(places, values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the vCPUs' time; the rest: asleep")
    _finish(figure, axes, [vm.name for vm in vms], directory / "time.png")
    _timeline(result, records, directory / "timeline.png", title)


def _timeline(result: SimResult, records: Sequence[Record], path: Path, title: str) -> None:
    machine = [n for n, vm in enumerate(result.vms) for _ in range(vm.vcpus)]
    end = max((r.now for r in records), default=0)
    begin = max(0, end - _TIMELINE_NS)
    bars: dict[tuple[int, int], list[tuple[float, float]]] = {}
    since: dict[int, tuple[int, int]] = {}
    for record in records:
        if record.kind is Kind.SCHED_IN:
            since[record.vcpu] = record.now, record.a
        elif record.kind is Kind.SCHED_OUT and record.vcpu in since:
            start, pcpu = since.pop(record.vcpu)
            if record.now > begin and record.now > start:
                start = max(start, begin)
                bars.setdefault((pcpu, machine[record.vcpu]), []).append((start / 1e6, (record.now - start) / 1e6))
    figure, axes = _figure(f"Who ran on which physical CPU\n{title}")
    for (pcpu, vm), spans in sorted(bars.items()):
        axes.broken_barh(spans, (pcpu - 0.4, 0.8), color=_COLOURS[vm % len(_COLOURS)], linewidth=0)
    for vm in range(min(len(result.vms), len(_COLOURS))):
        axes.broken_barh([], (0, 0), color=_COLOURS[vm], label=result.vms[vm].name)
    axes.set_xlabel("time, ms")
    axes.set_xlim(begin / 1e6, end / 1e6 if end > begin else begin / 1e6 + 1)
    _finish(figure, axes, [f"CPU {n}" for n in range(result.pcpus)], path)


def plot_sweep(found: Mapping[str, Sequence[SimResult]], path: Path) -> None:
    """Draw throughput, median and range over the seeds, for each setting."""
    check_plots()
    figure, axes = _figure("Throughput over the sweep: median and range of the seeds")
    places = range(len(found))
    middle = [median(r.throughput for r in results) for results in found.values()]
    low = [m - min(r.throughput for r in results) for m, results in zip(middle, found.values(), strict=True)]
    high = [max(r.throughput for r in results) - m for m, results in zip(middle, found.values(), strict=True)]
    axes.errorbar(middle, places, xerr=[low, high], fmt="o", color=_COLOURS[0], capsize=3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("operations a second")
    _finish(figure, axes, list(found), path)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, names: Sequence[str], path: Path) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=8, frameon=False)
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None} if Path(path).suffix == ".png" else None)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot write {path}: {why}") from error
