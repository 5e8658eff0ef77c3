"""The JSON of a lock comparison is part of the command's interface."""

import json

import msgspec
import pytest

from aiovm.locks.result import LockReport, LockRow

ROW = LockRow(
    lock="ticket",
    vcpus=8,
    pcpus=2,
    throughput_ops_per_s=1234.5,
    efficiency=0.03,
    spin_share=0.94,
    wait_p50_ns=1_000,
    wait_p99_ns=25_000_000,
    wait_max_ns=31_000_000,
    fairness=0.99,
    lhp=12,
    lwp=345,
    ple_exits=6,
    yields_tried=7,
    yields_won=8,
    kicks=9,
    halts=10,
)


def test_names_and_order_in_json():
    report = json.loads(LockReport(rows=[ROW], trace_hash="ab" * 16).to_json())
    assert list(report) == ["rows", "trace_hash"]
    assert list(report["rows"][0]) == [
        "lock",
        "vcpus",
        "pcpus",
        "throughput_ops_per_s",
        "efficiency",
        "spin_share",
        "wait_p50_ns",
        "wait_p99_ns",
        "wait_max_ns",
        "fairness",
        "lhp",
        "lwp",
        "ple_exits",
        "yields_tried",
        "yields_won",
        "kicks",
        "halts",
    ]
    assert report["rows"][0]["wait_p99_ns"] == 25_000_000
    assert report["trace_hash"] == "ab" * 16


def test_json_is_lines_that_end():
    data = LockReport(rows=[ROW], trace_hash="").to_json()
    assert data.endswith(b"}\n")
    assert data.count(b"\n") > 17


def test_json_round_trip():
    report = LockReport(rows=[ROW, ROW], trace_hash="00")
    assert LockReport.from_json(report.to_json()) == report


def test_other_json_is_refused():
    with pytest.raises(msgspec.ValidationError, match="trace_hash"):
        LockReport.from_json(b'{"rows": []}')
