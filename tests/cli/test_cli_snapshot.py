"""``aiovm run --save`` and ``--restore``: the same end by another way, and one clear line for what cannot be."""

import json
import subprocess
import sys

import pytest

from aiovm import guests

TICKS = str(guests.path("ticks"))
LOCKS = str(guests.path("locks"))


@pytest.fixture
def aiovm(tmp_path):
    """Run the command in a fresh directory; its status, output and errors."""

    def run(*arguments):
        command = [sys.executable, "-m", "aiovm", "run", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
        return found.returncode, found.stdout, found.stderr

    run.directory = tmp_path
    return run


def test_a_restored_run_ends_as_the_saved_one(aiovm):
    options = ("--vcpus", "4", "--pcpus", "2", "--policy", "round-robin", "--slice", "1ms", "--seed", "5")
    append = ("--append", "lock=ticket cpus=4 duration=5000000")
    whole = aiovm(LOCKS, *options, *append, "--save", "half.snap", "--save-at", "3ms", "--json", "a.json")
    rest = aiovm("--restore", "half.snap", "--json", "b.json")
    assert (whole[0], rest[0], rest[2]) == (1, 1, "")
    assert whole[1].endswith(rest[1])
    a, b = (json.loads((aiovm.directory / name).read_text()) for name in ("a.json", "b.json"))
    del a["trace_hash"], b["trace_hash"]
    assert a == b


def test_a_restored_run_is_saved_again_and_watched(aiovm):
    whole = aiovm(TICKS, "--save", "a.snap", "--save-at", "2500us")
    assert aiovm("--restore", "a.snap", "--save", "b.snap", "--save-at", "4500us", "--trace", "t.jsonl")[0] == 1
    last = aiovm("--restore", "b.snap")
    assert last[1].count("tick") == 10  # the guest prints at its end
    assert last[1] == whole[1]
    first = json.loads((aiovm.directory / "t.jsonl").read_text().splitlines()[0])
    assert first["now"] >= 2_500_000


def test_on_the_wall_clock(aiovm):
    assert aiovm(TICKS, "--clock", "wall", "--save", "a.snap", "--save-at", "1ms")[0] == 1
    for clock, options in (("wall", ()), ("virtual", ("--clock", "virtual"))):
        assert aiovm("--restore", "a.snap", *options, "--timeout", "30s", "--json", "b.json")[0] == 1
        assert json.loads((aiovm.directory / "b.json").read_text())["clock"] == clock


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "which guest? give an image, or a snapshot with --restore"),
        ((TICKS, "--restore", "a.snap"), "give one of them"),
        (("--restore", "a.snap", "--memory", "1G"), "--memory is part of the machine in a.snap"),
        (("--restore", "none.snap"), "cannot read the snapshot none.snap: No such file or directory"),
        (("--restore", TICKS), "not a snapshot of aiovm's"),
        ((TICKS, "--save", "a.snap"), "give both"),
        ((TICKS, "--save-at", "1ms"), "give both"),
        ((TICKS, "--save", "no/a.snap", "--save-at", "1ms"), "cannot write no/a.snap"),
        ((TICKS, "--save", "a.snap", "--save-at", "soon"), "soon"),
        ((TICKS, "--save", "a.snap", "--save-at", "1s"), "nothing was saved: the guest ended at"),
    ],
)
def test_one_line_says_what_is_wrong(aiovm, arguments, words):
    status, _, errors = aiovm(*arguments)
    assert status == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_a_time_that_has_passed(aiovm):
    aiovm(TICKS, "--save", "a.snap", "--save-at", "2ms")
    status, _, errors = aiovm("--restore", "a.snap", "--save", "b.snap", "--save-at", "1ms")
    assert (status, errors.count("\n")) == (2, 1)
    assert "has passed" in errors


def test_the_help_teaches(aiovm):
    _, words, _ = aiovm("--help")
    assert "aiovm run --restore half.snap" in " ".join(words.split())
