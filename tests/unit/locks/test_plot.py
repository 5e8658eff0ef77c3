"""The picture is written, the same each time, or refused with a reason."""

import sys

import pytest

from aiovm.errors import ConfigError
from aiovm.locks.plot import _spread, check, plot
from aiovm.locks.result import LockRow


def row(lock, pcpus, efficiency, p50):
    return LockRow(
        lock=lock,
        vcpus=8,
        pcpus=pcpus,
        throughput_ops_per_s=1.0,
        efficiency=efficiency,
        spin_share=0.5,
        wait_p50_ns=p50,
        wait_p99_ns=p50 * 10,
        wait_max_ns=p50 * 20,
        fairness=1.0,
        lhp=0,
        lwp=0,
        ple_exits=0,
        yields_tried=0,
        yields_won=0,
        kicks=0,
        halts=0,
    )


ROWS = [
    row("ticket", 8, 1.0, 40),
    row("pvticket", 8, 0.99, 0),
    row("ticket", 2, 0.03, 5_000_000),
    row("pvticket", 2, 0.8, 60),
]


def test_svg_names_locks_ratios_and_workload(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.svg"
    plot(ROWS, path, title="2 us held, seed 5")
    text = path.read_text()
    for words in ("<!-- ticket -->", "<!-- pvticket -->", "<!-- 1:1 -->", "<!-- 4:1 -->", "2 us held, seed 5"):
        assert words in text


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_same_rows_give_the_same_bytes(tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    for name in "ab":
        plot(ROWS, tmp_path / f"{name}{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data.startswith(magic)
    assert data == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("rows", [[], ROWS[2:], ROWS[:1]])
def test_few_rows_are_a_picture_too(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match=r"\.pdf, \.png, \.svg"):
        check("picture.gif")


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"aiovm\[plot\]"):
        check("picture.png")


def test_a_place_that_cannot_be_written_is_a_clear_message(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="No such file or directory"):
        plot(ROWS, tmp_path / "missing" / "p.png")


@pytest.mark.parametrize(
    ("wishes", "places"),
    [
        ([10, 50], [10, 50]),
        ([50, 50], [45, 55]),
        ([55, 50], [57.5, 47.5]),
        ([50, 50, 61], [43 + 2 / 3, 53 + 2 / 3, 63 + 2 / 3]),
        ([1, 2, 40], [0, 10, 40]),
        ([0, 0, 11], [0, 10, 20]),
        ([], []),
    ],
)
def test_labels_keep_apart_near_their_lines(wishes, places):
    assert _spread(wishes, 10) == pytest.approx(places)
