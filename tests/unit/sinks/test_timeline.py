"""Which spans, instants and arrows come of which records."""

from aiovm.sinks.timeline import Timeline, TimelineSink
from aiovm.trace import Kind, Record, Tracer


class Paper:
    """A canvas that remembers, with tracks by name."""

    def __init__(self):
        self.tracks = []
        self.ranks = []
        self.spans = []
        self.instants = []
        self.arrows = []
        self.closed = False

    def track(self, group, name, rank):
        self.tracks.append((group, name))
        self.ranks.append(rank)
        return len(self.tracks) - 1

    def span(self, track, name, start, end, args):
        self.spans.append((self.tracks[track][1], name, start, end, dict(args)))

    def instant(self, track, name, at, args):
        self.instants.append((self.tracks[track][1], name, at, dict(args)))

    def arrow(self, name, at, source, target, args):
        self.arrows.append((name, at, self.tracks[source][1], self.tracks[target][1]))

    def close(self):
        self.closed = True


def drawn(*records):
    paper = Paper()
    timeline = Timeline(paper)
    for record in records:
        timeline.feed(Record(*record))
    timeline.finish()
    return paper


def states(paper, track="vCPU 3"):
    return [(name, start, end) for where, name, start, end, _ in paper.spans if where == track]


def test_a_stay_on_a_cpu_is_a_span_on_both_tracks():
    paper = drawn(
        (100, Kind.WAKE, 3, -1, 1),
        (150, Kind.SCHED_IN, 3, 1, 20),
        (900, Kind.SCHED_OUT, 3, 1, 0),
    )
    assert ("CPU 1", "vCPU 3", 150, 900, {"run_delay_ns": 20}) in paper.spans
    assert ("vCPU 3", "running", 150, 900, {"pcpu": 1}) in paper.spans
    assert states(paper) == [("ready", 100, 150), ("running", 150, 900)]
    assert set(paper.tracks) == {("physical CPUs", "CPU 1"), ("vCPUs", "vCPU 3")}
    assert paper.arrows == []


def test_preempted_and_yielding_vcpus_are_ready_until_they_are_back():
    for reason in (1, 2):
        paper = drawn((0, Kind.SCHED_IN, 3, 0, 0), (10, Kind.SCHED_OUT, 3, 0, reason), (30, Kind.SCHED_IN, 3, 0, 20))
        assert states(paper) == [("running", 0, 10), ("ready", 10, 30)]


def test_only_a_halted_vcpu_is_drawn_as_halted():
    paper = drawn(
        (0, Kind.SCHED_IN, 3, 0, 0),
        (5, Kind.SCHED_OUT, 3, 0, 0),
        (7, Kind.WAKE, 3, -1, 0),
        (8, Kind.MP_STATE, 3, 3, 0),
        (9, Kind.SCHED_OUT, 3, 0, 0),
        (20, Kind.WAKE, 3, -1, 0),
        (21, Kind.MP_STATE, 3, 0, 0),
        (30, Kind.SCHED_OUT, 3, 0, 0),
        (40, Kind.WAKE, 3, -1, 0),
    )
    assert [s for s in states(paper) if s[0] in ("halted", "blocked")] == [
        ("blocked", 5, 7),
        ("halted", 9, 20),
        ("blocked", 30, 40),
    ]


def test_a_pause_loop_exit_and_a_halt_poll_are_carved_out_of_running():
    paper = drawn(
        (1000, Kind.SCHED_IN, 3, 0, 0),
        (5000, Kind.PLE, 3, 0x1234, 2048),
        (6000, Kind.HALT_POLL, 3, 400, 1),
        (7000, Kind.SCHED_OUT, 3, 0, 1),
    )
    assert states(paper) == [
        ("running", 1000, 2952),
        ("spinning", 2952, 5000),
        ("running", 5000, 5600),
        ("polling", 5600, 6000),
        ("running", 6000, 7000),
    ]
    assert ("vCPU 3", "spinning", 2952, 5000, {"rip": "0x1234", "window_ns": 2048}) in paper.spans
    assert ("vCPU 3", "running", 5000, 5600, {"pcpu": 0}) in paper.spans
    # The physical CPU saw one vCPU all the while.
    assert [s[2:4] for s in paper.spans if s[0] == "CPU 0"] == [(1000, 7000)]


def test_what_is_carved_out_does_not_reach_before_the_last_change():
    paper = drawn((1000, Kind.SCHED_IN, 3, 0, 0), (1500, Kind.PLE, 3, 0, 2048), (2000, Kind.SCHED_OUT, 3, 0, 1))
    assert states(paper) == [("spinning", 1000, 1500), ("running", 1500, 2000)]


