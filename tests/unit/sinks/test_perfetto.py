"""The protobuf file, read back with the package's own classes."""

import pytest

pytest.importorskip("perfetto")

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from aiovm.sinks.perfetto import PerfettoSink
from aiovm.trace import Kind, Tracer


def written(path, *records):
    tracer = Tracer()
    tracer.add(PerfettoSink(path))
    for record in records:
        tracer.emit(*record)
    tracer.close()
    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    return trace.packet


@pytest.fixture
def packets(tmp_path):
    return written(
        tmp_path / "t.pftrace",
        (1_000, Kind.SCHED_IN, 0, 2, 33),
        (1_500, Kind.KICK, 0, 1, 0),
        (1_600, Kind.PLE, 0, 0x40_0000, 200),
        (2_000, Kind.SCHED_OUT, 0, 2, 1),
        (2_001, Kind.WAKE, 1, -1, 2),
    )


def tracks_of(packets):
    return {p.track_descriptor.uuid: p.track_descriptor for p in packets if p.HasField("track_descriptor")}


def test_tracks_have_a_parent_and_an_order(packets):
    tracks = tracks_of(packets)
    paths = {
        (tracks[t.parent_uuid].name if t.parent_uuid else "", t.name, t.sibling_order_rank) for t in tracks.values()
    }
    assert paths == {
        ("", "physical CPUs", 0),
        ("", "vCPUs", 1),
        ("physical CPUs", "CPU 2", 2),
        ("vCPUs", "vCPU 0", 0),
        ("vCPUs", "vCPU 1", 2),
    }
    assert all(t.child_ordering == 3 for t in tracks.values() if not t.parent_uuid)


def test_every_event_is_on_a_track_that_was_described_before(packets):
    known = set()
    for packet in packets:
        assert packet.trusted_packet_sequence_id == 1
        if packet.HasField("track_descriptor"):
            known.add(packet.track_descriptor.uuid)
        else:
            assert packet.track_event.track_uuid in known


def test_spans_begin_and_end(packets):
    tracks = tracks_of(packets)
    got = []
    opened = {}
    for packet in packets:
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            opened[event.track_uuid] = (event.name, packet.timestamp)
        elif event.type == TrackEvent.TYPE_SLICE_END:
            name, start = opened.pop(event.track_uuid)
            got.append((tracks[event.track_uuid].name, name, start, packet.timestamp))
    assert opened == {}
    assert sorted(got) == [
        ("CPU 2", "vCPU 0", 1_000, 2_000),
        ("vCPU 0", "ready", 2_000, 2_001),
        ("vCPU 0", "running", 1_000, 1_400),
        ("vCPU 0", "running", 1_600, 2_000),
        ("vCPU 0", "spinning", 1_400, 1_600),
    ]


def test_an_arrow_leaves_one_instant_and_arrives_at_another(packets):
    tracks = tracks_of(packets)
    ends = [p for p in packets if p.track_event.type == TrackEvent.TYPE_INSTANT]
    source, target = ends
    assert (tracks[source.track_event.track_uuid].name, tracks[target.track_event.track_uuid].name) == (
        "vCPU 0",
        "vCPU 1",
    )
    assert list(source.track_event.flow_ids) == list(target.track_event.terminating_flow_ids) == [1]
    assert source.timestamp == target.timestamp == 1_500
    assert source.track_event.name == target.track_event.name == "kick"


def test_arguments_keep_their_types(packets):
    spinning = next(p.track_event for p in packets if p.track_event.name == "spinning")
    rip, window = spinning.debug_annotations
    assert (rip.name, rip.string_value) == ("rip", "0x400000")
    assert (window.name, window.int_value) == ("window_ns", 200)


def test_the_same_records_give_the_same_bytes(tmp_path):
    records = [(i * 10, Kind.KICK, i % 3, 3, 0) for i in range(50)]
    for name in ("a", "b"):
        written(tmp_path / name, *records)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
