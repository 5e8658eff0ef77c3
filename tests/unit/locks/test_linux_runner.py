"""The comparison of Linux's spinlocks without Linux: rows, refusals, the port that ``contend.c`` speaks to."""

import json
from io import StringIO
from pathlib import Path

import pytest

from aiovm.errors import ConfigError
from aiovm.locks.linux_runner import LinuxExperiment, LinuxMeasurement, LoadWindow, linux_report
from aiovm.locks.linux_table import print_table

KERNEL = Path("vmlinuz")
FIELDS = [
    "lock",
    "load",
    "vcpus",
    "pcpus",
    "ple",
    "clock",
    "elapsed_ns",
    "calls",
    "calls_per_s",
    "relative",
    "kicks",
    "halts",
    "ple_exits",
    "yields_tried",
    "yields_won",
    "steal_share",
]


def experiment(lock="pvqspinlock", vcpus=8, pcpus=2, ple=False, **options):
    return LinuxExperiment(KERNEL, lock, vcpus, pcpus, ple, **options)


def measurement(lock, calls, *, loads=("directory",), elapsed=200_000_000, steal=0, **options):
    counters = {"kicks": 3, "halts": 5, "ple_exits": 7, "yields_tried": 11, "yields_won": 10}
    windows = tuple(LoadWindow(load, elapsed, calls, steal, counters) for load in loads)
    return LinuxMeasurement(experiment(lock, loads=loads, **options), windows, "ab" * 16)


def test_rows_compare_with_qspinlock_in_the_same_circumstances():
    report = linux_report(
        [
            measurement("pvqspinlock", 9000, loads=("directory", "futex"), steal=400_000_000),
            measurement("qspinlock", 300, loads=("directory", "futex")),
            measurement("tas", 600, ple=True),
        ]
    )
    assert [(r.load, r.ple, r.lock, r.relative) for r in report.rows] == [
        ("directory", False, "pvqspinlock", 30.0),
        ("directory", False, "qspinlock", 1.0),
        ("futex", False, "pvqspinlock", 30.0),
        ("futex", False, "qspinlock", 1.0),
        ("directory", True, "tas", None),
    ]
    first = report.rows[0]
    assert (first.calls, first.calls_per_s, first.elapsed_ns) == (9000, 45_000.0, 200_000_000)
    assert first.steal_share == 0.25  # 400 ms of 8 times 200 ms
    assert (first.kicks, first.halts, first.ple_exits, first.yields_tried, first.yields_won) == (3, 5, 7, 11, 10)


def test_the_file_has_the_fields_in_order_and_a_hash_in_virtual_time_alone():
    virtual = json.loads(linux_report([measurement("qspinlock", 1)]).to_json())
    assert [list(row) for row in virtual["rows"]] == [FIELDS]
    assert len(virtual["trace_hash"]) == 32
    wall = json.loads(linux_report([measurement("qspinlock", 1, wall=True)]).to_json())
    assert (wall["trace_hash"], wall["rows"][0]["clock"]) == (None, "wall")


def test_a_guest_that_did_nothing_is_no_reference():
    report = linux_report([measurement("pvqspinlock", 5), measurement("qspinlock", 0)])
    assert [r.relative for r in report.rows] == [None, None]


def test_the_table_names_each_circumstance_once():
    out = StringIO()
    report = linux_report([measurement("pvqspinlock", 900_000), measurement("qspinlock", 30)])
    print_table(report.rows, out)
    text = out.getvalue()
    assert text.count("directory: 8 on 2 CPUs, PLE off") == 1
    assert "30,000" in text  # 4.5 million calls a second against 150
    for heading in ("calls/s", "steal", "kicks", "halts"):
        assert heading in text


def test_the_command_line_says_what_to_do_and_which_lock():
    plain = experiment(loads=("files", "pipe"), entries=50, warmup_ns=1_000_000, duration_ns=20_000_000).cmdline
    assert plain.endswith("contend=files,pipe workers=8 entries=50 warmup=1 duration=20")
    assert "nopvspin" not in plain
    assert " nopvspin " in experiment("qspinlock").cmdline
    assert "nopvspin" not in experiment("tas").cmdline


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lock": "ticket"}, "no lock called 'ticket'; there are pvqspinlock, qspinlock, tas"),
        ({"loads": ("directory", "fork")}, "no load is called 'fork'"),
        ({"vcpus": 1, "pcpus": 1}, "1 vCPUs: with fewer than 2 nobody contends"),
        ({"vcpus": 256}, "256 vCPUs"),
        ({"pcpus": 9}, "9 physical CPUs for 8 vCPUs"),
        ({"entries": 2}, "bad number of directory entries 2: 3 to 9999"),
        ({"duration_ns": 1_500_000}, "bad duration 1500000 ns: whole milliseconds"),
        ({"warmup_ns": 0}, "bad duration 0 ns"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        experiment(**options)