def test_a_record_before_the_last_change_moves_nothing_back():
    # A vCPU that is taken away before the switch to it is over.
    paper = drawn((2500, Kind.SCHED_IN, 3, 0, 0), (1000, Kind.SCHED_OUT, 3, 0, 0), (3000, Kind.WAKE, 3, -1, 0))
    assert states(paper) == [("blocked", 2500, 3000)]


def test_kicks_wakes_and_yields_are_arrows():
    paper = drawn(
        (5, Kind.KICK, 1, 3, 0),
        (6, Kind.WAKE, 3, 1, 0),
        (7, Kind.YIELD, 1, 3, 1),
    )
    assert paper.arrows == [
        ("kick", 5, "vCPU 1", "vCPU 3"),
        ("wake", 6, "vCPU 1", "vCPU 3"),
        ("yield", 7, "vCPU 1", "vCPU 3"),
    ]
    assert paper.instants == []


def test_what_nobody_else_did_is_an_instant():
    paper = drawn(
        (5, Kind.KICK, -1, 3, 0), (6, Kind.KICK, 3, 3, 0), (7, Kind.YIELD, 3, 2, 0), (8, Kind.YIELD, 3, 2, -1)
    )
    assert paper.arrows == []
    assert paper.instants == [
        ("vCPU 3", "kick", 5, {}),
        ("vCPU 3", "kick", 6, {}),
        ("vCPU 3", "yield refused", 7, {"target": 2, "answer": 0}),
        ("vCPU 3", "yield refused", 8, {"target": 2, "answer": -1}),
    ]


def test_events_are_instants_with_their_arguments():
    paper = drawn(
        (1, Kind.INJECT, 3, 0x30, 0),
        (2, Kind.IPI, 3, 0x4FB, 2),
        (3, Kind.TIMER, 3, 1, 2),
        (4, Kind.FAULT, 3, 14, 0xFFFF_8000_0000_0000),
        (5, Kind.MSR, 3, 0x10, 0),
        (6, Kind.END, -1, 0, 0),
    )
    assert paper.instants == [
        ("vCPU 3", "interrupt", 1, {"vector": "0x30", "error_code": 0}),
        ("vCPU 3", "IPI", 2, {"icr": "0x4fb", "destination": "0x2"}),
        ("vCPU 3", "timer", 3, {"deadline_ns": 1, "late_ns": 2}),
        ("vCPU 3", "exception", 4, {"vector": "0xe", "rip": "0xffff800000000000"}),
    ]


def test_the_guests_lock_word_is_a_track_of_its_own():
    paper = drawn(
        (10, Kind.LOCK, 3, 1, 0),
        (20, Kind.LOCK, 3, 1, 0),
        (30, Kind.LOCK, 3, 2, 0),
        (50, Kind.LOCK, 3, 0, 0),
        (60, Kind.LOCK, 3, 1, 5),
        (70, Kind.LOCK, 3, 1, 6),
        (75, Kind.LOCK, 3, 9, 6),
        (80, Kind.LOCK, 3, 0, 6),
    )
    assert states(paper, "vCPU 3 lock") == [
        ("waiting for lock 0", 10, 30),
        ("holding lock 0", 30, 50),
        ("waiting for lock 5", 60, 70),
        ("waiting for lock 6", 70, 75),
    ]


def test_tracks_are_sorted_by_number_with_the_lock_below_its_vcpu():
    paper = drawn(
        (0, Kind.SCHED_IN, 10, 1, 0), (0, Kind.LOCK, 2, 1, 0), (0, Kind.WAKE, 2, -1, 0), (0, Kind.WAKE, 3, -1, 0)
    )
    order = sorted(zip(paper.ranks, paper.tracks, strict=True))
    assert [name for _, (group, name) in order if group == "vCPUs"] == ["vCPU 2", "vCPU 2 lock", "vCPU 3", "vCPU 10"]


def test_what_is_open_ends_with_the_last_record():
    paper = drawn((0, Kind.SCHED_IN, 3, 0, 0), (0, Kind.LOCK, 3, 2, 0), (500, Kind.WAKE, 1, -1, 0))
    assert states(paper) == [("running", 0, 500)]
    assert states(paper, "vCPU 3 lock") == [("holding lock 0", 0, 500)]


def test_a_sink_draws_batches_and_closes_its_canvas():
    paper = Paper()
    tracer = Tracer()
    tracer.add(TimelineSink(paper))
    tracer.emit(0, Kind.SCHED_IN, 3, 0, 0)
    tracer.flush()
    tracer.emit(900, Kind.SCHED_OUT, 3, 0, 0)
    assert not paper.closed
    tracer.close()
    assert states(paper) == [("running", 0, 900)]
    assert paper.closed
