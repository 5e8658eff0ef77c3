"""The table of a comparison of Linux's spinlocks; laid out as that of ``aiovm locks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.locks.table import Columns, count, print_columns

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from aiovm.locks.linux_result import LinuxLockRow

__all__ = ["print_table"]


def _group(row: LinuxLockRow) -> str:
    return f"{row.load}: {row.vcpus} on {row.pcpus} CPUs, PLE {'on' if row.ple else 'off'}"


def _relative(row: LinuxLockRow) -> str:
    if row.relative is None:
        return ""
    return f"{row.relative:.2f}" if row.relative < 100 else f"{row.relative:,.0f}"


_COLUMNS: Columns[LinuxLockRow] = Columns(
    name=lambda row: row.lock,
    group=_group,
    how=[
        ("calls/s", lambda row: count(round(row.calls_per_s))),
        ("times\nqspinlock", _relative),
        ("steal", lambda row: f"{row.steal_share:.0%}"),
    ],
    why=[
        ("kicks", lambda row: count(row.kicks)),
        ("halts", lambda row: count(row.halts)),
        ("PLE\nexits", lambda row: count(row.ple_exits)),
        ("yields\ntried", lambda row: count(row.yields_tried)),
        ("yields\nwon", lambda row: count(row.yields_won)),
    ],
)


def print_table(rows: Sequence[LinuxLockRow], out: IO[str] | None = None) -> None:
    """Print ``rows`` to ``out``, by default the standard output."""
    print_columns(rows, _COLUMNS, out)
