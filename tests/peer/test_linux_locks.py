"""``aiovm linux-locks`` on Debian's kernel; needs what ``make guests`` leaves in out/guests."""

import json
import os
import sys
from pathlib import Path

import pytest

from aiovm.cli import main

GUESTS = Path(os.environ.get("AIOVM_GUESTS") or Path(__file__).parents[2] / "out" / "guests")


@pytest.fixture
def aiovm(monkeypatch, capfd):
    """The command, in this process: status, what it printed, and its lines on standard error."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["aiovm", "linux-locks", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return left.value.code, out, err.splitlines()

    return call


@pytest.mark.peer
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not (GUESTS / "vmlinuz").exists() and not os.environ.get("CI"),
    reason=f"{GUESTS} has no guests: run make guests",
)
def test_pv_spinlocks_halt_and_kick_where_others_spin(aiovm, tmp_path):
    rows, trace = tmp_path / "rows.json", tmp_path / "t.jsonl"
    status, out, lines = aiovm(
        *("--kernel", str(GUESTS / "vmlinuz"), "--vcpus", "2", "--pcpus", "1", "--no-ple", "--jobs", "1"),
        *("--warmup", "20ms", "--duration", "60ms", "--json", str(rows), "--trace", str(trace)),
    )
    assert (status, lines) == (0, [])
    assert "directory: 2 on 1 CPUs, PLE off" in out
    paravirtual, native = json.loads(rows.read_bytes())["rows"]
    assert (paravirtual["lock"], native["lock"]) == ("pvqspinlock", "qspinlock")
    for row in (paravirtual, native):
        assert 60_000_000 <= row["elapsed_ns"] < 120_000_000
        assert 0.4 < row["steal_share"] < 0.6  # two that never rest, on one CPU
        assert row["ple_exits"] == 0
    # A waiter for a spinning queue gets the lock when its owner's turn comes: once a slice of 6 ms or so.
    assert native["calls"] < 100
    assert (native["kicks"], native["halts"]) == (0, 0)
    assert paravirtual["calls"] > 1000
    assert paravirtual["halts"] >= paravirtual["kicks"] > 0

    def seen(mark):
        records = map(json.loads, (tmp_path / f"t.{mark}-2on1-nople.jsonl").read_text().splitlines())
        return [r for r in records if r["kind"] in ("hypercall", "sched_in")]

    kicks = [r for r in seen("pvqspinlock") if r["kind"] == "hypercall" and r["number"] == 5]  # KVM_HC_KICK_CPU
    assert len(kicks) >= paravirtual["kicks"]
    assert not [r for r in seen("qspinlock") if r["kind"] == "hypercall"]
    assert any(r["kind"] == "sched_in" and r["run_delay_ns"] > 1_000_000 for r in seen("qspinlock"))


def test_what_it_cannot_begin_with(aiovm, tmp_path, monkeypatch):
    monkeypatch.delenv("AIOVM_GUESTS", raising=False)
    monkeypatch.chdir(tmp_path)
    none = "aiovm: no Linux kernel at out/guests/vmlinuz: make guests fetches one, or name yours with --kernel"
    assert aiovm() == (2, "", [none])
    assert aiovm("--kernel", "none") == (2, "", ["aiovm: no Linux kernel at none"])
    (tmp_path / "kernel").write_bytes(b"x")
    for option, value, says in (
        ("--seed", str(1 << 63), "bad seed"),
        ("--jobs", "-1", "bad number of processes -1"),
        ("--policy", "fare", "no policy is called 'fare'"),
        ("--pcpus", "2,many", "bad number of physical CPUs 'many'"),
        ("--json", "/", "cannot write /: Is a directory"),
        ("--trace", "t.txt", "ends in .pftrace, .json or .jsonl"),
        ("--clock", "sun", "'sun'"),
    ):
        status, out, lines = aiovm("--kernel", "kernel", option, value)
        assert (status, out, len(lines)) == (2, "", 1)
        assert says in lines[0]
