"""The table of a lock comparison, for people: grouped by vCPUs and physical CPUs, in the order the rows came.

On a terminal it has colours, and where the terminal is narrow it comes as two tables: how the locks did, and why. Into
a file or a pipe it is plain, one table, and as wide as it needs to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aiovm.units import format_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from aiovm.locks.result import LockRow

__all__ = ["Columns", "count", "print_columns", "print_table"]

_PLAIN_WIDTH = 160

Row = TypeVar("Row")


class Columns(NamedTuple, Generic[Row]):
    """How rows become a table: the name in front, the group's heading, how it went, and why; headings and cells."""

    name: Callable[[Row], str]
    group: Callable[[Row], str]
    how: Sequence[tuple[str, Callable[[Row], Text | str]]]
    why: Sequence[tuple[str, Callable[[Row], Text | str]]]


def print_columns(rows: Sequence[Row], columns: Columns[Row], out: IO[str] | None = None) -> None:
    """Print ``rows`` to ``out``, by default the standard output."""
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, width=_PLAIN_WIDTH, color_system=None)
    whole = _table(rows, columns, [*columns.how, *columns.why])
    if console.measure(whole, options=console.options.update(width=_PLAIN_WIDTH)).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(rows, columns, columns.how))
        console.print(_table(rows, columns, columns.why))


def count(n: int) -> str:
    """A count in at most six characters."""
    for limit, unit in ((10_000_000, "M"), (10_000, "k")):
        if n >= limit:
            return f"{n * 100 // limit / 10:.1f}{unit}" if n < limit * 10 else f"{n * 10 // limit}{unit}"
    return str(n)


def _efficiency(row: LockRow) -> Text:
    value = row.efficiency
    return Text(f"{value:.2f}", style="green" if value >= 0.9 else "yellow" if value >= 0.5 else "red")


_HOW: list[tuple[str, Callable[[LockRow], Text | str]]] = [
    ("ops/s", lambda row: count(round(row.throughput_ops_per_s))),
    ("effi-\nciency", _efficiency),
    ("spin-\nning", lambda row: f"{row.spin_share:.0%}"),
    ("wait\np50", lambda row: format_ns(row.wait_p50_ns)),
    ("wait\np99", lambda row: format_ns(row.wait_p99_ns)),
    ("wait\nmax", lambda row: format_ns(row.wait_max_ns)),
    ("fair-\nness", lambda row: f"{row.fairness:.2f}"),
]
_WHY: list[tuple[str, Callable[[LockRow], Text | str]]] = [
    ("holder\npreempted", lambda row: count(row.lhp)),
    ("waiter\npreempted", lambda row: count(row.lwp)),
    ("PLE\nexits", lambda row: count(row.ple_exits)),
    ("yields\ntried", lambda row: count(row.yields_tried)),
    ("yields\nwon", lambda row: count(row.yields_won)),
    ("kicks", lambda row: count(row.kicks)),
    ("halts", lambda row: count(row.halts)),
]


_COLUMNS = Columns(name=lambda row: row.lock, group=lambda row: f"{row.vcpus} on {row.pcpus} CPUs", how=_HOW, why=_WHY)


def print_table(rows: Sequence[LockRow], out: IO[str] | None = None) -> None:
    """Print the rows of ``aiovm locks``."""
    print_columns(rows, _COLUMNS, out)


def _table(
    rows: Sequence[Row], columns: Columns[Row], cells: Sequence[tuple[str, Callable[[Row], Text | str]]]
) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("lock", no_wrap=True)
    for heading, _ in cells:
        table.add_column(heading, justify="right", no_wrap=True)
    group: str | None = None
    for row in rows:
        if group != columns.group(row):
            if group is not None:
                table.add_section()
            group = columns.group(row)
            table.add_row(Text(group, style="dim"), *[""] * len(cells))
        table.add_row(Text(columns.name(row), style="bold"), *(cell(row) for _, cell in cells))
    return table
