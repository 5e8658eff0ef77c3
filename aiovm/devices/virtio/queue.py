"""A split virtqueue, the device's side (Virtio 1.2, 2.7).

=================  =====================================  =========================
descriptor table   16 bytes each                          written by the driver
available ring     flags, idx, heads, used_event          written by the driver
used ring          flags, idx, (head, length) avail_event written by the device
=================  =====================================  =========================

Rules: what the driver wrote is checked where it is read. A chain that breaks the rules raises :class:`BadRing`, a ring
or buffer outside RAM :class:`~aiovm.memory.NoMemory`; both break the device, and nothing else. What a device may read
is copied when the chain is taken, up to a limit that the device names, so a :class:`Chain` is a value.

Modelled: indirect descriptors, event indices. Not modelled: packed rings, in-order use, ring reset. Ours: at most 1024
descriptors in an indirect table's chain (QEMU's limit; Linux may exceed the queue's size there); empty descriptors
are skipped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm.bits import mask

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["BadRing", "Chain", "Queue", "QueueState"]

_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_MAX_INDIRECT: Final = 1024
#: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes" (2.7.5).
_MAX_BYTES: Final = 1 << 32
_INDEX: Final = mask(16)


class BadRing(Exception):
    """The driver broke a rule of the ring."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A buffer that the driver offered: what it says, and the (address, length) pieces for the answer."""

    head: int
    data: bytes
    writable: tuple[tuple[int, int], ...]

    @property
    def room(self) -> int:
        """How many bytes the answer may have."""
        return sum(length for _, length in self.writable)


@dataclass(slots=True)
class QueueState:
    """Where the queue lies and how far both sides are; the indices run freely over 16 bits."""

    size: int
    ready: bool = False
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    next_avail: int = 0
    next_used: int = 0


class Queue:
    """One virtqueue of at most ``max_size`` descriptors. ``indirect`` and ``event_index``: what was negotiated."""

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self._memory = memory
        self.max_size = max_size
        self.indirect = False
        self.event_index = False
        self.s = QueueState(max_size)

    def resize(self, size: int) -> None:
        """The driver's choice of a size; a power of two up to the largest, else nothing happens (2.7)."""
        if 0 < size <= self.max_size and not size & (size - 1):
            self.s.size = size

    def enable(self, ready: bool) -> None:
        """QueueReady: a queue that is set up anew begins at its start."""
        s = self.s
        if ready and not s.ready:
            s.next_avail = s.next_used = 0
        s.ready = ready

    def pop(self, limit: int) -> Chain | None:
        """Take the next chain, of at most ``limit`` readable bytes; None when the driver offers none."""
        s = self.s
        waiting = (self._memory.read_u(s.driver + 2, 2) - s.next_avail) & _INDEX
        if waiting > s.size:
            raise BadRing(f"available index {waiting} ahead in a queue of {s.size}")
        if not waiting:
            if self.event_index:
                self._memory.write_u(s.device + 4 + 8 * s.size, 2, s.next_avail)
            return None
        head = self._memory.read_u(s.driver + 4 + 2 * (s.next_avail % s.size), 2)
        chain = self._walk(head, limit)
        s.next_avail = (s.next_avail + 1) & _INDEX
        return chain

    def push(self, chain: Chain, data: bytes = b"", tail: bytes = b"") -> bool:
        """Return ``chain`` with ``data`` at the start and ``tail`` at the end of its room; whether to interrupt.

        The used length is an underestimate when there is a gap between them, as the standard wants it (2.7.8).
        """
        s = self.s
        room = chain.room
        if len(data) + len(tail) > room:
            raise BadRing(f"{len(data) + len(tail)} bytes for a buffer of {room}")
        self._store(chain, 0, data)
        self._store(chain, room - len(tail), tail)
        written = room if len(data) + len(tail) == room else len(data)
        old = s.next_used
        self._memory.write(s.device + 4 + 8 * (old % s.size), _USED.pack(chain.head, written & mask(32)))
        s.next_used = (old + 1) & _INDEX
        self._memory.write_u(s.device + 2, 2, s.next_used)
        if self.event_index:
            return self._memory.read_u(s.driver + 4 + 2 * s.size, 2) == old
        return not self._memory.read_u(s.driver, 2) & _NO_INTERRUPT

    def _walk(self, head: int, limit: int) -> Chain:
        s = self.s
        table, entries, left = s.descriptors, s.size, s.size
        nested = False
        index = head
        readable: list[bytes] = []
        writable: list[tuple[int, int]] = []
        out = room = 0
        while True:
            if index >= entries:
                raise BadRing(f"descriptor {index} of a table of {entries}")
            if not left:
                raise BadRing(f"the chain at {head} is longer than its table or a loop")
            left -= 1
            address, length, flags, following = _DESCRIPTOR.unpack(self._memory.read(table + 16 * index, 16))
            if flags & _INDIRECT:
                if not self.indirect or nested or flags & _NEXT or not length or length % 16:
                    raise BadRing(f"indirect descriptor {index} of {length} bytes, flags {flags:#x}")
                nested = True
                table, entries, index = address, length // 16, 0
                left = min(entries, _MAX_INDIRECT)
                continue
            if flags & _WRITE:
                room += length
                writable.append((address, length))
            elif writable:
                raise BadRing(f"descriptor {index} is readable behind a writable one")
            else:
                out += length
                if out > limit:
                    raise BadRing(f"the chain at {head} is longer than {limit} bytes")
                readable.append(self._memory.read(address, length))
            if out + room > _MAX_BYTES:
                raise BadRing(f"the chain at {head} is longer than 2^32 bytes")
            if not flags & _NEXT:
                return Chain(head, b"".join(readable), tuple(writable))
            index = following

    def _store(self, chain: Chain, offset: int, data: bytes) -> None:
        done = 0
        for address, length in chain.writable:
            if done == len(data):
                return
            if offset >= length:
                offset -= length
                continue
            piece = data[done : done + length - offset]
            self._memory.write(address + offset, piece)
            done += len(piece)
            offset = 0
