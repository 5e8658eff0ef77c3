"""A byte stream whose far end is in the guest, as the pair of asyncio streams that the embedding program knows.

:class:`GuestTransport` is an asyncio transport. Towards the program it keeps asyncio's rules: writing beyond the high
water mark pauses ``drain()``, a reader that is not read pauses the transport. Towards the guest it speaks to a
:class:`Link` (a vsock connection, a TCP connection, a console), which takes what the guest has room for and is told
what the program has taken. So a slow program slows the guest, and a slow guest the program; neither fills the host.

:meth:`GuestTransport.pump` moves what can move; its owner calls it while no slice runs, whenever ``changed`` was called
or the guest has news.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from aiovm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["GuestTransport", "Handler", "Link", "Streams", "open_stream", "start_handler"]

_CHUNK: Final = 0x1_0000
_HIGH_WATER: Final = 0x1_0000

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Handler(Protocol):
    """What serves a connection: as for ``asyncio.start_server``."""

    def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, /) -> Awaitable[None]: ...


class Link(Protocol):
    """The guest's end. None of these waits."""

    def send(self, data: bytes) -> int:
        """Give the guest what it has room for; how many bytes that was."""

    def finish(self) -> None:
        """Nothing more will be sent."""

    def close(self) -> None:
        """Nothing more will be sent, and what comes is not read."""

    def reset(self) -> None:
        """Break off."""

    def consumed(self, count: int) -> None:
        """The program has taken ``count`` more bytes."""


class GuestTransport(asyncio.Transport):
    """One stream. ``changed()`` is called when the program did something that :meth:`pump` can act on."""

    def __init__(
        self, protocol: asyncio.BaseProtocol, changed: Callable[[], None], extra: dict[str, object] | None = None
    ) -> None:
        super().__init__(extra)
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._changed = changed
        self._out = bytearray()
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        self._writing_paused = False
        self._eof_wanted = self._eof_done = False
        self._closing = self._closed = False
        self._aborted = False
        self._in: list[bytes] = []
        self._reading = True
        self._consumed = 0
        self._eof_came = self._eof_told = False
        self._error: Exception | None = None
        self._is_lost = self._loss_told = False

    # ---- the program's side: asyncio.Transport -------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing or self._is_lost

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            if self._is_lost:
                # Nobody pumps any more; what came before the end is still delivered.
                self._loop.call_soon(self._pump_in)
            else:
                self._changed()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high water {high} and low water {low}")
        self._high, self._low = high, low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return len(self._out)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._eof_wanted:
            raise StateError("write after write_eof")
        if self.is_closing():
            return
        self._out += data
        if len(self._out) > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()
        self._changed()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._eof_wanted = True
        self._changed()

    def close(self) -> None:
        """What was written is still sent; what comes is not read any more."""
        self._closing = True
        self._changed()

    def abort(self) -> None:
        self._closing = self._aborted = True
        self._out.clear()
        self._changed()

    # ---- the guest's side ------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the connection is gone, at either end."""
        return self._is_lost

    def deliver(self, data: bytes) -> None:
        """The guest sent ``data``."""
        self._in.append(data)

    def deliver_eof(self) -> None:
        """The guest will send nothing more."""
        self._eof_came = True

    def lost(self, error: Exception | None) -> None:
        """The connection is gone and needs no :meth:`pump`; ``error`` is None when both sides had ended it."""
        self._is_lost = True
        self._error = error
        self._pump_in()

    def pump(self, link: Link) -> None:
        """Move what can move, both ways."""
        if self._is_lost:
            return
        self._pump_out(link)
        self._pump_in()
        if self._consumed and not self._is_lost:
            count, self._consumed = self._consumed, 0
            link.consumed(count)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _pump_out(self, link: Link) -> None:
        if self._aborted:
            link.reset()
            self.lost(None)
            return
        while self._out:
            sent = link.send(bytes(self._out[:_CHUNK]))
            if not sent:
                break
            del self._out[:sent]
        if self._writing_paused and len(self._out) <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()
        if self._out:
            return
        if self._closing and not self._closed:
            self._closed = True
            link.close()
        elif self._eof_wanted and not self._eof_done:
            self._eof_done = True
            link.finish()

    def _pump_in(self) -> None:
        protocol = self._protocol
        assert isinstance(protocol, asyncio.Protocol)
        while self._in and (self._reading or self._closing):
            data = self._in.pop(0)
            self._consumed += len(data)
            if not self._closing:
                protocol.data_received(data)
        if self._in and self._error is None:
            return
        if self._eof_came and not self._eof_told and not self._is_lost:
            self._eof_told = True
            if not self._closing:
                protocol.eof_received()
        if self._is_lost and not self._loss_told:
            self._loss_told = True
            protocol.connection_lost(self._error)


def open_stream(
    changed: Callable[[], None], extra: dict[str, object] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, GuestTransport]:
    """A pair of streams and the transport behind it, on the running loop."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = GuestTransport(protocol, changed, extra)
    protocol.connection_made(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop), transport


def start_handler(handler: Handler, streams: Streams, tasks: set[asyncio.Task[None]]) -> None:
    """Serve a connection in a task of ``tasks``. When the handler ends it is closed, when it fails it is reset."""
    reader, writer = streams
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        await handler(reader, writer)

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            writer.transport.abort()
        else:
            writer.close()
        if error is not None:
            loop.call_exception_handler(
                {"message": "a handler of a guest's connection failed", "exception": error, "task": task}
            )

    task = loop.create_task(serve())
    tasks.add(task)
    task.add_done_callback(ended)
