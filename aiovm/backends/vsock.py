"""The guest's sockets (AF_VSOCK) as asyncio streams.

    vsock = Vsock()
    vsock.listen(5000, handler)                 # the guest connects to context 2, port 5000
    reader, writer = await vsock.connect(22)    # somebody listens on port 22 in the guest

Rules: a handler is a coroutine of (reader, writer), as for ``asyncio.start_server``; when it returns, the connection is
closed. The credit that the guest gets follows what the reader has taken. A connection that the guest does not finish
within eight seconds of the host's close is reset (Linux' VSOCK_CLOSE_TIMEOUT, net/vmw_vsock/virtio_transport_common.c).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm.backends.base import Doorbell
from aiovm.backends.stream import open_stream, start_handler
from aiovm.devices.virtio.vsock import EventKind, Key, VirtioVsock, VsockEvent
from aiovm.devices.virtio.vsock_packet import Shutdown
from aiovm.errors import ConfigError, StateError
from aiovm.units import SEC

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.backends.base import BackedMachine
    from aiovm.backends.stream import GuestTransport, Handler, Streams
    from aiovm.clock import Timer
    from aiovm.irq import IrqLine

__all__ = ["Vsock"]

_CLOSE_TIMEOUT_NS: Final = 8 * SEC
#: The host's own ports begin here, away from those that people listen on.
_FIRST_PORT: Final = 1 << 30


@dataclass(slots=True)
class _Connection:
    """One connection as a :class:`~aiovm.backends.stream.Link`."""

    device: VirtioVsock
    machine: BackedMachine
    key: Key
    transport: GuestTransport
    closing: Timer | None = None
    orderly: bool = False

    def send(self, data: bytes) -> int:
        return self.device.send(self.key, data)

    def finish(self) -> None:
        self.device.shutdown(self.key, Shutdown.SEND)

    def close(self) -> None:
        self.orderly = True
        self.device.shutdown(self.key, Shutdown.BOTH)
        self.closing = self.machine.call_at(self.machine.clock.now() + _CLOSE_TIMEOUT_NS, self.give_up)

    def give_up(self) -> None:
        self.reset()
        self.transport.lost(None)

    def reset(self) -> None:
        self.device.reset_link(self.key)

    def consumed(self, count: int) -> None:
        self.device.consumed(self.key, count)


class Vsock:
    """The sockets of one guest. ``cid``: its context id."""

    def __init__(self, *, cid: int = 3, latency_ns: int = 0) -> None:
        self._cid = cid
        self._latency_ns = latency_ns
        self._device: VirtioVsock | None = None
        self._handlers: dict[int, Handler] = {}
        self._open: dict[Key, _Connection] = {}
        self._calling: dict[Key, asyncio.Future[Streams]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_port = _FIRST_PORT

    def listen(self, port: int, handler: Handler) -> None:
        """Serve the guest's connections to ``port``."""
        if port in self._handlers or not 0 <= port < 1 << 32:
            raise ConfigError(f"vsock port {port:#x} is taken or no port")
        self._handlers[port] = handler

    def unlisten(self, port: int) -> None:
        """Serve no new connections."""
        if self._handlers.pop(port, None) is None:
            raise ConfigError(f"nobody listens on vsock port {port:#x}")

    async def connect(self, port: int) -> Streams:
        """Connect to ``port`` in the guest; ``ConnectionRefusedError`` when nobody listens there."""
        if self._device is None:
            raise StateError("the sockets have no machine yet")
        key = Key(self._next_port, port)
        self._next_port += 1
        future: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        self._calling[key] = future
        self._at_once(lambda device: device.connect(key))
        try:
            return await future
        finally:
            if self._calling.pop(key, None) is not None:
                self._at_once(lambda device: device.reset_link(key))

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioVsock:
        """Make the device."""
        if self._device is not None:
            raise StateError("the sockets are attached already")
        self._machine = machine
        self._bell = Doorbell(machine, self._service, latency_ns=self._latency_ns)
        self._device = VirtioVsock(machine.memory, irq, cid=self._cid, on_news=self._bell.ring)
        return self._device

    async def aclose(self) -> None:
        """Break every connection off and end the handlers."""
        for key, connection in tuple(self._open.items()):
            self._lose(key, connection, ConnectionResetError("the machine is gone"))
        for future in self._calling.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the machine is gone"))
        self._calling.clear()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _at_once(self, call: Callable[[VirtioVsock], None]) -> None:
        """Do something to the device while no slice runs."""
        device = self._device
        if device is not None:
            self._machine.call_at(self._machine.clock.now(), lambda: call(device))

    def _service(self) -> None:
        device = self._device
        if device is None:
            return
        while (event := device.next_event()) is not None:
            self._handle(device, event)
        for key, connection in tuple(self._open.items()):
            connection.transport.pump(connection)
            if connection.transport.is_over:
                self._forget(key, connection)

    def _handle(self, device: VirtioVsock, event: VsockEvent) -> None:
        key = event.key
        connection = self._open.get(key)
        match event.kind:
            case EventKind.REQUEST:
                handler = self._handlers.get(key.host_port)
                if handler is None:
                    device.reset_link(key)
                else:
                    device.accept(key)
                    start_handler(handler, self._connected(device, key), self._tasks)
            case EventKind.CONNECTED:
                future = self._calling.pop(key, None)
                if future is None or future.done():
                    device.reset_link(key)
                else:
                    future.set_result(self._connected(device, key))
            case EventKind.CLOSED if connection is not None:
                error = None if connection.orderly else ConnectionResetError("the guest reset the connection")
                self._lose(key, connection, error)
            case EventKind.CLOSED:
                future = self._calling.pop(key, None)
                if future is not None and not future.done():
                    future.set_exception(ConnectionRefusedError(f"nobody listens on vsock port {key.guest_port:#x}"))
            case EventKind.DATA if connection is not None:
                connection.transport.deliver(event.data)
            case EventKind.SHUTDOWN if connection is not None:
                if event.flags & Shutdown.SEND:
                    connection.transport.deliver_eof()
                connection.orderly |= event.flags is Shutdown.BOTH

    def _connected(self, device: VirtioVsock, key: Key) -> Streams:
        extra: dict[str, object] = {"peername": (self._cid, key.guest_port), "sockname": (2, key.host_port)}
        reader, writer, transport = open_stream(self._bell.ring, extra)
        self._open[key] = _Connection(device, self._machine, key, transport)
        return reader, writer

    def _lose(self, key: Key, connection: _Connection, error: Exception | None) -> None:
        connection.transport.lost(error)
        self._forget(key, connection)

    def _forget(self, key: Key, connection: _Connection) -> None:
        """The connection is gone; what the reader has not taken yet stays with the transport."""
        if connection.closing is not None:
            connection.closing.cancel()
        self._open.pop(key, None)
