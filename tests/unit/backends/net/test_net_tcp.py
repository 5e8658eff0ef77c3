"""A TCP endpoint against segments written by hand (RFC 9293)."""

import pytest

from aiovm.backends.net.tcp import Close, Phase, TcpEndpoint, reset_for
from aiovm.backends.net.wire import Segment, TcpFlag

SYN, ACK, FIN, RST, PSH = TcpFlag.SYN, TcpFlag.ACK, TcpFlag.FIN, TcpFlag.RST, TcpFlag.PSH
SECOND = 1_000_000_000


class Peer:
    """The guest: endpoint ours at 1000, the guest's sequence from 5000."""

    def __init__(self, *, window=8192, mss=1460, isn=1000, their=5000):
        self.end = TcpEndpoint(80, 4321, isn, 1460)
        self.their = their
        self.isn = isn
        self.end.accept(self.make(SYN, their, 0, window=window, mss=mss), 0)

    def make(self, flags, seq, ack, payload=b"", window=8192, mss=0):
        return Segment(4321, 80, seq & 0xFFFF_FFFF, ack & 0xFFFF_FFFF, flags, window, payload, mss)

    def say(self, flags, seq, ack, payload=b"", *, window=8192, now=0):
        """``seq`` and ``ack`` count from the first byte after each SYN."""
        self.end.segment(self.make(flags, self.their + 1 + seq, self.isn + 1 + ack, payload, window), now)

    def out(self):
        """What was sent: (flags, seq, ack, payload)."""
        self.end.flush()
        sent = [
            (s.flags, (s.seq - self.isn - 1) & 0xFFFF_FFFF, (s.ack - self.their - 1) & 0xFFFF_FFFF, s.payload)
            for s in self.end.outgoing
        ]
        self.end.outgoing.clear()
        return sent


def opened(**options):
    peer = Peer(**options)
    peer.out()
    peer.say(ACK, 0, 0, window=options.get("window", 8192))
    assert peer.end.phase is Phase.OPEN
    return peer


def test_a_syn_is_answered_and_the_ack_opens():
    peer = Peer()
    (segment,) = peer.end.outgoing
    assert (segment.src_port, segment.dst_port, segment.seq, segment.ack) == (80, 4321, 1000, 5001)
    assert segment.flags == SYN | ACK
    assert segment.mss == 1460
    assert segment.window == 0xFFFF
    peer.end.outgoing.clear()
    peer.say(ACK, 0, -1)
    assert peer.end.phase is Phase.SYN_RECEIVED
    assert peer.end.send(b"early", 0) == 0
    peer.say(ACK, 0, 0)
    assert peer.end.phase is Phase.OPEN
    assert peer.end.deadline is None
    assert peer.out() == []


def test_a_syn_that_comes_again_is_answered_again():
    peer = Peer()
    peer.out()
    peer.say(SYN, -1, -1)
    assert [s[0] for s in peer.out()] == [SYN | ACK]


def test_the_syn_ack_is_sent_again_after_1_2_4_seconds():
    peer = Peer()
    peer.out()
    now = 0
    for wait in (1, 2, 4):
        assert peer.end.deadline == now + wait * SECOND
        peer.end.advance(peer.end.deadline - 1)
        assert peer.out() == []
        now = peer.end.deadline
        peer.end.advance(now)
        assert [s[0] for s in peer.out()] == [SYN | ACK]


def test_a_guest_that_never_answers_is_given_up():
    peer = Peer()
    for _ in range(9):
        peer.end.advance(peer.end.deadline)
    assert peer.end.phase is Phase.CLOSED
    assert peer.end.close_reason is Close.SILENT
    assert peer.out()[-1][0] == RST | ACK
    peer.end.advance(1 << 60)
    peer.say(ACK, 0, 0)
    assert peer.out() == []


@pytest.mark.parametrize("base", [1000, 0xFFFF_FFFE])
def test_data_both_ways_across_the_wrap(base):
    peer = opened(isn=base, their=base)
    assert peer.end.send(b"hello", 0) == 5
    assert peer.out() == [(ACK | PSH, 0, 0, b"hello")]
    peer.say(ACK | PSH, 0, 5, b"world")
    assert peer.end.received == [b"world"]
    assert peer.end.deadline is None
    assert peer.out() == [(ACK, 5, 5, b"")]


