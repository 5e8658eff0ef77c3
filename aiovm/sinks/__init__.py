"""Trace sinks that write files for viewers: ``--trace out.pftrace,out.jsonl`` opens them by their suffix.

.pftrace   Perfetto's protobuf (the ``trace`` extra); without the package, the JSON below under the same name,
           which the same viewer opens
.json      Chrome's trace_event JSON, for Perfetto, chrome://tracing and speedscope
.jsonl     every record, one JSON object a line
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from aiovm.errors import ConfigError
from aiovm.sinks.chrome import ChromeJsonSink
from aiovm.trace import JsonLinesSink

if TYPE_CHECKING:
    from aiovm.trace import Sink, Tracer

__all__ = ["ChromeJsonSink", "open_sink", "open_sinks"]

_log = structlog.get_logger("aiovm.trace")


def open_sink(path: str | Path) -> Sink:
    """The sink that ``path``'s suffix asks for, with its file open; :class:`ConfigError` when that cannot be."""
    suffix = Path(path).suffix
    try:
        if suffix == ".jsonl":
            return JsonLinesSink(Path(path).open("w", encoding="utf-8"))
        if suffix == ".json":
            return ChromeJsonSink(path)
        if suffix == ".pftrace":
            return _open_perfetto(path)
    except OSError as error:
        raise ConfigError(f"cannot write the trace {str(path)!r}: {error.strerror}") from error
    raise ConfigError(f"trace {str(path)!r}: a trace file ends in .pftrace, .json or .jsonl")


def open_sinks(tracer: Tracer, paths: str) -> None:
    """Give ``tracer`` a sink for each of the comma-separated ``paths``; all of them or none."""
    with ExitStack() as opened:
        sinks = []
        for path in paths.split(","):
            sink = open_sink(path.strip())
            opened.callback(sink.close)
            sinks.append(sink)
        opened.pop_all()
    for sink in sinks:
        tracer.add(sink)


def _open_perfetto(path: str | Path) -> Sink:
    try:
        from aiovm.sinks.perfetto import PerfettoSink
    except ImportError:
        _log.warning("no perfetto package (aiovm[trace]): writing trace_event JSON instead", path=str(path))
        return ChromeJsonSink(path)
    return PerfettoSink(path)
