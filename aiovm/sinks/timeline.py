"""From records to a picture: tracks, spans, instants and arrows, for whichever file format draws them.

What is drawn, in time order on each track:

* a track for each physical CPU: which vCPU was on it;
* a track for each vCPU: its state (below) as spans that do not overlap, its events as instants, kicks, wakes and
  directed yields as arrows from who did it to whom it was done;
* a track for each vCPU whose guest shows its lock word: waiting for a lock, holding it. These go on while the vCPU is
  off its CPU; that is what to look for.

    running    on a physical CPU               spinning   that part of it which a PAUSE-loop exit proved wasted
    ready      wants one: steal time           polling    halted, and awake in case it is short
    halted     after HLT                       blocked    anything else that waits, such as for SIPI

Rules: a span is given when its end is known, so spans of different tracks come out of order, those of one track in
order. A record that says something happened before the track's last change is drawn at that change. Register and port
accesses are not drawn; the JSON lines have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiovm.trace import FIELDS, Kind, Record, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Canvas", "Timeline", "TimelineSink"]

#: KVM_MP_STATE_HALTED.
_HALTED = 3
#: Events drawn as instants, and their names.
_INSTANTS = {
    Kind.INJECT: "interrupt",
    Kind.IPI: "IPI",
    Kind.TIMER: "timer",
    Kind.FAULT: "exception",
    Kind.HYPERCALL: "hypercall",
    Kind.HALT: "HLT",
    Kind.UNKNOWN_ACCESS: "unknown access",
    Kind.END: "end",
}
_HEX = frozenset({"address", "destination", "icr", "rip", "vector"})
_LOCK = {1: "waiting for lock", 2: "holding lock"}


class Canvas(Protocol):
    """A file that can be drawn into. Times are ns, not negative; a span is never empty."""

    def track(self, group: str, name: str, rank: int) -> int:
        """A new track below ``group``, sorted by ``rank`` there; its number."""

    def span(self, track: int, name: str, start: int, end: int, args: Mapping[str, int | str]) -> None: ...
    def instant(self, track: int, name: str, at: int, args: Mapping[str, int | str]) -> None: ...
    def arrow(self, name: str, at: int, source: int, target: int, args: Mapping[str, int | str]) -> None:
        """From track ``source`` to track ``target``."""

    def close(self) -> None: ...


_NOTHING: Mapping[str, int | str] = {}


class _Lane:
    """A track, and the span that is open on it; one without a name is not drawn."""

    def __init__(self, canvas: Canvas, track: int) -> None:
        self._canvas = canvas
        self.track = track
        self._name = ""
        self._since = 0
        self._args = _NOTHING

    def change(self, at: int, name: str = "", args: Mapping[str, int | str] = _NOTHING) -> None:
        """What was going on ends at ``at``; ``name`` begins."""
        at = max(at, self._since)
        if self._name and at > self._since:
            self._canvas.span(self.track, self._name, self._since, at, self._args)
        self._name, self._since, self._args = name, at, args

    def carve(self, name: str, start: int, end: int, args: Mapping[str, int | str]) -> None:
        """The part from ``start`` to ``end`` of what is going on was really ``name``."""
        going_on, its_args = self._name, self._args
        self.change(start, name, args)
        self.change(end, going_on, its_args)


class Timeline:
    """Draws records, given in a trace's order, on a canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._pcpus: dict[int, _Lane] = {}
        self._vcpus: dict[int, _Lane] = {}
        self._locks: dict[int, _Lane] = {}
        self._lock_words: dict[int, tuple[int, int]] = {}
        self._halted: dict[int, bool] = {}
        self._last = 0

    def finish(self) -> None:
        """The run is over: draw what is still open."""
        for lanes in (self._pcpus, self._vcpus, self._locks):
            for lane in lanes.values():
                lane.change(self._last)

    def feed(self, record: Record) -> None:
        """Draw one record."""
        now, kind, vcpu, a, b = record
        self._last = max(self._last, now)
        match kind:
            case Kind.SCHED_IN:
                self._pcpu(a).change(now, f"vCPU {vcpu}", {"run_delay_ns": b})
                self._vcpu(vcpu).change(now, "running", {"pcpu": a})
            case Kind.SCHED_OUT:
                self._pcpu(a).change(now)
                resting = "halted" if self._halted.get(vcpu) else "blocked"
                self._vcpu(vcpu).change(now, "ready" if b else resting)
            case Kind.WAKE:
                self._vcpu(vcpu).change(now, "ready")
                if a >= 0:
                    self._arrow("wake", now, a, vcpu)
            case Kind.MP_STATE:
                self._halted[vcpu] = a == _HALTED
            case Kind.PLE:
                self._vcpu(vcpu).carve("spinning", now - b, now, {"rip": f"{a:#x}", "window_ns": b})
            case Kind.HALT_POLL:
                self._vcpu(vcpu).carve("polling", now - a, now, {"success": b})
            case Kind.KICK:
                if vcpu in (-1, a):
                    self._canvas.instant(self._vcpu(a).track, "kick", now, _NOTHING)
                else:
                    self._arrow("kick", now, vcpu, a)
            case Kind.YIELD:
                if b > 0:
                    self._arrow("yield", now, vcpu, a)
                else:
                    self._canvas.instant(self._vcpu(vcpu).track, "yield refused", now, {"target": a, "answer": b})
            case Kind.LOCK:
                if self._lock_words.get(vcpu) != (a, b):
                    self._lock_words[vcpu] = (a, b)
                    self._lock(vcpu).change(now, f"{_LOCK[a]} {b}" if a in _LOCK else "")
            case _:
                name = _INSTANTS.get(kind)
                if name is not None and vcpu >= 0:
                    self._canvas.instant(self._vcpu(vcpu).track, name, now, _details(record))

    def _arrow(self, name: str, at: int, source: int, target: int) -> None:
        args = {"source": f"vCPU {source}", "target": f"vCPU {target}"}
        self._canvas.arrow(name, at, self._vcpu(source).track, self._vcpu(target).track, args)

    def _pcpu(self, index: int) -> _Lane:
        return self._lane(self._pcpus, index, "physical CPUs", f"CPU {index}", index)

    def _vcpu(self, number: int) -> _Lane:
        return self._lane(self._vcpus, number, "vCPUs", f"vCPU {number}", 2 * number)

    def _lock(self, number: int) -> _Lane:
        return self._lane(self._locks, number, "vCPUs", f"vCPU {number} lock", 2 * number + 1)

    def _lane(self, lanes: dict[int, _Lane], index: int, group: str, name: str, rank: int) -> _Lane:
        lane = lanes.get(index)
        if lane is None:
            lane = lanes[index] = _Lane(self._canvas, self._canvas.track(group, name, rank))
        return lane


def _details(record: Record) -> dict[str, int | str]:
    """The record's two arguments, addresses and vectors in hex."""
    first, second = FIELDS[record.kind]
    pairs = ((first, record.a), (second, record.b))
    return {name: f"{value:#x}" if name in _HEX else value for name, value in pairs}


class TimelineSink:
    """A sink that draws on ``canvas``, and closes it."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._timeline = Timeline(canvas)

    def write(self, batch: bytes) -> None:
        feed = self._timeline.feed
        for record in unpack(batch):
            feed(record)

    def close(self) -> None:
        self._timeline.finish()
        self._canvas.close()
