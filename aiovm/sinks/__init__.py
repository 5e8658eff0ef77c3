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

from aiovm.errors import ConfigError
from aiovm.sinks.chrome import ChromeJsonSink
from aiovm.trace import JsonLinesSink

if TYPE_CHECKING:
    from aiovm.trace import Sink, Tracer

__all__ = ["ChromeJsonSink", "check_suffix", "open_sink", "open_sinks"]

_SUFFIXES = (".pftrace", ".json", ".jsonl")


def check_suffix(path: str | Path) -> str:
    """The suffix of ``path``, when it is one that :func:`open_sink` knows; else :class:`ConfigError`."""
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(f"trace {str(path)!r}: a trace file ends in .pftrace, .json or .jsonl")
    return suffix


def open_sink(path: str | Path) -> Sink:
    """The sink that ``path``'s suffix asks for, with its file open; :class:`ConfigError` when that cannot be."""
    suffix = check_suffix(path)
    try:
        if suffix == ".jsonl":
            return JsonLinesSink(Path(path).open("w", encoding="utf-8"))
        return ChromeJsonSink(path) if suffix == ".json" else _open_perfetto(path)
    except OSError as error:
        raise ConfigError(f"cannot write the trace {str(path)!r}: {error.strerror}") from error


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
        import structlog

        structlog.get_logger("aiovm.trace").warning(
            "no perfetto package (aiovm[trace]): writing trace_event JSON instead", path=str(path)
        )
        return ChromeJsonSink(path)
    return PerfettoSink(path)
