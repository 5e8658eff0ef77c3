"""``aiovm locks``: rows, files, and what it refuses."""

import json
import re
import subprocess
import sys
from functools import partial

import pytest

FIELDS = [
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
SMALL = ["--vcpus", "2", "--pcpus", "1", "--duration", "1ms", "--warmup", "1ms", "--jobs", "1"]


@pytest.fixture
def locks(aiovm):
    return partial(aiovm, "locks")


def one_line(lines):
    assert len(lines) == 1, lines
    assert lines[0].startswith("aiovm: ")
    return lines[0].removeprefix("aiovm: ")


def test_rows_and_table(locks, tmp_path):
    result = tmp_path / "rows.json"
    status, out, lines = locks(*SMALL, "--pcpus", "1,2", "--locks", "tas,pvticket", "--json", str(result))
    assert (status, lines) == (0, [])
    found = json.loads(result.read_bytes())
    assert list(found) == ["rows", "trace_hash"]
    assert re.fullmatch("[0-9a-f]{32}", found["trace_hash"])
    assert [list(row) for row in found["rows"]] == [FIELDS] * 4
    rows = [(row["lock"], row["vcpus"], row["pcpus"]) for row in found["rows"]]
    assert rows == [("tas", 2, 1), ("pvticket", 2, 1), ("tas", 2, 2), ("pvticket", 2, 2)]
    for row in found["rows"]:
        integers = [row[name] for name in FIELDS if name not in FIELDS[:1] + FIELDS[3:6] + FIELDS[9:10]]
        assert all(type(value) is int and value >= 0 for value in integers)
        assert row["throughput_ops_per_s"] > 10_000
        assert 0 <= row["spin_share"] <= 1
        assert 0.5 <= row["fairness"] <= 1
        assert row["wait_p50_ns"] <= row["wait_p99_ns"] <= row["wait_max_ns"]
    assert [row["efficiency"] for row in found["rows"][2:]] == [1.0, 1.0]
    for words in ("2 on 1 CPUs", "2 on 2 CPUs", "tas", "pvticket", "ops/s", "halts"):
        assert words in out


def test_a_lock_that_does_not_exclude_is_caught(locks):
    status, out, lines = locks(*SMALL, "--pcpus", "2", "--locks", "tas,broken", "--think", "1us")
    assert (status, lines) == (3, ["mutual exclusion was violated by: broken"])
    assert "2 on 2 CPUs" in out


def test_files_to_look_at(locks, tmp_path):
    lines, perfetto, picture = tmp_path / "t.jsonl", tmp_path / "t.pftrace", tmp_path / "locks.png"
    status, _, said = locks(
        *SMALL, "--pcpus", "2", "--locks", "ticket", "--trace", f"{lines},{perfetto}", "--plot", str(picture)
    )
    assert (status, said) == (0, [])
    kinds = {json.loads(line)["kind"] for line in lines.read_text().splitlines()}
    assert {"sched_in", "entry", "lock", "end"} <= kinds
    assert perfetto.stat().st_size > 1000
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_several_rows_are_traced_in_a_file_each(locks, tmp_path):
    status, _, _ = locks(*SMALL, "--pcpus", "1,2", "--locks", "tas", "--trace", str(tmp_path / "t.jsonl"))
    assert status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.tas-2on1.jsonl", "t.tas-2on2.jsonl"]


def test_tracing_changes_nothing(locks, tmp_path):
    plain, traced = tmp_path / "plain.json", tmp_path / "traced.json"
    locks(*SMALL, "--locks", "ticket", "--json", str(plain))
    locks(*SMALL, "--locks", "ticket", "--json", str(traced), "--trace", str(tmp_path / "t.jsonl"))
    assert plain.read_bytes() == traced.read_bytes()


def test_in_processes_as_in_one(locks, tmp_path):
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    locks(*SMALL, "--locks", "tas", "--json", str(here))
    done = subprocess.run(
        [sys.executable, "-m", "aiovm", "locks", *SMALL, "--jobs", "2", "--locks", "tas", "--json", there],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 on 1 CPUs" in done.stdout
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vcpus", "0"], "1 to 255 vCPUs, not 0"),
        (["--vcpus", "256"], "1 to 255 vCPUs, not 256"),
        (["--pcpus", "0"], "0 physical CPUs for 2 vCPUs"),
        (["--pcpus", "3"], "3 physical CPUs for 2 vCPUs"),
        (["--pcpus", "1,two"], "bad number of physical CPUs 'two'"),
        (["--locks", "tas,spin"], "no lock is called 'spin'"),
        (["--locks", ""], "no lock is called ''"),
        (["--seed", "x"], "--seed"),
        (["--seed", "-9223372036854775809"], "bad seed -9223372036854775809"),
        (["--duration", "1"], "bad duration '1'"),
        (["--duration", "0.9ms"], "bad duration 900000 ns: at least 1ms"),
        (["--warmup", "-1ms"], "bad duration '-1ms'"),
        (["--hold", "2"], "bad duration '2'"),
        (["--think", "1000s"], "the lock guest refuses: out of range: think"),
        (["--hold-dist", "normal"], "bad distribution 'normal'"),
        (["--nlocks", "65"], "bad number of locks 65"),
        (["--spin", "0"], "a lock spins at least once"),
        (["--slice", "0ns"], "slice of 0 ns"),
        (["--policy", "fare"], "no policy is called 'fare'"),
        (["--jobs", "-1"], "bad number of processes -1"),
        (["--trace", "t.txt"], "ends in .pftrace, .json or .jsonl"),
        (["--trace", "/no/such/t.jsonl"], "cannot write /no/such/t.jsonl: No such directory"),
        (["--plot", "t.bmp"], "a picture ends in .pdf, .png, .svg"),
        (["--plot", "/no/such/t.png"], "cannot write /no/such/t.png: No such directory"),
        (["--json", "/"], "cannot write /: Is a directory"),
        (["--ple=maybe"], "--ple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(locks, options, says):
    status, out, lines = locks(*SMALL, "--locks", "tas", *options)
    assert (status, out) == (2, "")
    assert says in one_line(lines)
