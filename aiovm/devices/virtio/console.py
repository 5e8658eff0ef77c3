"""The virtio console with one port (Virtio 1.2, 5.3).

Rules: what the guest sends goes to ``sink(data)``, which answers how many bytes it took; the rest waits in its buffer,
and the guest with it, until :meth:`VirtioConsole.drain` tries again. :meth:`VirtioConsole.feed` takes as many bytes as
the guest has offered room for; ``on_room`` is called whenever the guest has offered more.

Modelled: both queues, the window's size, emergency writes (given to the sink, lost when it takes nothing). Not
modelled: several ports and their control queues.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.virtio.queue import Chain  # noqa: TC001  (msgspec reads it)
from aiovm.devices.virtio.transport import TransportState, VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["ConsoleState", "VirtioConsole"]

_F_SIZE: Final = 1 << 0
_F_EMERG_WRITE: Final = 1 << 2
_EMERG_WR: Final = 8

_RECEIVE: Final = 0
_TRANSMIT: Final = 1
#: Ours: a message longer than this is no console output.
_LONGEST: Final = 1 << 20


@dataclass(slots=True)
class ConsoleState:
    """``sending``: the buffer under way and how much of it is out."""

    transport: TransportState
    columns: int
    rows: int
    sending: Chain | None = None
    sent: int = 0


class VirtioConsole(VirtioDevice):
    """One console."""

    def __init__(
        self,
        memory: GuestMemory,
        irq: IrqLine,
        sink: Callable[[bytes], int],
        *,
        on_room: Callable[[], None] | None = None,
        columns: int = 80,
        rows: int = 25,
    ) -> None:
        super().__init__(memory, irq, device_id=3, queues=(128, 128), features=_F_SIZE | _F_EMERG_WRITE)
        self._sink = sink
        self._on_room = on_room
        self._s = ConsoleState(self._t, columns, rows)

    # ---- host side ---------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Type ``data``; how many bytes the guest had room for."""
        done = 0
        while done < len(data):
            chain = self._pop(_RECEIVE, 0)
            if chain is None:
                break
            piece = data[done : done + chain.room]
            self._push(_RECEIVE, chain, piece)
            done += len(piece)
        return done

    def drain(self) -> None:
        """Offer what waits to the sink again."""
        s = self._s
        while True:
            if s.sending is None:
                s.sending = self._pop(_TRANSMIT, _LONGEST)
                s.sent = 0
                if s.sending is None:
                    return
            if s.sent < len(s.sending.data):
                s.sent += self._sink(s.sending.data[s.sent :])
                if s.sent < len(s.sending.data):
                    return
            chain, s.sending = s.sending, None
            self._push(_TRANSMIT, chain)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal's window has another size."""
        self._s.columns, self._s.rows = columns, rows
        self._config_changed()

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> ConsoleState:
        """A copy of the state."""
        return replace(self._s, transport=self._save_transport())

    def restore(self, state: ConsoleState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)
        self._restore_transport(state.transport)

    def reset(self) -> None:
        """The power-on state; the window keeps its size."""
        self._reset_transport()
        self._s = ConsoleState(self._t, self._s.columns, self._s.rows)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _notified(self, queue: int) -> None:
        if queue == _TRANSMIT:
            self.drain()
        elif self._on_room is not None:
            self._on_room()

    def _config(self) -> bytes:
        # Columns, rows, ports (one, since several are not offered) and the emergency register.
        return struct.pack("<HHII", self._s.columns & 0xFFFF, self._s.rows & 0xFFFF, 1, 0)

    def _write_config(self, offset: int, value: int) -> None:
        if offset == _EMERG_WR:
            self._sink(bytes((value & 0xFF,)))
