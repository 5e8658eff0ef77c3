"""The table's cells, groups and widths."""

import io

import pytest

from aiovm.locks.result import LockRow
from aiovm.locks.table import print_table


def row(lock="ticket", vcpus=8, pcpus=2, **changes):
    values = {
        "throughput_ops_per_s": 2_220.4,
        "efficiency": 0.031,
        "spin_share": 0.944,
        "wait_p50_ns": 4_880_000,
        "wait_p99_ns": 25_000_000,
        "wait_max_ns": 1_100_000_000,
        "fairness": 0.994,
        "lhp": 12,
        "lwp": 1_368,
        "ple_exits": 98_765,
        "yields_tried": 1_234_567,
        "yields_won": 12_345_678,
        "kicks": 9_999,
        "halts": 10_000,
    }
    return LockRow(lock=lock, vcpus=vcpus, pcpus=pcpus, **(values | changes))


def printed(*rows):
    out = io.StringIO()
    print_table(rows, out)
    return out.getvalue()


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_screen(monkeypatch):
    """The table as a terminal of so many columns gets it."""

    def show(columns, *rows):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        screen = Screen()
        print_table(rows, screen)
        return screen.getvalue()

    return show


def test_cells_in_units_for_people():
    line = next(line for line in printed(row()).splitlines() if "ticket" in line)
    cells = "ticket 2220 0.03 94% 4.88 ms 25.0 ms 1.10 s 0.99 12 1368 98.7k 1234k 12.3M 9999 10.0k"
    assert " ".join(line.split()) == cells


def test_a_heading_for_each_overcommit_in_the_order_given():
    text = printed(row(pcpus=8), row(lock="mcs", pcpus=8), row(), row(lock="mcs"))
    first = [line.split()[0] if line.split() else "" for line in text.splitlines()]
    names = [line.strip() for line in text.splitlines() if "CPUs" in line]
    assert names == ["8 on 8 CPUs", "8 on 2 CPUs"]
    assert [name for name in first if name in ("8", "ticket", "mcs")] == ["8", "ticket", "mcs", "8", "ticket", "mcs"]


def test_plain_and_in_one_piece_when_not_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = printed(row())
    assert "\x1b" not in text
    assert text.count("ticket") == 1
    assert "…" not in text


def test_a_wide_terminal_gets_one_coloured_table(on_screen):
    text = on_screen(160, row(), row(lock="tas", efficiency=0.55), row(lock="mcs", efficiency=0.95))
    assert text.count("ticket") == 1
    for colour, value in (("31", "0.03"), ("33", "0.55"), ("32", "0.95")):
        assert any(f"\x1b[{colour}m" in line and value in line for line in text.splitlines())


def test_a_narrow_terminal_gets_two_tables_that_fit(on_screen):
    text = on_screen(80, row())
    assert text.count("ticket") == 2
    assert "…" not in text


def test_no_rows_are_an_empty_table():
    assert "lock" in printed()
