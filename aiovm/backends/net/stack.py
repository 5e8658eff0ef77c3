"""A network for one guest, in user mode: a card, and behind it a gateway that is the embedding program.

    net = UserNet(names={"db.internal": "10.0.2.2"})
    net.listen(5432, handler)                   # the guest connects to any address, port 5432
    reader, writer = await net.connect(22)      # somebody listens on port 22 in the guest

The network is 10.0.2.0/24 unless told otherwise: the gateway .2, DNS .3, the guest .15 (the addresses of QEMU's user
network). ARP, DHCP, DNS for ``names`` and ping are answered here; TCP goes to the handlers. Nothing leaves the program.

Rules: frames wait in the guest's ring while many wait here, and here while the guest offers no buffers; TCP windows
follow what a handler has read. The guest's packets must come from its address.

Not modelled: other UDP, IPv6, fragments.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Final

from aiovm.backends.base import Doorbell
from aiovm.backends.net.dhcp import DHCP_CLIENT, DHCP_SERVER, Lease, answer_dhcp
from aiovm.backends.net.dns import DNS_PORT, answer_dns
from aiovm.backends.net.tcp import Close, Phase, TcpEndpoint, reset_for
from aiovm.backends.net.wire import (
    ARP,
    BROADCAST,
    ICMP,
    IPV4,
    TCP,
    UDP,
    Arp,
    Datagram,
    Frame,
    Packet,
    Segment,
    TcpFlag,
    checksum,
    parse_arp,
    parse_datagram,
    parse_frame,
    parse_packet,
    parse_segment,
)
from aiovm.backends.stream import open_stream, start_handler
from aiovm.bits import mask
from aiovm.clock import FOREVER, Timer
from aiovm.devices.virtio.net import VirtioNet
from aiovm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiovm.backends.base import BackedMachine
    from aiovm.backends.stream import GuestTransport, Handler, Streams
    from aiovm.irq import IrqLine

__all__ = ["UserNet"]

_MAC: Final = bytes.fromhex("525400123456")
_MOST_FRAMES: Final = 256
_MOST_CONNECTIONS: Final = 1024
_FIRST_PORT: Final = 0xC000
_NOWHERE: Final = IPv4Address(0)
_EVERYWHERE: Final = IPv4Address(0xFFFF_FFFF)

#: (our address, our port, the guest's port)
Name = tuple[IPv4Address, int, int]


@dataclass(slots=True)
class _Connection:
    """One connection as a :class:`~aiovm.backends.stream.Link`; without a transport until it is open."""

    net: UserNet
    endpoint: TcpEndpoint
    handler: Handler | None = None
    calling: asyncio.Future[Streams] | None = None
    transport: GuestTransport | None = None

    def send(self, data: bytes) -> int:
        return 0 if self.net.congested else self.endpoint.send(data, self.net.now)

    def finish(self) -> None:
        self.endpoint.finish(self.net.now)

    def close(self) -> None:
        self.endpoint.close(self.net.now)

    def reset(self) -> None:
        self.endpoint.reset()

    def consumed(self, count: int) -> None:
        self.endpoint.consumed(count)


class UserNet:
    """The network. ``mac``: the guest's card. ``names``: what DNS knows, besides ``gateway``."""

    def __init__(
        self,
        *,
        network: str = "10.0.2.0/24",
        mac: bytes = _MAC,
        mtu: int = 1500,
        names: Mapping[str, str] | None = None,
        latency_ns: int = 0,
    ) -> None:
        try:
            self._network = IPv4Network(network)
            known = {name.lower().rstrip("."): str(IPv4Address(to)) for name, to in (names or {}).items()}
        except ValueError as error:
            raise ConfigError(f"network: {error}") from error
        if self._network.num_addresses < 32:
            raise ConfigError(f"network {network} has fewer than 32 addresses")
        base = self._network.network_address
        self.gateway, self.dns, self.guest = base + 2, base + 3, base + 15
        self._names = {"gateway": str(self.gateway), **known}
        # QEMU's user network makes its gateway's address so.
        self._gateway_mac = b"\x52\x55" + self.gateway.packed
        self._mac, self._mtu = mac, mtu
        self._lease = Lease(mac, self.guest, self._network.netmask, self.gateway, self.dns, mtu)
        self._latency_ns = latency_ns
        self._device: VirtioNet | None = None
        self._handlers: dict[tuple[IPv4Address | None, int], Handler] = {}
        self._connections: dict[Name, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._from_guest: deque[bytes] = deque()
        self._to_guest: deque[bytes] = deque()
        self._timer: Timer | None = None
        self._timer_at = FOREVER
        self._next_port = _FIRST_PORT

    # ---- the program's side ------------------------------------------------------------------------------------

    def listen(self, port: int, handler: Handler, *, host: str | None = None) -> None:
        """Serve the guest's connections to ``port`` of the address ``host``, or of every address."""
        key = (None if host is None else IPv4Address(host), port)
        if key in self._handlers or not 0 < port < 1 << 16:
            raise ConfigError(f"TCP port {port} is taken or no port")
        self._handlers[key] = handler

    async def connect(self, port: int) -> Streams:
        """Connect to ``port`` of the guest; ``ConnectionRefusedError`` when nobody listens there or answers."""
        if self._device is None:
            raise StateError("the network has no machine yet")
        if not 0 < port < 1 << 16:
            raise ConfigError(f"TCP port {port} is no port")
        name = self._free_name(port)
        future: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        connection = _Connection(self, self._endpoint(name), calling=future)
        self._connections[name] = connection
        self._machine.call_at(self.now, lambda: self._call(connection))
        try:
            return await future
        finally:
            if connection.transport is None:
                connection.endpoint.reset()
                self._bell.ring()

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioNet:
        """Make the device."""
        if self._device is not None:
            raise StateError("the network is attached already")
        self._machine = machine
        self._bell = Doorbell(machine, self._service, latency_ns=self._latency_ns)
        self._device = VirtioNet(
            machine.memory, irq, self._transmitted, mac=self._mac, mtu=self._mtu, on_room=self._bell.ring
        )
        return self._device

    async def aclose(self) -> None:
        """Break every connection off and end the handlers."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in tuple(self._connections.values()):
            self._lose(connection, ConnectionResetError("the machine is gone"))
        self._connections.clear()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- for connections ---------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The machine's time, ns."""
        return self._machine.clock.now()

    @property
    def congested(self) -> bool:
        """Many frames wait for the guest to offer buffers."""
        return len(self._to_guest) >= _MOST_FRAMES

    # ---- frames ------------------------------------------------------------------------------------------------

    def _transmitted(self, frame: bytes) -> bool:
        """In the guest's slice: a frame is taken while there is room."""
        self._bell.ring()
        if len(self._from_guest) >= _MOST_FRAMES:
            return False
        self._from_guest.append(frame)
        return True

    def _service(self) -> None:
        device = self._device
        if device is None:
            return
        self._deliver(device)
        while self._from_guest and not self.congested:
            frame = parse_frame(self._from_guest.popleft())
            if frame is not None and frame.dst in (self._gateway_mac, BROADCAST):
                self._handle_frame(frame)
            if not self._from_guest:
                device.drain()
        now = self.now
        for name, connection in tuple(self._connections.items()):
            self._serve(name, connection, now)
        self._deliver(device)
        self._arm()

    def _deliver(self, device: VirtioNet) -> None:
        while self._to_guest and device.receive(self._to_guest[0]):
            self._to_guest.popleft()

    def _arm(self) -> None:
        deadlines = (c.endpoint.deadline for c in self._connections.values())
        deadline = min((d for d in deadlines if d is not None), default=FOREVER)
        if deadline == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = None if deadline == FOREVER else self._machine.call_at(deadline, self._due)

    def _due(self) -> None:
        self._timer, self._timer_at = None, FOREVER
        self._service()

    def _put(self, packet: Packet, mac: bytes | None = None) -> None:
        self._to_guest.append(Frame(mac or self._mac, self._gateway_mac, IPV4, packet.pack()).pack())

    def _is_ours(self, address: IPv4Address) -> bool:
        return address in self._network and address != self.guest

    def _handle_frame(self, frame: Frame) -> None:
        if frame.kind == ARP:
            arp = parse_arp(frame.payload)
            if arp is not None and arp.op == 1 and self._is_ours(arp.target) and arp.target != arp.sender:
                answer = Arp(2, self._gateway_mac, arp.target, arp.sender_mac, arp.sender)
                self._to_guest.append(Frame(self._mac, self._gateway_mac, ARP, answer.pack()).pack())
        elif frame.kind == IPV4:
            packet = parse_packet(frame.payload)
            if packet is not None:
                self._handle_packet(packet)

    def _handle_packet(self, packet: Packet) -> None:
        if packet.protocol == UDP:
            datagram = parse_datagram(packet)
            if datagram is not None:
                self._handle_datagram(packet, datagram)
        elif packet.src != self.guest:
            return
        elif packet.protocol == TCP:
            segment = parse_segment(packet)
            if segment is not None:
                self._handle_segment(packet.dst, segment)
        elif packet.protocol == ICMP and self._is_ours(packet.dst):
            data = packet.payload
            if len(data) >= 8 and data[:2] == b"\x08\x00" and not checksum(data):
                body = bytes(4) + data[4:]
                body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
                self._put(Packet(packet.dst, packet.src, ICMP, body))

    def _handle_datagram(self, packet: Packet, datagram: Datagram) -> None:
        if datagram.dst_port == DHCP_SERVER and packet.dst in (_EVERYWHERE, self.gateway):
            answer = answer_dhcp(datagram.payload, self._lease)
            if answer is not None:
                reply = Datagram(DHCP_SERVER, DHCP_CLIENT, answer)
                self._put(reply.packet(self.gateway, _EVERYWHERE), BROADCAST)
        elif datagram.dst_port == DNS_PORT and packet.dst == self.dns and packet.src == self.guest:
            answer = answer_dns(datagram.payload, self._names)
            if answer is not None:
                self._put(Datagram(DNS_PORT, datagram.src_port, answer).packet(self.dns, self.guest))

    # ---- TCP ---------------------------------------------------------------------------------------------------

    def _endpoint(self, name: Name) -> TcpEndpoint:
        _, port, guest_port = name
        # A number for each 4 µs, so that a new connection does not meet segments of an old one (RFC 9293, 3.4.1).
        return TcpEndpoint(port, guest_port, self.now // 4_000 & mask(32), self._mtu - 40)

    def _free_name(self, port: int) -> Name:
        for _ in range(_FIRST_PORT, 1 << 16):
            name = (self.gateway, self._next_port, port)
            self._next_port = max((self._next_port + 1) & mask(16), _FIRST_PORT)
            if name not in self._connections:
                return name
        raise StateError(f"every port to the guest's port {port} is in use")

    def _call(self, connection: _Connection) -> None:
        if connection.endpoint.phase is Phase.SYN_SENT:
            connection.endpoint.connect(self.now)
        self._service()

    def _handle_segment(self, address: IPv4Address, segment: Segment) -> None:
        name = (address, segment.dst_port, segment.src_port)
        connection = self._connections.get(name)
        if connection is not None:
            connection.endpoint.segment(segment, self.now)
        elif not self._accepted(name, segment):
            answer = reset_for(segment)
            if answer is not None:
                self._put(answer.packet(address, self.guest))

    def _accepted(self, name: Name, segment: Segment) -> bool:
        """Whether ``segment`` begins a connection that somebody serves."""
        address, port, _ = name
        handler = self._handlers.get((address, port)) or self._handlers.get((None, port))
        kinds = TcpFlag.SYN | TcpFlag.ACK | TcpFlag.RST
        if handler is None or segment.flags & kinds != TcpFlag.SYN or len(self._connections) >= _MOST_CONNECTIONS:
            return False
        connection = _Connection(self, self._endpoint(name), handler)
        connection.endpoint.accept(segment, self.now)
        self._connections[name] = connection
        return True

    def _serve(self, name: Name, connection: _Connection, now: int) -> None:
        """Move what can move on one connection."""
        endpoint = connection.endpoint
        endpoint.advance(now)
        if endpoint.phase is Phase.OPEN and connection.transport is None:
            self._open(name, connection)
        transport = connection.transport
        if transport is not None:
            while endpoint.received:
                transport.deliver(endpoint.received.pop(0))
            if endpoint.ended:
                transport.deliver_eof()
            transport.pump(connection)
        endpoint.flush()
        for segment in endpoint.outgoing:
            self._put(segment.packet(name[0], self.guest))
        endpoint.outgoing.clear()
        if endpoint.phase is Phase.CLOSED:
            del self._connections[name]
            reason = endpoint.close_reason
            orderly = reason in (None, Close.ORDERLY, Close.OURS)
            self._lose(connection, None if orderly or reason is None else ConnectionResetError(reason.value))

    def _open(self, name: Name, connection: _Connection) -> None:
        address, port, guest_port = name
        extra: dict[str, object] = {"peername": (str(self.guest), guest_port), "sockname": (str(address), port)}
        reader, writer, connection.transport = open_stream(self._bell.ring, extra)
        if connection.handler is not None:
            start_handler(connection.handler, (reader, writer), self._tasks)
        elif connection.calling is not None and not connection.calling.done():
            connection.calling.set_result((reader, writer))
        else:
            connection.transport.abort()

    def _lose(self, connection: _Connection, error: Exception | None) -> None:
        if connection.transport is not None:
            connection.transport.lost(error)
        elif connection.calling is not None and not connection.calling.done():
            connection.calling.set_exception(ConnectionRefusedError("the guest refused the connection"))
