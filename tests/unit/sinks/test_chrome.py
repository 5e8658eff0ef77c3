"""The trace_event file, read back as JSON."""

import json

import pytest

from aiovm.sinks.chrome import ChromeJsonSink
from aiovm.trace import Kind, Tracer


@pytest.fixture
def events(tmp_path):
    path = tmp_path / "t.json"
    tracer = Tracer()
    tracer.add(ChromeJsonSink(path))
    tracer.emit(1_000, Kind.SCHED_IN, 0, 2, 0)
    tracer.emit(1_234_567, Kind.KICK, 0, 1, 0)
    tracer.emit(1_300_000, Kind.INJECT, 1, 0x30, 0)
    tracer.emit(2_000_001, Kind.SCHED_OUT, 0, 2, 1)
    tracer.close()
    return json.loads(path.read_text())["traceEvents"]


def test_groups_are_processes_and_tracks_are_threads(events):
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    groups = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert sorted((groups[pid], name) for (pid, _), name in names.items()) == [
        ("physical CPUs", "CPU 2"),
        ("vCPUs", "vCPU 0"),
        ("vCPUs", "vCPU 1"),
    ]


def test_spans_are_complete_events_in_microseconds(events):
    running = next(e for e in events if e["ph"] == "X" and e["name"] == "running")
    assert (running["ts"], running["dur"]) == (1, 1999.001)
    assert running["args"] == {"pcpu": 2}
    assert running["cname"] == "thread_state_running"


def test_an_arrow_has_two_ends_with_one_id(events):
    start = next(e for e in events if e["ph"] == "s")
    end = next(e for e in events if e["ph"] == "f")
    assert (start["id"], start["cat"], start["name"]) == (end["id"], end["cat"], end["name"])
    assert start["ts"] == end["ts"] == 1234.567
    assert end["bp"] == "e"
    assert start["tid"] != end["tid"]


def test_instants_belong_to_their_thread(events):
    interrupt = next(e for e in events if e["name"] == "interrupt")
    assert (interrupt["ph"], interrupt["s"], interrupt["ts"]) == ("i", "t", 1300)
    assert interrupt["args"] == {"vector": "0x30", "error_code": 0}


def test_an_empty_trace_is_valid(tmp_path):
    path = tmp_path / "t.json"
    ChromeJsonSink(path).close()
    assert json.loads(path.read_text())["traceEvents"] == []
