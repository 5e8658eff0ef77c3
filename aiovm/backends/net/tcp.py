"""One TCP connection, the host's end: pure, time is an argument (RFC 9293).

    SYN_SENT, SYN_RECEIVED --ACK--> OPEN --both directions ended, RST, no answer--> CLOSED

While it is OPEN each direction ends by itself: ours with :meth:`TcpEndpoint.finish` (FIN, then its ACK), the guest's
with its FIN (``ended``).

Rules: segments to send collect in ``outgoing``, what came in order in ``received``; the owner takes both. Data is kept
until it is acknowledged. The oldest segment is sent again after one second, two, four and so on (RFC 6298 without its
measuring: the link loses nothing unless the guest drops it), and once that got through the next ones, one for each ACK;
after eight times the connection is given up. The window that the guest sees is the room that the owner has freed with
:meth:`TcpEndpoint.consumed`.

Not modelled: options other than MSS, urgent data, congestion control (nothing lies between the ends), TIME-WAIT (the
owner answers a stray segment with RST). A segment out of order is dropped and comes again.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from aiovm.backends.net.wire import Segment, TcpFlag
from aiovm.bits import mask, sign_extend
from aiovm.units import SEC

__all__ = ["Close", "Fin", "Phase", "TcpEndpoint", "reset_for"]

WINDOW: Final = 0xFFFF
_DEFAULT_MSS: Final = 536
#: Ours: a guest that asks for segments of a byte would make us send 65535 of them.
_LEAST_MSS: Final = 64
_RETRY_NS: Final = SEC
_TRIES: Final = 8
#: How long a guest may keep its direction open after the host has closed (Linux' tcp_fin_timeout).
_LINGER_NS: Final = 60 * SEC

_ACK: Final = TcpFlag.ACK


class Phase(enum.Enum):
    """Where the connection is in its life."""

    SYN_SENT = "syn sent"
    SYN_RECEIVED = "syn received"
    OPEN = "open"
    CLOSED = "closed"


class Fin(enum.Enum):
    """How our direction stands."""

    NONE = "sending"
    SENT = "fin sent"
    ACKED = "ended"


class Close(enum.Enum):
    """Why the connection is closed."""

    ORDERLY = "both ends have ended"
    RESET = "the guest reset the connection"
    SILENT = "the guest does not answer"
    OURS = "reset by the host"


def reset_for(segment: Segment) -> Segment | None:
    """The answer to a segment that belongs to no connection (RFC 9293, 3.10.7.1)."""
    if segment.flags & TcpFlag.RST:
        return None
    if segment.flags & _ACK:
        return Segment(segment.dst_port, segment.src_port, segment.ack, 0, TcpFlag.RST, 0)
    ack = segment.seq + segment.length & mask(32)
    return Segment(segment.dst_port, segment.src_port, 0, ack, TcpFlag.RST | _ACK, 0)


def _after(a: int, b: int) -> int:
    """How far ``a`` lies behind ``b`` in sequence space; negative before it."""
    return sign_extend(a - b, 32)


@dataclass(slots=True)
class TcpEndpoint:
    """One end. ``isn``: our first sequence number. ``mss``: the most that we take in a segment."""

    local_port: int
    remote_port: int
    isn: int
    mss: int
    phase: Phase = Phase.SYN_SENT
    close_reason: Close | None = None
    ended: bool = False
    outgoing: list[Segment] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    deadline: int | None = None
    _una: int = 0
    _next: int = 0
    _peer_window: int = 0
    _peer_mss: int = _DEFAULT_MSS
    _unacked: bytearray = field(default_factory=bytearray)
    _fin: Fin = Fin.NONE
    _rcv_next: int = 0
    _held: int = 0
    _edge: int = 0
    _ack_due: bool = False
    _tries: int = 0
    _recover: int | None = None
    _closing: bool = False

    # ---- the owner's side --------------------------------------------------------------------------------------

    def connect(self, now: int) -> None:
        """Ask the guest for a connection."""
        self._una = self.isn
        self._next = self.isn + 1 & mask(32)
        self._emit_syn(now)

    def accept(self, syn: Segment, now: int) -> None:
        """Answer the guest's SYN."""
        self.phase = Phase.SYN_RECEIVED
        self._una = self.isn
        self._next = self.isn + 1 & mask(32)
        self._learn(syn)
        self._emit_syn(now)

    def send(self, data: bytes, now: int) -> int:
        """Send what fits the guest's window; how many bytes that was."""
        if self.phase is not Phase.OPEN or self._fin is not Fin.NONE:
            return 0
        room = self._peer_window - len(self._unacked)
        data = data[: max(room, 0)]
        if not data:
            return 0
        self._emit_data(data, self._next)
        self._unacked += data
        self._next = self._next + len(data) & mask(32)
        if self.deadline is None:
            self.deadline = now + _RETRY_NS
        return len(data)

    def finish(self, now: int) -> None:
        """End our direction."""
        if self.phase is Phase.OPEN and self._fin is Fin.NONE:
            self._fin = Fin.SENT
            self._emit(TcpFlag.FIN | _ACK, self._next)
            self._next = self._next + 1 & mask(32)
            if self.deadline is None:
                self.deadline = now + _RETRY_NS

    def close(self, now: int) -> None:
        """End our direction; the guest's must end soon."""
        self._closing = True
        self.finish(now)
        self._settle(now)

    def reset(self) -> None:
        """Break off."""
        if self.phase is not Phase.CLOSED:
            self._emit(TcpFlag.RST | _ACK, self._next)
            self._end(Close.OURS)

    def consumed(self, count: int) -> None:
        """The owner has done with ``count`` bytes of ``received``."""
        self._held -= count
        if self.phase is Phase.OPEN and _after(self._rcv_next + self._room, self._edge) >= WINDOW // 4:
            self._ack_due = True

    def flush(self) -> None:
        """Send an ACK that is due, when nothing else carried it."""
        if self._ack_due and self.phase is not Phase.CLOSED:
            self._emit(_ACK, self._next)

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        if self.deadline is None or now < self.deadline or self.phase is Phase.CLOSED:
            return
        if self._fin is Fin.ACKED:
            self.reset()
            return
        self._tries += 1
        if self._tries > _TRIES:
            self.reset()
            self.close_reason = Close.SILENT
        elif self.phase is not Phase.OPEN:
            self._emit_syn(now)
        else:
            self._recover = self._next
            self._emit_oldest()
            self.deadline = now + (_RETRY_NS << self._tries)

    # ---- the guest's side --------------------------------------------------------------------------------------

    def segment(self, segment: Segment, now: int) -> None:
        """A segment of the guest's (RFC 9293, 3.10.7.3 and 3.10.7.4)."""
        if self.phase is Phase.CLOSED:
            return
        if self.phase is Phase.SYN_SENT:
            if not self._answered(segment):
                return
        elif segment.flags & TcpFlag.RST:
            # One that is not exactly next may be an old or a forged one (RFC 5961).
            if segment.seq == self._rcv_next:
                self._end(Close.RESET)
            return
        elif segment.flags & TcpFlag.SYN:
            if self.phase is Phase.SYN_RECEIVED:
                self._emit_syn(now)
            else:
                self._ack_due = True
            return
        if not segment.flags & _ACK or not self._acknowledge(segment, now):
            return
        self.phase = Phase.OPEN
        self._take(segment)
        self._settle(now)

    # ---- inside ------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        return max(WINDOW - self._held, 0)

    def _learn(self, syn: Segment) -> None:
        self._rcv_next = syn.seq + 1 & mask(32)
        self._peer_window = syn.window
        self._peer_mss = min(max(syn.mss or _DEFAULT_MSS, _LEAST_MSS), self.mss)

    def _answered(self, segment: Segment) -> bool:
        """In SYN_SENT: whether our SYN was accepted. What does not acknowledge it is not for this connection."""
        if not segment.flags & _ACK or segment.ack != self._next:
            return False
        if segment.flags & TcpFlag.RST:
            self._end(Close.RESET)
            return False
        if not segment.flags & TcpFlag.SYN:
            return False
        self._learn(segment)
        self._ack_due = True
        return True

    def _acknowledge(self, segment: Segment, now: int) -> bool:
        """Whether the segment's acknowledgement is one that can be."""
        news = _after(segment.ack, self._una)
        if news < 0 or _after(segment.ack, self._next) > 0:
            self._ack_due = True
            return False
        if self.phase is Phase.SYN_RECEIVED and not news:
            return False
        self._peer_window = segment.window
        if news:
            if self.phase is Phase.OPEN:
                del self._unacked[:news]
            self._una = segment.ack
            self._tries = 0
            everything = self._una == self._next
            self.deadline = None if everything else now + _RETRY_NS
            if self._fin is Fin.SENT and everything:
                self._fin = Fin.ACKED
            if self._recover is not None:
                if _after(self._recover, self._una) > 0:
                    self._emit_oldest()
                else:
                    self._recover = None
        return True

    def _take(self, segment: Segment) -> None:
        """What is next in order; the rest is dropped and asked for again."""
        first = segment.seq + bool(segment.flags & TcpFlag.SYN)
        old = _after(self._rcv_next, first)
        payload = segment.payload
        fin = bool(segment.flags & TcpFlag.FIN)
        if not payload and not fin:
            # Window probes and keep-alives say nothing at an old place, to be answered.
            self._ack_due |= old != 0
            return
        self._ack_due = True
        if old < 0 or self.ended:
            return
        fresh = payload[old:]
        taken = fresh[: self._room]
        if taken:
            self.received.append(taken)
            self._held += len(taken)
            self._rcv_next = self._rcv_next + len(taken) & mask(32)
        if fin and len(taken) == len(fresh) and old <= len(payload):
            self.ended = True
            self._rcv_next = self._rcv_next + 1 & mask(32)

    def _settle(self, now: int) -> None:
        """What follows when our direction has ended."""
        if self.phase is not Phase.OPEN or self._fin is not Fin.ACKED:
            return
        if self.ended:
            self.flush()
            self._end(Close.ORDERLY)
        elif self._closing and self.deadline is None:
            self.deadline = now + _LINGER_NS

    def _end(self, reason: Close) -> None:
        self.phase = Phase.CLOSED
        self.close_reason = reason
        self.deadline = None

    def _emit_syn(self, now: int) -> None:
        flags = TcpFlag.SYN if self.phase is Phase.SYN_SENT else TcpFlag.SYN | _ACK
        self._emit(flags, self.isn, mss=self.mss)
        self.deadline = now + (_RETRY_NS << self._tries)

    def _emit_oldest(self) -> None:
        if self._unacked:
            self._emit_data(bytes(self._unacked[: self._peer_mss]), self._una)
        else:
            self._emit(TcpFlag.FIN | _ACK, self._una)

    def _emit_data(self, data: bytes, seq: int) -> None:
        for at in range(0, len(data), self._peer_mss):
            piece = data[at : at + self._peer_mss]
            last = at + len(piece) == len(data)
            self._emit(_ACK | TcpFlag.PSH if last else _ACK, seq + at & mask(32), piece)

    def _emit(self, flags: TcpFlag, seq: int, payload: bytes = b"", mss: int = 0) -> None:
        acks = bool(flags & _ACK)
        window = self._room
        self.outgoing.append(
            Segment(self.local_port, self.remote_port, seq, self._rcv_next if acks else 0, flags, window, payload, mss)
        )
        if acks:
            self._edge = self._rcv_next + window & mask(32)
            self._ack_due = False
