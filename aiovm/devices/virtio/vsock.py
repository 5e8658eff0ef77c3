"""The virtio socket device: stream connections between guest and host (Virtio 1.2, 5.10).

A connection is named by (host port, guest port). What the guest does becomes a :class:`VsockEvent`. ``on_news`` is
called when there are some, and when the guest may have made room; the host takes the events with
:meth:`VirtioVsock.next_event` and sends what it has left.

    REQUESTED --accept--> OPEN <--RESPONSE-- CONNECTING
        '------- RST, both sides shut down ----> gone

Rules: payload flows by credit. A side has announced ``buf_alloc`` bytes of room and how many it has forwarded
(``fwd_cnt``); the other sends no more than is free, or is reset. Answers that find no receive buffer wait here. While
many of them wait, or many events, nothing is taken from the transmit queue. A packet shorter than it says breaks the
device.

Modelled: stream sockets, half-close, credit, transport reset. Not modelled: sequenced packets, other guests as peers
(a packet to any context but the host's is answered with RST).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.bits import mask
from aiovm.devices.virtio.transport import TransportState, VirtioDevice
from aiovm.devices.virtio.vsock_packet import (
    HEADER_BYTES,
    HOST_CID,
    MAX_PAYLOAD,
    STREAM,
    Packet,
    Shutdown,
    VsockOp,
)
from aiovm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["EventKind", "Key", "Link", "LinkState", "VirtioVsock", "VsockEvent", "VsockState"]

_RECEIVE: Final = 0
_TRANSMIT: Final = 1
_EVENTS: Final = 2

#: Room that the host announces for each connection.
_WINDOW: Final = 0x4_0000
_MOST_LINKS: Final = 1024
_MOST_WAITING: Final = 256
_MOST_EVENTS: Final = 256


class Key(NamedTuple):
    """A connection's name."""

    host_port: int
    guest_port: int


class EventKind(enum.Enum):
    """What the guest did."""

    REQUEST = "request"
    CONNECTED = "connected"
    DATA = "data"
    SHUTDOWN = "shutdown"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class VsockEvent:
    """``data`` comes with DATA, ``flags`` with SHUTDOWN. After CLOSED the connection is gone."""

    kind: EventKind
    key: Key
    data: bytes = b""
    flags: Shutdown = Shutdown.NONE


class LinkState(enum.Enum):
    """Where a connection is in its life."""

    REQUESTED = "requested"
    CONNECTING = "connecting"
    OPEN = "open"


@dataclass(slots=True)
class Link:
    """One connection; counters run freely over 32 bits. ``told``: the last ``forwarded`` that the guest knows."""

    state: LinkState
    peer_alloc: int = 0
    peer_forwarded: int = 0
    sent: int = 0
    received: int = 0
    forwarded: int = 0
    told: int = 0
    peer_shut: Shutdown = Shutdown.NONE
    shut: Shutdown = Shutdown.NONE

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        free = (self.peer_alloc - (self.sent - self.peer_forwarded & mask(32))) & mask(32)
        return free if free <= self.peer_alloc else 0


@dataclass(slots=True)
class VsockState:
    """Connections, what the host has not taken, and answers that wait for a buffer."""

    transport: TransportState
    links: dict[Key, Link] = field(default_factory=dict)
    events: list[VsockEvent] = field(default_factory=list)
    waiting: list[bytes] = field(default_factory=list)