def test_data_is_cut_by_the_smaller_mss():
    peer = opened(mss=100)
    peer.end.send(b"x" * 250, 0)
    assert [(s[0], s[1], len(s[3])) for s in peer.out()] == [(ACK, 0, 100), (ACK, 100, 100), (ACK | PSH, 200, 50)]


@pytest.mark.parametrize(("offered", "used"), [(0, 536), (1, 64), (9000, 1460)])
def test_mss_has_a_default_a_floor_and_a_ceiling(offered, used):
    peer = opened(mss=offered, window=60000)
    peer.end.send(b"x" * 3000, 0)
    assert len(peer.out()[0][3]) == used


def test_the_guests_window_is_kept():
    peer = opened(window=10)
    assert peer.end.send(b"x" * 15, 0) == 10
    assert peer.end.send(b"x", 0) == 0
    peer.say(ACK, 0, 4, window=10)
    assert peer.end.send(b"y" * 15, 0) == 4
    peer.say(ACK, 0, 14, window=0)
    assert peer.end.send(b"z", 0) == 0


def test_our_window_is_what_the_owner_has_freed():
    peer = opened()
    for at in range(0, 0xF000, 0x1000):
        peer.say(ACK, at, 0, b"x" * 0x1000)
    assert peer.end.outgoing == []
    peer.end.flush()
    assert peer.end.outgoing[-1].window == 0xFFF
    peer.out()
    peer.say(ACK, 0xF000, 0, b"y" * 0x1000)
    assert sum(map(len, peer.end.received)) == 0xFFFF
    assert peer.out() == [(ACK, 0, 0xFFFF, b"")]
    peer.end.consumed(0x3FFE)
    assert peer.out() == []
    peer.end.consumed(1)
    peer.end.flush()
    assert peer.end.outgoing[-1].window == 0x3FFF


def test_lost_data_is_sent_again_the_oldest_first():
    peer = opened(mss=100)
    peer.end.send(b"a" * 100 + b"b" * 100 + b"c" * 50, 0)
    peer.out()
    peer.end.advance(SECOND)
    assert peer.out() == [(ACK | PSH, 0, 0, b"a" * 100)]
    assert peer.end.deadline == 3 * SECOND
    peer.say(ACK, 0, 100, now=SECOND)
    assert peer.out() == [(ACK | PSH, 100, 0, b"b" * 100)]
    peer.say(ACK, 0, 250, now=SECOND)
    assert peer.out() == []
    assert peer.end.deadline is None


def test_old_data_is_acknowledged_again_and_taken_once():
    peer = opened()
    peer.say(ACK, 0, 0, b"abcd")
    peer.out()
    peer.say(ACK, 0, 0, b"abcdef")
    assert peer.end.received == [b"abcd", b"ef"]
    peer.say(ACK, 2, 0, b"cd")
    assert peer.end.received == [b"abcd", b"ef"]
    assert peer.out() == [(ACK, 0, 6, b"")]


def test_probes_and_keep_alives_are_answered():
    peer = opened()
    peer.say(ACK, 0, 0)
    assert peer.out() == []
    peer.say(ACK, -1, 0)
    assert peer.out() == [(ACK, 0, 0, b"")]


def test_data_out_of_order_is_asked_for_again():
    peer = opened()
    peer.say(ACK, 10, 0, b"late")
    assert peer.end.received == []
    assert peer.out() == [(ACK, 0, 0, b"")]


def test_an_acknowledgement_of_what_was_not_sent_is_answered():
    peer = opened()
    peer.say(ACK, 0, 7, b"data")
    assert peer.end.received == []
    assert peer.out() == [(ACK, 0, 0, b"")]
    peer.end.send(b"1234", 0)
    peer.say(ACK, 0, 4)
    peer.out()
    peer.say(ACK, 0, 2, window=1)
    assert peer.end.send(b"xy", 0) == 2


