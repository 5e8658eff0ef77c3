"""Perfetto's own format: a trace as a ``.pftrace`` file for https://ui.perfetto.dev, by the ``perfetto`` package.

Source: ``protos/perfetto/trace`` of Perfetto 0.59: TrackDescriptor, TrackEvent. Importing this module needs the
package (the ``trace`` extra).

Rules: one packet sequence; the viewer sorts by time and keeps the file's order among equals, so a span is written
before what begins at its end, and an arrow's source before its target.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackDescriptor, TrackEvent
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from aiovm.sinks.timeline import TimelineSink

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["PerfettoCanvas", "PerfettoSink"]

_SEQUENCE = 1


class PerfettoCanvas:
    """Draws into the protobuf file ``path``."""

    def __init__(self, path: str | Path) -> None:
        self._out = Path(path).open("wb")  # noqa: SIM115
        self._builder = StreamingTraceProtoBuilder(self._out)
        self._groups: dict[str, int] = {}
        self._uuids = 0
        self._flows = 0

    def track(self, group: str, name: str, rank: int) -> int:
        parent = self._groups.get(group)
        if parent is None:
            parent = self._groups[group] = self._describe(group, len(self._groups), parent=0)
        return self._describe(name, rank, parent=parent)

    def span(self, track: int, name: str, start: int, end: int, args: Mapping[str, int | str]) -> None:
        self._event(TrackEvent.TYPE_SLICE_BEGIN, track, start, name, args)
        self._event(TrackEvent.TYPE_SLICE_END, track, end, "", {})

    def instant(self, track: int, name: str, at: int, args: Mapping[str, int | str]) -> None:
        self._event(TrackEvent.TYPE_INSTANT, track, at, name, args)

    def arrow(self, name: str, at: int, source: int, target: int, args: Mapping[str, int | str]) -> None:
        self._flows += 1
        self._event(TrackEvent.TYPE_INSTANT, source, at, name, args, leaves=self._flows)
        self._event(TrackEvent.TYPE_INSTANT, target, at, name, args, arrives=self._flows)

    def close(self) -> None:
        self._out.close()

    def _describe(self, name: str, rank: int, *, parent: int) -> int:
        self._uuids += 1
        packet = self._packet()
        descriptor = packet.track_descriptor
        descriptor.uuid = self._uuids
        descriptor.name = name
        descriptor.sibling_order_rank = rank
        descriptor.child_ordering = TrackDescriptor.EXPLICIT
        if parent:
            descriptor.parent_uuid = parent
        self._builder.write_packet(packet)
        return self._uuids

    def _event(
        self,
        type_: int,
        track: int,
        at: int,
        name: str,
        args: Mapping[str, int | str],
        *,
        leaves: int = 0,
        arrives: int = 0,
    ) -> None:
        packet = self._packet()
        packet.timestamp = at
        event = packet.track_event
        event.type = type_
        event.track_uuid = track
        if name:
            event.name = name
        if leaves:
            event.flow_ids.append(leaves)
        if arrives:
            event.terminating_flow_ids.append(arrives)
        for key, value in args.items():
            annotation = event.debug_annotations.add()
            annotation.name = key
            if isinstance(value, int):
                annotation.int_value = value
            else:
                annotation.string_value = value
        self._builder.write_packet(packet)

    def _packet(self) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        return packet


class PerfettoSink(TimelineSink):
    """Writes a trace as Perfetto's protobuf to ``path``."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(PerfettoCanvas(path))
