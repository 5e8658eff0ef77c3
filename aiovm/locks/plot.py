"""The picture of a lock comparison: efficiency against overcommit, and how long waiting took; by matplotlib.

Left, a line a lock, named at its end. Right, a row a lock and in it a bar for each degree of overcommit, from the
median wait by the 99th percentile to the longest, on a logarithmic scale. Locks keep their colour, and a marker of
their own; the colours are Okabe and Ito's, which colour-blind people tell apart.

Rules: no display and no global state; the same rows give the same bytes with the same matplotlib.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiovm.errors import ConfigError
from aiovm.units import format_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.locks.result import LockRow

__all__ = ["check", "plot", "time_axis"]

#: The formats, and what each would say about when and by what it was made; None leaves it out.
_METADATA: dict[str, dict[str, None]] = {
    ".pdf": {"CreationDate": None, "Producer": None},
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
_COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY = "#555555"
#: A lock that was free at once waits for some tens of ns; below that the axis would only show noise.
_SHORTEST_NS = 10


def check(path: str | Path) -> None:
    """Refuse, with :class:`ConfigError`, what :func:`plot` could not write; to be asked before a long run."""
    if Path(path).suffix not in _METADATA:
        raise ConfigError(f"picture {str(path)!r}: a picture ends in {', '.join(_METADATA)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'aiovm[plot]'") from None


def plot(rows: Sequence[LockRow], path: str | Path, *, title: str = "") -> None:
    """Draw ``rows`` into the file ``path``, in the format of its suffix. ``title``: the workload and the seed."""
    check(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    locks = list(dict.fromkeys(row.lock for row in rows))
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    figure.suptitle("Locks on overcommitted vCPUs" + (f"\n{title}" if title else ""), fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _efficiency(left, rows, locks)
    _waits(right, rows, locks)
    try:
        # SVG's identifiers are hashes, salted with a random number unless told otherwise.
        with rc_context({"svg.hashsalt": "aiovm"}):
            figure.savefig(path, dpi=150, metadata=_METADATA[Path(path).suffix])
    except OSError as error:
        raise ConfigError(f"cannot write the picture {str(path)!r}: {error.strerror}") from error


def _ratio(row: LockRow) -> str:
    common = gcd(row.vcpus, row.pcpus)
    return f"{row.vcpus // common}:{row.pcpus // common}"


def _ratios(rows: Sequence[LockRow]) -> dict[str, float]:
    """The degrees of overcommit that occur, by name, from the least."""
    found = {_ratio(row): row.vcpus / row.pcpus for row in rows}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _style(index: int) -> dict[str, str]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _spread(heights: Sequence[float], gap: float, floor: float = 0.0) -> list[float]:
    """Places for labels that would like to be at ``heights``: at least ``gap`` apart, centred, none below ``floor``."""
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    # Clusters of labels that touch: (sum of the wishes, members).
    clusters: list[tuple[float, list[int]]] = []
    for i in order:
        total, members = heights[i], [i]
        while clusters:
            before, others = clusters[-1]
            top = before / len(others) + gap * (len(others) - 1) / 2
            bottom = total / len(members) - gap * (len(members) - 1) / 2
            if bottom - top >= gap:
                break
            clusters.pop()
            total, members = before + total, others + members
        clusters.append((total, members))
    places = [0.0] * len(heights)
    lowest = floor
    for total, members in clusters:
        first = max(lowest, total / len(members) - gap * (len(members) - 1) / 2)
        for n, i in enumerate(members):
            places[i] = first + gap * n
        lowest = first + gap * len(members)
    return places


def _efficiency(axes: Any, rows: Sequence[LockRow], locks: Sequence[str]) -> None:
    ratios = _ratios(rows)
    at = {name: position for position, name in enumerate(ratios)}
    ends = []
    for index, lock in enumerate(locks):
        points = sorted((at[_ratio(row)], row.efficiency) for row in rows if row.lock == lock)
        axes.plot(*zip(*points, strict=True), **_style(index), markersize=6, linewidth=1.8, alpha=0.9, clip_on=False)
        ends.append(points[-1])
    top = max(1.1, *(row.efficiency * 1.05 for row in rows)) if rows else 1.1
    last = max(at.values(), default=0)
    for index, (lock, place) in enumerate(zip(locks, _spread([y for _, y in ends], top * 0.055), strict=True)):
        axes.annotate(
            lock,
            xy=ends[index],
            xytext=(last + 0.12 * max(last, 1), place),
            color=_style(index)["color"],
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": _style(index)["color"], "linewidth": 0.5, "shrinkB": 4},
            annotation_clip=False,
        )
    axes.set_xticks(list(at.values()), list(at))
    axes.set_xlim(-0.15, last + 0.42 * max(last, 1))
    axes.set_ylim(min(0.0, -0.03 * top), top)
    axes.set_xlabel("vCPUs : physical CPUs")
    axes.set_ylabel("throughput per physical CPU, relative to 1:1")
    axes.set_title("Efficiency", fontsize=10)
    _plain(axes)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def time_axis(axes: Any) -> None:
    """A logarithmic x axis of times in ns, written as people do."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda ns, _: format_ns(round(ns)).replace(".00", "").replace(".0", ""))
    )


def _waits(axes: Any, rows: Sequence[LockRow], locks: Sequence[str]) -> None:
    ratios = list(_ratios(rows))
    step = 0.8 / max(1, len(ratios))
    shortest, longest = 10 * _SHORTEST_NS, 10 * _SHORTEST_NS
    for row in rows:
        index, nth = locks.index(row.lock), ratios.index(_ratio(row))
        colour = _style(index)["color"]
        y = index + step * (nth - (len(ratios) - 1) / 2)
        p50, p99, most = (max(_SHORTEST_NS, ns) for ns in (row.wait_p50_ns, row.wait_p99_ns, row.wait_max_ns))
        shortest, longest = min(shortest, p50), max(longest, most)
        axes.plot((p50, p99), (y, y), color=colour, linewidth=3.2, solid_capstyle="butt", alpha=0.55)
        axes.plot((p99, most), (y, y), color=colour, linewidth=1.0)
        axes.plot(p50, y, "o", color="white", markeredgecolor=colour, markersize=4.5)
        axes.plot(p99, y, "o", color=colour, markersize=4.5)
        axes.plot(most, y, "|", color=colour, markersize=6)
        if len(ratios) > 1:
            axes.annotate(
                _ratio(row), (most, y), (5, 0), textcoords="offset points", va="center", fontsize=6.5, color=_GREY
            )
    time_axis(axes)
    axes.set_xlim(shortest * 0.7, longest * 4)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(locks)), locks)
    axes.set_ylim(len(locks) - 0.4, -0.6)
    axes.set_xlabel("○ median    ● 99th percentile    | longest")
    axes.set_title("Wait for the lock", fontsize=10)
    _plain(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)


def _plain(axes: Any) -> None:
    """No frame but the axes themselves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