def test_the_guest_ends_first():
    peer = opened()
    peer.say(ACK | FIN, 0, 0, b"bye")
    assert peer.end.received == [b"bye"]
    assert peer.end.ended
    assert peer.out() == [(ACK, 0, 4, b"")]
    peer.say(ACK | FIN, 0, 0, b"bye")
    assert peer.out() == [(ACK, 0, 4, b"")]
    assert peer.end.send(b"more", 0) == 4
    peer.end.finish(0)
    peer.end.finish(0)
    assert peer.end.send(b"x", 0) == 0
    assert peer.out() == [(ACK | PSH, 0, 4, b"more"), (ACK | FIN, 4, 4, b"")]
    peer.say(ACK, 4, 5)
    assert peer.end.phase is Phase.CLOSED
    assert peer.end.close_reason is Close.ORDERLY


def test_we_end_first():
    peer = opened()
    peer.end.send(b"a", 0)
    peer.end.finish(0)
    peer.out()
    peer.say(ACK, 0, 1)
    assert peer.end.deadline is not None
    peer.end.advance(peer.end.deadline)
    assert peer.out() == [(ACK | FIN, 1, 0, b"")]
    peer.say(ACK, 0, 2)
    assert peer.end.deadline is None
    peer.say(ACK, 0, 2, b"still")
    assert peer.end.received == [b"still"]
    peer.say(ACK | FIN, 5, 2)
    assert peer.out() == [(ACK, 2, 6, b"")]
    assert peer.end.close_reason is Close.ORDERLY


def test_a_fin_that_does_not_fit_the_window_comes_again():
    peer = opened()
    for at in range(0, 0xF000, 0x1000):
        peer.say(ACK, at, 0, b"x" * 0x1000)
    peer.say(ACK | FIN, 0xF000, 0, b"y" * 0x1000)
    assert not peer.end.ended
    peer.end.consumed(0xFFFF)
    peer.say(ACK | FIN, 0xFFFF, 0, b"y")
    assert peer.end.ended


def test_after_a_close_the_guest_has_a_minute():
    peer = opened()
    peer.end.close(0)
    peer.say(ACK, 0, 1, now=5 * SECOND)
    assert peer.end.deadline == 65 * SECOND
    peer.out()
    peer.end.advance(65 * SECOND)
    assert peer.out()[0][0] == RST | ACK
    assert peer.end.close_reason is Close.OURS


def test_resets():
    peer = opened()
    peer.say(RST, 1, 0)
    assert peer.end.phase is Phase.OPEN
    peer.say(RST, 0, 0)
    assert peer.end.close_reason is Close.RESET
    peer = opened()
    peer.end.reset()
    peer.end.reset()
    assert [s[0] for s in peer.out()] == [RST | ACK]
    assert peer.end.close_reason is Close.OURS


def test_a_syn_on_an_open_connection_is_challenged():
    peer = opened()
    peer.say(SYN, 500, 0)
    assert peer.end.phase is Phase.OPEN
    assert peer.out() == [(ACK, 0, 0, b"")]
    peer.say(PSH, 0, 0, b"without ack")
    assert peer.end.received == []


def calling():
    peer = Peer()
    peer.end = TcpEndpoint(49152, 4321, 1000, 1460)
    peer.end.connect(0)
    return peer


def test_we_call_and_are_answered():
    peer = calling()
    (syn,) = peer.end.outgoing
    assert (syn.flags, syn.seq, syn.ack, syn.mss) == (SYN, 1000, 0, 1460)
    peer.end.outgoing.clear()
    peer.say(ACK, -1, 0)
    peer.say(SYN | ACK, -1, 1)
    assert peer.end.phase is Phase.SYN_SENT
    peer.say(SYN | ACK, -1, 0)
    assert peer.end.phase is Phase.OPEN
    assert peer.out() == [(ACK, 0, 0, b"")]
    peer.say(SYN | ACK, -1, 0)
    assert peer.out() == [(ACK, 0, 0, b"")]


def test_we_call_and_are_refused():
    peer = calling()
    peer.say(RST | ACK, -1, 5)
    assert peer.end.phase is Phase.SYN_SENT
    peer.say(RST | ACK, -1, 0)
    assert peer.end.close_reason is Close.RESET


def test_strays_are_reset():
    assert reset_for(Segment(1, 2, 3, 4, RST, 0)) is None
    assert reset_for(Segment(1, 2, 3, 4, ACK, 0)) == Segment(2, 1, 4, 0, RST, 0)
    assert reset_for(Segment(1, 2, 3, 0, SYN | FIN, 0, b"ab")) == Segment(2, 1, 0, 7, RST | ACK, 0)
