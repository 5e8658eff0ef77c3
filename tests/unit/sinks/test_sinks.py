"""Which sink a file name asks for."""

import json
import sys

import pytest
from structlog.testing import capture_logs

from aiovm.errors import ConfigError
from aiovm.sinks import ChromeJsonSink, open_sink, open_sinks
from aiovm.trace import JsonLinesSink, Kind, Tracer


@pytest.mark.parametrize(("name", "kind"), [("t.json", ChromeJsonSink), ("t.jsonl", JsonLinesSink)])
def test_by_suffix(tmp_path, name, kind):
    sink = open_sink(tmp_path / name)
    sink.close()
    assert type(sink) is kind


def test_perfetto_by_suffix(tmp_path):
    pytest.importorskip("perfetto")
    from aiovm.sinks.perfetto import PerfettoSink

    sink = open_sink(tmp_path / "t.pftrace")
    sink.close()
    assert type(sink) is PerfettoSink


def test_without_the_package_the_same_viewer_gets_json(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiovm.sinks.perfetto", None)
    path = tmp_path / "t.pftrace"
    tracer = Tracer()
    with capture_logs() as logs:
        tracer.add(open_sink(path))
    tracer.emit(5, Kind.INJECT, 0, 0x30, 0)
    tracer.close()
    assert [e["name"] for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "i"] == ["interrupt"]
    assert [(log["log_level"], log["path"]) for log in logs] == [("warning", str(path))]


@pytest.mark.parametrize("name", ["t", "t.txt", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"ends in \.pftrace, \.json or \.jsonl"):
        open_sink(name)


def test_a_file_that_cannot_be_written_is_a_clear_message(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        open_sink(tmp_path / "missing" / "t.jsonl")


def test_several(tmp_path):
    tracer = Tracer()
    open_sinks(tracer, f"{tmp_path}/a.json, {tmp_path}/b.jsonl")
    tracer.emit(7, Kind.KICK, -1, 2, 1)
    tracer.close()
    assert json.loads((tmp_path / "b.jsonl").read_text()) == {
        "now": 7,
        "kind": "kick",
        "vcpu": -1,
        "target": 2,
        "mode": 1,
    }
    assert len(json.loads((tmp_path / "a.json").read_text())["traceEvents"]) == 5


def test_all_or_none(tmp_path):
    tracer = Tracer()
    with pytest.raises(ConfigError, match="bad"):
        open_sinks(tracer, f"{tmp_path}/a.json,b.bad")
    assert not tracer.on
    # Closed again, hence complete.
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"] == []
