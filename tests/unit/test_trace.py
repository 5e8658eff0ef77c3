"""Records: packing, naming, batches, sinks that cannot hurt, and the hash."""

import io
import json
import struct

import pytest

from aiovm.trace import FIELDS, HashSink, JsonLinesSink, Kind, ListSink, Record, Tracer, unpack


class Broken:
    """Raises when told to."""

    def __init__(self, *, on_write=True):
        self.on_write = on_write
        self.batches = 0

    def write(self, batch):
        self.batches += 1
        if self.on_write:
            raise ValueError("no room")

    def close(self):
        raise OSError("gone")


def test_nobody_listens_at_first():
    assert Tracer().on is False


def test_every_kind_names_its_arguments():
    assert set(FIELDS) == set(Kind)
    assert all(len(set(names)) == 2 for names in FIELDS.values())


def test_numbers_are_fixed():
    assert [Kind.SCHED_IN, Kind.WAKE, Kind.EXIT, Kind.KICK, Kind.YIELD, Kind.IPI, Kind.END] == [1, 3, 5, 8, 10, 21, 23]
    assert sorted(Kind) == list(range(1, len(Kind) + 1))


def test_a_record_is_five_words():
    tracer, seen = Tracer(), []

    class Raw:
        def write(self, batch):
            seen.append(batch)

        def close(self):
            pass

    tracer.add(Raw())
    assert tracer.on is True
    tracer.emit(1_000, Kind.WAKE, 3, -1, 2)
    tracer.emit(1_001, Kind.EXIT, 0, 5, 0xFFFF_FFFF_8100_0000)
    tracer.flush()
    assert seen == [struct.pack("=10q", 1000, 3, 3, -1, 2, 1001, 5, 0, 5, 0xFFFF_FFFF_8100_0000 - (1 << 64))]
    tracer.flush()
    assert len(seen) == 1


def test_addresses_come_back_unsigned_and_numbers_signed():
    tracer, sink = Tracer(), ListSink()
    tracer.add(sink)
    tracer.emit(5, Kind.EXIT, 0, 5, 0xFFFF_FFFF_8100_0000)  # rip
    tracer.emit(6, Kind.MSR, 0, 0x6E0, 0x8000_0000_0000_0000)  # value
    tracer.emit(7, Kind.WAKE, 0, -1, 0)  # waker
    tracer.emit(8, Kind.HYPERCALL, 0, 5, 0xFFFF_FFFF_FFFF_FC18)  # result: -1000
    tracer.emit(9, Kind.ENTRY, 0, 0xFFFF_FFFF_8000_0000, 1 << 62)
    tracer.flush()
    assert [(r.a, r.b) for r in sink.records] == [
        (5, 0xFFFF_FFFF_8100_0000),
        (0x6E0, 0x8000_0000_0000_0000),
        (-1, 0),
        (5, -1000),
        (0xFFFF_FFFF_8000_0000, 1 << 62),
    ]


def test_a_record_names_its_arguments():
    record = Record(9, Kind.YIELD, 2, 7, -1)
    assert record.named() == {"now": 9, "kind": "yield", "vcpu": 2, "target": 7, "answer": -1}


def test_unpack_reads_what_was_packed():
    assert list(unpack(struct.pack("=5q", 1, 7, 2, 0x1000, 1))) == [Record(1, Kind.HALT, 2, 0x1000, 1)]


def test_batches_are_4096_records():
    tracer, sink = Tracer(), Broken(on_write=False)
    tracer.add(sink)
    for _ in range(4095):
        tracer.emit(0, Kind.KICK, 0)
    assert sink.batches == 0
    tracer.emit(0, Kind.KICK, 0)
    assert sink.batches == 1


def test_a_later_sink_does_not_see_earlier_records():
    tracer, first, second = Tracer(), ListSink(), ListSink()
    tracer.add(first)
    tracer.emit(1, Kind.KICK, 0)
    tracer.add(second)
    tracer.emit(2, Kind.KICK, 0)
    tracer.flush()
    assert [r.now for r in first.records] == [1, 2]
    assert [r.now for r in second.records] == [2]


def test_a_sink_that_raises_is_dropped_and_the_others_go_on(capsys):
    tracer, broken, sink = Tracer(), Broken(), ListSink()
    tracer.add(broken)
    tracer.add(sink)
    for now in (1, 2):
        tracer.emit(now, Kind.KICK, 0)
        tracer.flush()
    assert broken.batches == 1
    assert [r.now for r in sink.records] == [1, 2]
    assert tracer.on is True
    assert "no room" in capsys.readouterr().out


def test_without_its_last_sink_the_tracer_is_off(capsys):
    tracer = Tracer()
    tracer.add(Broken())
    tracer.emit(1, Kind.KICK, 0)
    tracer.flush()
    assert tracer.on is False
    assert "Broken" in capsys.readouterr().out


def test_close_flushes_and_survives_a_sink_that_cannot_close(capsys):
    tracer, sink = Tracer(), ListSink()
    tracer.add(Broken(on_write=False))
    tracer.add(sink)
    tracer.emit(1, Kind.KICK, 0)
    tracer.close()
    assert len(sink.records) == 1
    assert tracer.on is False
    assert "gone" in capsys.readouterr().out


def test_the_hash_is_of_the_records_not_of_the_batches():
    digests = []
    for flushes in (False, True):
        tracer, sink = Tracer(), HashSink()
        tracer.add(sink)
        for now in range(10):
            tracer.emit(now, Kind.PLE, 0, now)
            if flushes:
                tracer.flush()
        tracer.close()
        digests.append(sink.hexdigest())
    assert digests[0] == digests[1]
    assert len(digests[0]) == 32


def test_the_hash_sees_every_field():
    def digest(*record):
        tracer, sink = Tracer(), HashSink()
        tracer.add(sink)
        tracer.emit(*record)
        tracer.close()
        return sink.hexdigest()

    records = [(1, 2, 3, 4, 5), (9, 2, 3, 4, 5), (1, 9, 3, 4, 5), (1, 2, 9, 4, 5), (1, 2, 3, 9, 5), (1, 2, 3, 4, 9)]
    assert len({digest(*r) for r in records}) == 6


def test_list_sink_filters_by_kind():
    tracer, sink = Tracer(), ListSink()
    tracer.add(sink)
    for kind in (Kind.WAKE, Kind.HALT, Kind.KICK, Kind.HALT):
        tracer.emit(0, kind, 0)
    tracer.flush()
    assert [r.kind for r in sink.of(Kind.HALT, Kind.WAKE)] == [Kind.WAKE, Kind.HALT, Kind.HALT]
    sink.close()


def test_json_lines():
    out = io.StringIO()
    text = []
    out.close, close = lambda: text.append(out.getvalue()), out.close
    tracer = Tracer()
    tracer.add(JsonLinesSink(out))
    tracer.emit(1, Kind.SCHED_IN, 4, 0, 250)
    tracer.emit(2, Kind.PIO, 4, 0x3F8, 0x41)
    tracer.close()
    close()
    assert [json.loads(line) for line in text[0].splitlines()] == [
        {"now": 1, "kind": "sched_in", "vcpu": 4, "pcpu": 0, "run_delay_ns": 250},
        {"now": 2, "kind": "pio", "vcpu": 4, "port": 0x3F8, "value": 0x41},
    ]


@pytest.mark.parametrize("value", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_any_64_bit_value_is_carried(value):
    tracer, sink = Tracer(), ListSink()
    tracer.add(sink)
    tracer.emit(0, Kind.MMIO, 0, value, value)
    tracer.flush()
    assert (sink.records[0].a, sink.records[0].b) == (value, value)
