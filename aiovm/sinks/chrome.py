"""Chrome's trace_event JSON: a trace as a file that Perfetto and chrome://tracing draw, without any library.

Source: the document "Trace Event Format" (Google, 2016): ``X`` complete events, ``i`` instants, ``s`` and ``f`` flow
ends, ``M`` metadata; times in µs, with fractions. Groups of tracks are processes, tracks are threads.

Rules: events are written as they come; viewers sort them. A flow's ends bind to the spans that enclose them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from aiovm.sinks.timeline import TimelineSink

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ChromeCanvas", "ChromeJsonSink"]

#: Names of the viewer's own colours (chrome://tracing); Perfetto chooses by the span's name.
_COLOURS = {
    "running": "thread_state_running",
    "ready": "thread_state_runnable",
    "halted": "thread_state_sleeping",
    "blocked": "thread_state_sleeping",
    "polling": "thread_state_iowait",
    "spinning": "terrible",
}


class ChromeCanvas:
    """Draws into the JSON file ``path``."""

    def __init__(self, path: str | Path) -> None:
        self._out = Path(path).open("w", encoding="ascii")  # noqa: SIM115
        self._dumps = json.JSONEncoder(separators=(",", ":")).encode
        self._separator = '{"displayTimeUnit":"ns","traceEvents":[\n'
        self._groups: dict[str, int] = {}
        self._tracks: list[tuple[int, int]] = []
        self._flows = 0

    def track(self, group: str, name: str, rank: int) -> int:
        pid = self._groups.get(group)
        if pid is None:
            pid = self._groups[group] = len(self._groups) + 1
            self._meta("process_name", pid, 0, {"name": group})
            self._meta("process_sort_index", pid, 0, {"sort_index": pid})
        tid = len(self._tracks) + 1
        self._tracks.append((pid, tid))
        self._meta("thread_name", pid, tid, {"name": name})
        self._meta("thread_sort_index", pid, tid, {"sort_index": rank})
        return tid - 1

    def span(self, track: int, name: str, start: int, end: int, args: Mapping[str, int | str]) -> None:
        event = self._event("X", track, name, start)
        event["dur"] = (end - start) / 1000
        if name in _COLOURS:
            event["cname"] = _COLOURS[name]
        self._write(event, args)

    def instant(self, track: int, name: str, at: int, args: Mapping[str, int | str]) -> None:
        self._write(self._event("i", track, name, at) | {"s": "t"}, args)

    def arrow(self, name: str, at: int, source: int, target: int, args: Mapping[str, int | str]) -> None:
        self._flows += 1
        self.instant(source, name, at, args)
        self.instant(target, name, at, args)
        flow: dict[str, object] = {"cat": "flow", "id": self._flows}
        self._write(self._event("s", source, name, at) | flow, {})
        self._write(self._event("f", target, name, at) | flow | {"bp": "e"}, {})

    def close(self) -> None:
        if not self._tracks:
            self._out.write(self._separator)
        self._out.write("\n]}\n")
        self._out.close()

    def _event(self, phase: str, track: int, name: str, at: int) -> dict[str, object]:
        pid, tid = self._tracks[track]
        return {"ph": phase, "pid": pid, "tid": tid, "ts": at / 1000, "name": name}

    def _meta(self, name: str, pid: int, tid: int, args: Mapping[str, int | str]) -> None:
        self._write({"ph": "M", "pid": pid, "tid": tid, "name": name}, args)

    def _write(self, event: dict[str, object], args: Mapping[str, int | str]) -> None:
        if args:
            event["args"] = args
        self._out.write(self._separator + self._dumps(event))
        self._separator = ",\n"


class ChromeJsonSink(TimelineSink):
    """Writes a trace as trace_event JSON to ``path``."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(ChromeCanvas(path))
