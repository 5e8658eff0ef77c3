"""The table of a lock comparison, for people: grouped by vCPUs and physical CPUs, in the order the rows came.

On a terminal it has colours, and where the terminal is narrow it comes as two tables: how the locks did, and why. Into
a file or a pipe it is plain, one table, and as wide as it needs to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aiovm.units import format_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from aiovm.locks.result import LockRow

__all__ = ["print_table"]

_PLAIN_WIDTH = 160


def print_table(rows: Sequence[LockRow], out: IO[str] | None = None) -> None:
    """Print ``rows`` to ``out``, by default the standard output."""
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, width=_PLAIN_WIDTH, color_system=None)
    whole = _table(rows, _HOW + _WHY)
    if console.measure(whole, options=console.options.update(width=_PLAIN_WIDTH)).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(rows, _HOW))
        console.print(_table(rows, _WHY))


def _count(n: int) -> str:
    """A count in at most six characters."""
    for limit, unit in ((10_000_000, "M"), (10_000, "k")):
        if n >= limit:
            return f"{n * 100 // limit / 10:.1f}{unit}" if n < limit * 10 else f"{n * 10 // limit}{unit}"
    return str(n)


def _efficiency(row: LockRow) -> Text:
    value = row.efficiency
    return Text(f"{value:.2f}", style="green" if value >= 0.9 else "yellow" if value >= 0.5 else "red")


def _lock(row: LockRow) -> Text:
    return Text(row.lock, style="bold")


_HOW: list[tuple[str, Callable[[LockRow], Text | str]]] = [
    ("ops/s", lambda row: _count(round(row.throughput_ops_per_s))),
    ("effi-\nciency", _efficiency),
    ("spin-\nning", lambda row: f"{row.spin_share:.0%}"),
    ("wait\np50", lambda row: format_ns(row.wait_p50_ns)),
    ("wait\np99", lambda row: format_ns(row.wait_p99_ns)),
    ("wait\nmax", lambda row: format_ns(row.wait_max_ns)),
    ("fair-\nness", lambda row: f"{row.fairness:.2f}"),
]
_WHY: list[tuple[str, Callable[[LockRow], Text | str]]] = [
    ("holder\npreempted", lambda row: _count(row.lhp)),
    ("waiter\npreempted", lambda row: _count(row.lwp)),
    ("PLE\nexits", lambda row: _count(row.ple_exits)),
    ("yields\ntried", lambda row: _count(row.yields_tried)),
    ("yields\nwon", lambda row: _count(row.yields_won)),
    ("kicks", lambda row: _count(row.kicks)),
    ("halts", lambda row: _count(row.halts)),
]


def _table(rows: Sequence[LockRow], columns: list[tuple[str, Callable[[LockRow], Text | str]]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("lock", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    group: tuple[int, int] | None = None
    for row in rows:
        if group != (row.vcpus, row.pcpus):
            if group is not None:
                table.add_section()
            group = (row.vcpus, row.pcpus)
            table.add_row(Text(f"{row.vcpus} on {row.pcpus} CPUs", style="dim"), *[""] * len(columns))
        table.add_row(_lock(row), *(cell(row) for _, cell in columns))
    return table