class VirtioVsock(VirtioDevice):
    """One guest's socket device. ``cid``: its context id, 3 or more."""

    def __init__(self, memory: GuestMemory, irq: IrqLine, *, cid: int, on_news: Callable[[], None]) -> None:
        if not HOST_CID < cid < mask(32):
            raise ConfigError(f"context id {cid:#x} is not in 0x3 to 0xfffffffe")
        super().__init__(memory, irq, device_id=19, queues=(128, 128, 16))
        self._cid = cid
        self._on_news = on_news
        self._s = VsockState(self._t)

    # ---- host side ---------------------------------------------------------------------------------------------

    def next_event(self) -> VsockEvent | None:
        """Take the oldest event."""
        if not self._s.events:
            self._take_packets()
        return self._s.events.pop(0) if self._s.events else None

    def connect(self, key: Key) -> None:
        """Ask the guest for a connection; CONNECTED or CLOSED follows."""
        if key in self._s.links:
            raise StateError(f"vsock {key} is in use")
        self._s.links[key] = Link(LinkState.CONNECTING)
        self._reply(key, VsockOp.REQUEST)

    def accept(self, key: Key) -> None:
        """Say yes to a REQUEST; nothing when the guest has given up meanwhile."""
        link = self._s.links.get(key)
        if link is not None and link.state is LinkState.REQUESTED:
            link.state = LinkState.OPEN
            self._reply(key, VsockOp.RESPONSE)

    def send(self, key: Key, data: bytes) -> int:
        """Send what fits the guest's credit and buffers; how many bytes that was."""
        link = self._s.links.get(key)
        if link is None or link.state is not LinkState.OPEN or link.peer_shut & Shutdown.RECEIVE:
            return 0
        done = 0
        while not self._s.waiting and (most := min(len(data) - done, link.credit, MAX_PAYLOAD)) > 0:
            chain = self._pop(_RECEIVE, 0)
            if chain is None:
                break
            payload = data[done : done + min(most, max(chain.room - HEADER_BYTES, 0))]
            link.sent = (link.sent + len(payload)) & mask(32)
            self._push(_RECEIVE, chain, self._packet(key, VsockOp.RW, payload=payload))
            done += len(payload)
        return done

    def consumed(self, key: Key, count: int) -> None:
        """The host has done with ``count`` bytes of DATA: the guest may send as many more."""
        link = self._s.links.get(key)
        if link is None:
            return
        link.forwarded = (link.forwarded + count) & mask(32)
        if (link.forwarded - link.told) & mask(32) >= _WINDOW // 4:
            self._reply(key, VsockOp.CREDIT_UPDATE)

    def shutdown(self, key: Key, flags: Shutdown) -> None:
        """The host will receive, or send, nothing more."""
        link = self._s.links.get(key)
        if link is not None:
            link.shut |= flags
            self._reply(key, VsockOp.SHUTDOWN, flags=link.shut)

    def reset_link(self, key: Key) -> None:
        """Break a connection off, or say no to a REQUEST."""
        if key in self._s.links:
            self._reply(key, VsockOp.RST)
            del self._s.links[key]

    def reset_all(self) -> None:
        """Tell the guest that every connection is gone, as after a move to another host (5.10.6.7)."""
        self._s.links.clear()
        self._s.events.clear()
        self._s.waiting.clear()
        chain = self._pop(_EVENTS, 0)
        if chain is not None:
            self._push(_EVENTS, chain, bytes(4))

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> VsockState:
        """A copy of the state."""
        return self._copy(self._s, self._save_transport())

    def restore(self, state: VsockState) -> None:
        """Take over a copy of ``state``."""
        self._restore_transport(state.transport)
        self._s = self._copy(state, self._t)

    def reset(self) -> None:
        """The power-on state. Connections that were there are told to the host as closed."""
        closed = [VsockEvent(EventKind.CLOSED, key) for key in self._s.links]
        self._reset_transport()
        self._s = VsockState(self._t, events=closed)
        if closed:
            self._on_news()

    # ---- inside ------------------------------------------------------------------------------------------------

    @staticmethod
    def _copy(state: VsockState, transport: TransportState) -> VsockState:
        links = {key: replace(link) for key, link in state.links.items()}
        return VsockState(transport, links, state.events.copy(), state.waiting.copy())

    def _notified(self, queue: int) -> None:
        if queue == _RECEIVE:
            self._flush()
            self._on_news()
        if queue != _EVENTS:
            self._take_packets()

    def _take_packets(self) -> None:
        while len(self._s.waiting) < _MOST_WAITING and len(self._s.events) < _MOST_EVENTS:
            chain = self._pop(_TRANSMIT, MAX_PAYLOAD + HEADER_BYTES)
            if chain is None:
                return
            packet = Packet.unpack(chain.data)
            if packet is None:
                self._break(f"queue 1: {len(chain.data)} bytes are shorter than their packet")
                return
            self._push(_TRANSMIT, chain)
            if packet.src_cid == self._cid:
                self._handle(packet)

    def _handle(self, packet: Packet) -> None:
        key = Key(packet.dst_port, packet.src_port)
        link = self._s.links.get(key)
        if packet.dst_cid != HOST_CID or packet.type != STREAM:
            if packet.op != VsockOp.RST:
                self._enqueue(self._packet(key, VsockOp.RST, src_cid=packet.dst_cid, type_=packet.type))
            return
        if link is None:
            if packet.op == VsockOp.REQUEST and len(self._s.links) < _MOST_LINKS:
                self._s.links[key] = Link(
                    LinkState.REQUESTED, peer_alloc=packet.buf_alloc, peer_forwarded=packet.fwd_cnt
                )
                self._tell(EventKind.REQUEST, key)
            elif packet.op != VsockOp.RST:
                self._reply(key, VsockOp.RST)
            return
        link.peer_alloc, link.peer_forwarded = packet.buf_alloc, packet.fwd_cnt
        match packet.op:
            case VsockOp.RESPONSE if link.state is LinkState.CONNECTING:
                link.state = LinkState.OPEN
                self._tell(EventKind.CONNECTED, key)
            case VsockOp.RW if self._may_send(link, len(packet.payload)):
                link.received = (link.received + len(packet.payload)) & mask(32)
                if packet.payload:
                    self._tell(EventKind.DATA, key, packet.payload)
            case VsockOp.CREDIT_UPDATE:
                self._on_news()
            case VsockOp.CREDIT_REQUEST:
                self._reply(key, VsockOp.CREDIT_UPDATE)
            case VsockOp.SHUTDOWN if link.state is LinkState.OPEN:
                link.peer_shut |= Shutdown(packet.flags & 3)
                self._tell(EventKind.SHUTDOWN, key, flags=link.peer_shut)
                if link.peer_shut is Shutdown.BOTH:
                    self._close(key, answer=True)
            case _:
                # RST, or what has no place in this state.
                self._close(key, answer=packet.op != VsockOp.RST)

    def _may_send(self, link: Link, length: int) -> bool:
        held = (link.received - link.forwarded) & mask(32)
        return link.state is LinkState.OPEN and not link.peer_shut & Shutdown.SEND and held + length <= _WINDOW

    def _close(self, key: Key, *, answer: bool) -> None:
        if answer:
            self._reply(key, VsockOp.RST)
        del self._s.links[key]
        self._tell(EventKind.CLOSED, key)

    def _tell(self, kind: EventKind, key: Key, data: bytes = b"", flags: Shutdown = Shutdown.NONE) -> None:
        self._s.events.append(VsockEvent(kind, key, data, flags))
        self._on_news()

    def _reply(self, key: Key, op: VsockOp, *, flags: int = 0) -> None:
        self._enqueue(self._packet(key, op, flags=flags))

    def _packet(
        self,
        key: Key,
        op: VsockOp,
        *,
        flags: int = 0,
        payload: bytes = b"",
        src_cid: int = HOST_CID,
        type_: int = STREAM,
    ) -> bytes:
        link = self._s.links.get(key)
        if link is not None:
            link.told = link.forwarded
        return Packet(
            src_cid=src_cid,
            dst_cid=self._cid,
            src_port=key.host_port,
            dst_port=key.guest_port,
            type=type_,
            op=op,
            flags=flags,
            buf_alloc=_WINDOW if link is not None else 0,
            fwd_cnt=link.forwarded if link is not None else 0,
            payload=payload,
        ).pack()

    def _enqueue(self, packet: bytes) -> None:
        self._s.waiting.append(packet)
        self._flush()

    def _flush(self) -> None:
        waiting = self._s.waiting
        while waiting:
            chain = self._pop(_RECEIVE, 0)
            if chain is None:
                return
            self._push(_RECEIVE, chain, waiting.pop(0))

    def _config(self) -> bytes:
        return self._cid.to_bytes(8, "little")
