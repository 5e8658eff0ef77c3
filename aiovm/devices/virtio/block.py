"""The virtio block device with one queue (Virtio 1.2, 5.2).

A request is a header of 16 bytes (type, reserved, sector), data, and a status byte at the end of the writable part.

Rules: what needs the storage becomes a :class:`BlockRequest` for ``submit``; the host answers it later, in any order,
with :meth:`VirtioBlock.complete`. An answer to a request that a reset has ended is ignored. While 128 requests or
16 MiB are under way the rest waits in the ring. What can be refused without the storage (beyond the end, no whole
sectors, a write to a read-only device, an unknown type) is refused here. A request without a header or without room for
the status breaks the device.

Modelled: reads, writes, flushes, the id. Not modelled: discard, write zeroes, secure erase, several queues, zones.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiovm.devices.virtio.queue import Chain  # noqa: TC001  (msgspec reads it)
from aiovm.devices.virtio.transport import TransportState, VirtioDevice
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["SECTOR", "BlockOp", "BlockRequest", "BlockState", "BlockStatus", "VirtioBlock"]

#: The protocol's unit, whatever the storage's is.
SECTOR: Final = 512

_F_SIZE_MAX: Final = 1 << 1
_F_SEG_MAX: Final = 1 << 2
_F_RO: Final = 1 << 5
_F_FLUSH: Final = 1 << 9

_SEG_BYTES: Final = 0x1_0000
_SEGS: Final = 126
_MOST_BYTES: Final = _SEG_BYTES * _SEGS
_QUEUE: Final = 128
_UNDER_WAY: Final = 16 << 20
_HEADER = struct.Struct("<IIQ")
_ID_BYTES: Final = 20


class BlockOp(enum.IntEnum):
    """Request types (5.2.6); the last one never reaches the storage."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class BlockStatus(enum.IntEnum):
    """How a request ended."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """One request for the storage. ``data`` is to be written; ``length`` bytes are to be read."""

    token: int
    op: BlockOp
    sector: int
    data: bytes
    length: int


@dataclass(slots=True)
class BlockState:
    """``under_way``: the requests that the storage has not answered, oldest first."""

    transport: TransportState
    under_way: list[Chain] = field(default_factory=list)


class VirtioBlock(VirtioDevice):
    """One disk of ``sectors`` sectors. ``serial``: what the guest shows as its id."""

    def __init__(
        self,
        memory: GuestMemory,
        irq: IrqLine,
        submit: Callable[[BlockRequest], None],
        *,
        sectors: int,
        read_only: bool = False,
        serial: str = "aiovm",
    ) -> None:
        self._id = serial.encode("ascii", "replace")
        if len(self._id) > _ID_BYTES:
            raise ConfigError(f"disk id {serial!r} is longer than {_ID_BYTES} bytes")
        if not 0 <= sectors < 1 << 55:
            raise ConfigError(f"a disk of {sectors:#x} sectors")
        features = _F_SIZE_MAX | _F_SEG_MAX | _F_FLUSH | (_F_RO if read_only else 0)
        super().__init__(memory, irq, device_id=2, queues=(_QUEUE,), features=features)
        self._submit = submit
        self._sectors = sectors
        self._read_only = read_only
        #: Tokens are handles of the host, not the guest's state: never the same twice.
        self._next_token = 0
        self._requests: dict[int, Chain] = {}
        self._bytes = 0

    # ---- host side ---------------------------------------------------------------------------------------------

    def complete(self, token: int, status: BlockStatus, data: bytes = b"") -> None:
        """Answer a request; ``data`` is what was read."""
        chain = self._requests.pop(token, None)
        if chain is None:
            return
        self._bytes -= _weight(chain)
        self._answer(chain, status, data)
        self._notified(0)

    def set_capacity(self, sectors: int) -> None:
        """The storage has grown or shrunk."""
        self._sectors = sectors
        self._config_changed()

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> BlockState:
        """A copy of the state."""
        return BlockState(self._save_transport(), list(self._requests.values()))

    def restore(self, state: BlockState) -> None:
        """Take over a copy of ``state``; what was under way is submitted again."""
        self._restore_transport(state.transport)
        self._forget()
        for chain in state.under_way:
            self._begin(chain)

    def reset(self) -> None:
        """The power-on state; answers to what was under way will be ignored."""
        self._reset_transport()
        self._forget()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._requests = {}
        self._bytes = 0

    def _notified(self, queue: int) -> None:
        # A driver may offer a head again that it has not got back, so the ring's size alone bounds nothing.
        while self._bytes < _UNDER_WAY and len(self._requests) < _QUEUE:
            chain = self._pop(queue, _MOST_BYTES + _HEADER.size)
            if chain is None:
                return
            self._begin(chain)

    def _begin(self, chain: Chain) -> None:
        if len(chain.data) < _HEADER.size or not chain.room:
            self._break(f"queue 0: a request of {len(chain.data)} bytes with room for {chain.room}")
            return
        kind, _, sector = _HEADER.unpack_from(chain.data)
        data = chain.data[_HEADER.size :]
        room = chain.room - 1
        match kind:
            case BlockOp.IN if self._fits(sector, room):
                self._send(chain, BlockOp.IN, sector, b"", room)
            case BlockOp.OUT if self._fits(sector, len(data)) and not self._read_only:
                self._send(chain, BlockOp.OUT, sector, data, 0)
            case BlockOp.IN | BlockOp.OUT:
                self._answer(chain, BlockStatus.IOERR, b"")
            case BlockOp.FLUSH:
                self._send(chain, BlockOp.FLUSH, 0, b"", 0)
            case BlockOp.GET_ID:
                self._answer(chain, BlockStatus.OK, self._id.ljust(_ID_BYTES, b"\0")[:room])
            case _:
                self._answer(chain, BlockStatus.UNSUPP, b"")

    def _fits(self, sector: int, length: int) -> bool:
        return not length % SECTOR and length <= _MOST_BYTES and sector + length // SECTOR <= self._sectors

    def _send(self, chain: Chain, op: BlockOp, sector: int, data: bytes, length: int) -> None:
        token = self._next_token
        self._next_token += 1
        self._requests[token] = chain
        self._bytes += _weight(chain)
        self._submit(BlockRequest(token, op, sector, data, length))

    def _answer(self, chain: Chain, status: BlockStatus, data: bytes) -> None:
        self._push(0, chain, data, bytes((status,)))

    def _config(self) -> bytes:
        # Capacity, the largest segment, the most segments; the geometry that follows is not offered.
        return struct.pack("<QII", self._sectors, _SEG_BYTES, _SEGS)


def _weight(chain: Chain) -> int:
    """What a request costs the host while it is under way."""
    return len(chain.data) + min(chain.room, _MOST_BYTES)
