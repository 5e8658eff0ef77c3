"""A virtio console as a pair of asyncio streams: what the guest prints is read, what is written is typed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.backends.base import Doorbell, from_tree, to_tree
from aiovm.backends.stream import open_stream
from aiovm.devices.virtio.console import ConsoleState, VirtioConsole
from aiovm.errors import StateError

if TYPE_CHECKING:
    from aiovm.backends.base import BackedMachine
    from aiovm.backends.stream import GuestTransport, Streams
    from aiovm.irq import IrqLine

__all__ = ["ConsolePort"]

#: What the guest may print before the program has to read.
_WINDOW: Final = 0x1_0000


class ConsolePort:
    """One console; ``/dev/hvc0`` to a Linux guest. ``columns`` and ``rows``: the window."""

    def __init__(self, *, columns: int = 80, rows: int = 25, latency_ns: int = 0) -> None:
        self._columns, self._rows = columns, rows
        self._latency_ns = latency_ns
        self._device: VirtioConsole | None = None
        self._streams: Streams | None = None
        self._transport: GuestTransport | None = None
        self._printed = bytearray()
        self._held = 0

    @property
    def streams(self) -> Streams:
        """(reader, writer), once the machine is made."""
        if self._streams is None:
            raise StateError("the console has no machine yet")
        return self._streams

    def resize(self, columns: int, rows: int) -> None:
        """The window has another size."""
        self._columns, self._rows = columns, rows
        if self._device is not None:
            self._machine.call_at(self._machine.clock.now(), self._resize)

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioConsole:
        """Make the device."""
        if self._device is not None:
            raise StateError("the console is attached already")
        self._machine = machine
        self._bell = Doorbell(machine, self._service, latency_ns=self._latency_ns)
        reader, writer, self._transport = open_stream(self._bell.ring)
        self._streams = reader, writer
        self._device = VirtioConsole(
            machine.memory, irq, self._print, on_room=self._bell.ring, columns=self._columns, rows=self._rows
        )
        return self._device

    async def aclose(self) -> None:
        """The reader sees the end."""
        if self._transport is not None:
            self._transport.deliver(bytes(self._printed))
            self._printed.clear()
            self._transport.lost(None)

    def save(self) -> object:
        """The device; what was printed has been delivered."""
        if self._device is None:
            raise StateError("the console has no machine yet")
        return to_tree(self._device.save())

    def restore(self, state: object) -> None:
        """Take over a saved state; the streams are new ones."""
        if self._device is None:
            raise StateError("the console has no machine yet")
        self._device.restore(from_tree(state, ConsoleState))

    # ---- Link --------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> int:
        """Type."""
        return 0 if self._device is None else self._device.feed(data)

    def finish(self) -> None:
        """A console has no end."""

    def close(self) -> None:
        """What the guest prints from now on is dropped."""

    def reset(self) -> None:
        """As :meth:`close`."""

    def consumed(self, count: int) -> None:
        """There is room again."""
        self._held -= count

    # ---- inside ------------------------------------------------------------------------------------------------

    def _print(self, data: bytes) -> int:
        taken = data[: max(_WINDOW - self._held, 0)]
        if taken:
            self._held += len(taken)
            self._printed += taken
            self._bell.ring()
        return len(taken)

    def _service(self) -> None:
        if self._transport is None or self._device is None:
            return
        while True:
            if self._printed:
                self._transport.deliver(bytes(self._printed))
                self._printed.clear()
            self._transport.pump(self)
            self._device.drain()
            if not self._printed:
                return

    def _resize(self) -> None:
        if self._device is not None:
            self._device.resize(self._columns, self._rows)
