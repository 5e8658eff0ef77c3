"""What happened, as typed records, for whoever watches.

A record is five integers: when (ns), what (:class:`Kind`), who (a vCPU's host-wide number, or -1), and two
arguments whose meaning :data:`FIELDS` gives for each kind. They are kept packed, 40 bytes each, and handed to
the sinks in batches, so that watching costs well under a microsecond a record.

Rules:

* Off means free: with no sink ``Tracer.on`` is false and callers build nothing (``if trace.on: trace.emit(...)``).
* A sink cannot hurt the run: one that raises is dropped, and the reason is logged once.
* Records of a virtual-time run are a pure function of its inputs and seed; :class:`HashSink` proves it. The
  order is the order in which things were decided; times of different vCPUs may interleave by a quantum.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from array import array
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FIELDS", "HashSink", "JsonLinesSink", "Kind", "ListSink", "Record", "Sink", "Tracer", "unpack"]


class Kind(enum.IntEnum):
    """What a record tells."""

    SCHED_IN = 1
    SCHED_OUT = 2
    WAKE = 3
    ENTRY = 4
    EXIT = 5
    INJECT = 6
    HALT = 7
    KICK = 8
    PLE = 9
    YIELD = 10
    LOCK = 11
    MP_STATE = 12
    HYPERCALL = 13
    MSR = 14
    PIO = 15
    MMIO = 16
    UNKNOWN_ACCESS = 17
    TIMER = 18
    HALT_POLL = 19
    STEAL = 20
    IPI = 21
    FAULT = 22
    END = 23
    MODEL = 24


#: The names of a record's two arguments, by kind.
FIELDS: dict[Kind, tuple[str, str]] = {
    Kind.SCHED_IN: ("pcpu", "run_delay_ns"),
    Kind.SCHED_OUT: ("pcpu", "reason"),
    Kind.WAKE: ("waker", "pcpu"),
    Kind.ENTRY: ("rip", "limit_ns"),
    Kind.EXIT: ("reason", "rip"),
    Kind.INJECT: ("vector", "error_code"),
    Kind.HALT: ("rip", "interrupts_enabled"),
    Kind.KICK: ("target", "mode"),
    Kind.PLE: ("rip", "window_ns"),
    Kind.YIELD: ("target", "answer"),
    Kind.LOCK: ("state", "lock"),
    Kind.MP_STATE: ("state", "vector"),
    Kind.HYPERCALL: ("number", "result"),
    Kind.MSR: ("msr", "value"),
    Kind.PIO: ("port", "value"),
    Kind.MMIO: ("gpa", "value"),
    Kind.UNKNOWN_ACCESS: ("address", "value"),
    Kind.TIMER: ("deadline_ns", "late_ns"),
    Kind.HALT_POLL: ("polled_ns", "success"),
    Kind.STEAL: ("steal_ns", "preempted"),
    Kind.IPI: ("icr", "destination"),
    Kind.FAULT: ("vector", "rip"),
    Kind.END: ("status", "rip"),
    Kind.MODEL: ("operation", "argument"),
}

_BATCH = 4096 * 5
_STRUCT = struct.Struct("=5q")
_SIGN = 1 << 63
_WORD = 1 << 64


class Record(NamedTuple):
    """One record. ``a`` and ``b`` are named by :data:`FIELDS`; addresses are unsigned again."""

    now: int
    kind: Kind
    vcpu: int
    a: int
    b: int

    def named(self) -> dict[str, int | str]:
        """The record as JSON-ready names and values."""
        first, second = FIELDS[self.kind]
        return {
            "now": self.now,
            "kind": self.kind.name.lower(),
            "vcpu": self.vcpu,
            first: self.a,
            second: self.b,
        }


_ADDRESSES = frozenset({"rip", "gpa", "address", "value", "msr", "icr"})


def unpack(batch: bytes) -> Iterator[Record]:
    """The records of a packed batch."""
    for now, kind, vcpu, a, b in _STRUCT.iter_unpack(batch):
        k = Kind(kind)
        first, second = FIELDS[k]
        if a < 0 and first in _ADDRESSES:
            a += _WORD
        if b < 0 and second in _ADDRESSES:
            b += _WORD
        yield Record(now, k, vcpu, a, b)


class Sink(Protocol):
    """Someone who watches. ``batch`` is a whole number of packed records."""

    def write(self, batch: bytes) -> None: ...
    def close(self) -> None: ...


class Tracer:
    """Where records are given, and handed on to the sinks."""

    def __init__(self) -> None:
        self.on = False
        self._sinks: list[Sink] = []
        self._buffer = array("q")

    def add(self, sink: Sink) -> None:
        """Start handing records to ``sink``."""
        self.flush()
        self._sinks.append(sink)
        self.on = True

    def emit(self, now: int, kind: int, vcpu: int, a: int = 0, b: int = 0) -> None:
        """Record that ``kind`` happened. Call only when :attr:`on`. ``a`` and ``b``: any 64-bit values."""
        if a >= _SIGN:
            a -= _WORD
        if b >= _SIGN:
            b -= _WORD
        buffer = self._buffer
        buffer.extend((now, kind, vcpu, a, b))
        if len(buffer) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the sinks."""
        if not self._buffer:
            return
        batch = self._buffer.tobytes()
        del self._buffer[:]
        for sink in tuple(self._sinks):
            try:
                sink.write(batch)
            except Exception as error:
                self._drop(sink, error)

    def close(self) -> None:
        """Flush, close every sink and go quiet."""
        self.flush()
        for sink in tuple(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self._sinks.clear()
        self.on = False

    def _drop(self, sink: Sink, error: Exception) -> None:
        import structlog  # the program's longest import, for what hardly happens

        structlog.get_logger("aiovm.trace").warning("trace sink dropped", sink=type(sink).__name__, error=repr(error))
        if sink in self._sinks:
            self._sinks.remove(sink)
        self.on = bool(self._sinks)


class HashSink:
    """The trace's hash: equal hashes mean equal runs."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def write(self, batch: bytes) -> None:
        self._hash.update(batch)

    def close(self) -> None:
        pass

    def hexdigest(self) -> str:
        """32 hex digits over all records so far (flush the tracer first)."""
        return self._hash.hexdigest()


class ListSink:
    """Keeps the records, for tests and small tools."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, batch: bytes) -> None:
        self.records.extend(unpack(batch))

    def close(self) -> None:
        pass

    def of(self, *kinds: Kind) -> list[Record]:
        """The records of these kinds, in order."""
        return [r for r in self.records if r.kind in kinds]


class JsonLinesSink:
    """One JSON object a line; owns ``out`` and closes it."""

    def __init__(self, out: IO[str]) -> None:
        import json

        self._out = out
        self._dumps = json.dumps

    def write(self, batch: bytes) -> None:
        dumps = self._dumps
        self._out.writelines(dumps(record.named()) + "\n" for record in unpack(batch))

    def close(self) -> None:
        self._out.close()
