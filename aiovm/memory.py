"""Guest physical memory: memslots, generations, cached pointers, the dirty log (``virt/kvm/kvm_main.c``).

Rules, from ``virt/kvm/kvm_main.c`` of Linux 6.16:

* A slot is ``{base, size, flags}`` over host memory. Addresses and sizes are whole pages; slots of one address
  space do not overlap. Size, backing and READONLY of a slot never change; it may move, or change LOG_DIRTY.
* The map is a value: :class:`MemoryMap` is immutable, readers take the reference once, and an update publishes a
  new one with a higher generation. While an update is under way the generation is odd, and caches do not store.
* :class:`GuestPtr` (``gfn_to_hva_cache``) remembers where an address leads and asks again when the generation moved.
* The dirty log has every page that the host wrote through here and every page to which the guest stored, be it what was
  there already: an engine that can tell notes the first store to each page after the log was taken, as KVM's write
  protection does. With others a slot that logs keeps a copy to compare with when somebody asks, and a store of what was
  there is missed. Taking loses no store: what comes behind it is in the next log.
* Reading where no slot is gives ``None`` or raises :class:`NoMemory`; a write to a read-only slot is refused the same
  way: that is MMIO, not an error.

Modelled: address spaces 0 (normal) and 1 (SMM). Not modelled: huge pages, the MMIO generation in page tables.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PAGE", "GuestMemory", "GuestPtr", "MemoryMap", "Memslot", "NoMemory", "SlotFlags"]

PAGE = 4096
_PAGE_MASK = PAGE - 1
#: Bytes that are compared at once with what the dirty log knows.
_COMPARED = 16 * PAGE


class NoMemory(Exception):
    """No slot backs the address (or, for a write, the slot is read-only)."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"no memory at {gpa:#x}")
        self.gpa = gpa


class SlotFlags(enum.IntFlag):
    """``KVM_MEM_*``."""

    NONE = 0
    LOG_DIRTY = 1
    READONLY = 2


@dataclass(frozen=True, slots=True)
class Memslot:
    """One slot. ``bytes_`` and ``words`` are views of the same host memory (8-bit and 64-bit). With LOG_DIRTY,
    ``dirty`` has a bit a page; ``stored`` too, of what the engine noted, or ``seen`` the bytes that the log knows."""

    slot_id: int
    base: int
    size: int
    flags: SlotFlags
    bytes_: memoryview
    words: memoryview
    host_address: int
    #: The host may store here as the guest does: the slot is not READONLY.
    writable: bool
    dirty: bytearray | None = None
    stored: bytearray | None = None
    seen: bytearray | None = None
    #: The host memory was made for this slot, not given by the program.
    own: bool = True

    @property
    def end(self) -> int:
        """The first address after the slot."""
        return self.base + self.size


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The slots of one address space at one generation, in address order."""

    generation: int = 0
    slots: tuple[Memslot, ...] = ()
    _bases: tuple[int, ...] = field(default=(), repr=False)

    def find(self, gpa: int) -> Memslot | None:
        """The slot that holds ``gpa``."""
        at = bisect_right(self._bases, gpa) - 1
        if at < 0:
            return None
        slot = self.slots[at]
        return slot if gpa < slot.base + slot.size else None

    def with_slots(self, slots: tuple[Memslot, ...], generation: int) -> MemoryMap:
        """A map of these slots."""
        ordered = tuple(sorted(slots, key=lambda s: s.base))
        return MemoryMap(generation, ordered, tuple(s.base for s in ordered))


class GuestMemory:
    """The memory of one machine (one address space)."""

    def __init__(self) -> None:
        self.map = MemoryMap()
        self._listeners: list[Callable[[MemoryMap, MemoryMap], None]] = []
        self._written: list[Callable[[int, int], None]] = []
        self._asked: list[Callable[[], None]] = []
        #: The engine notes the guest's stores in the slots' ``stored``.
        self.notes_stores = False

    # ---- the map -------------------------------------------------------------------------------------------

    def set_region(
        self,
        slot_id: int,
        base: int,
        size: int,
        *,
        flags: SlotFlags = SlotFlags.NONE,
        backing: mmap.mmap | bytearray | memoryview | None = None,
    ) -> Memslot | None:
        """KVM_SET_USER_MEMORY_REGION: create, move, reflag or (``size`` 0) delete slot ``slot_id``.

        ``backing``: writable host memory of at least ``size`` bytes, kept alive by the slot; new zeroed memory
        by default. Raises :class:`ConfigError`, with KVM's errno in the message, for what KVM refuses.
        """
        if slot_id < 0:
            raise ConfigError(f"memslot {slot_id}: slots are numbered from 0 (EINVAL)")
        old = next((s for s in self.map.slots if s.slot_id == slot_id), None)
        if size == 0:
            if old is None:
                raise ConfigError(f"memslot {slot_id}: nothing to delete (EINVAL)")
            self._publish(tuple(s for s in self.map.slots if s is not old))
            return None
        if base & _PAGE_MASK or size & _PAGE_MASK or base < 0 or size < 0 or base + size > 1 << 52:
            raise ConfigError(f"memslot {slot_id}: {base:#x}+{size:#x} is not a range of whole pages (EINVAL)")
        others = tuple(s for s in self.map.slots if s is not old)
        for other in others:
            if base < other.end and other.base < base + size:
                raise ConfigError(
                    f"memslot {slot_id}: {base:#x}+{size:#x} overlaps slot {other.slot_id} at {other.base:#x} (EEXIST)"
                )
        if old is not None:
            if size != old.size or backing is not None or (flags ^ old.flags) & SlotFlags.READONLY:
                raise ConfigError(f"memslot {slot_id}: size, backing and READONLY cannot change (EINVAL)")
            if base == old.base and flags == old.flags:
                return old
            dirty, stored, seen = self._log(old.bytes_, flags, old)
            new = replace(old, base=base, flags=flags, dirty=dirty, stored=stored, seen=seen)
        else:
            host = _zeroed(slot_id, size) if backing is None else backing
            view = memoryview(host).cast("B")
            if view.readonly or len(view) < size:
                raise ConfigError(f"memslot {slot_id}: backing must be writable and {size:#x} bytes long (EINVAL)")
            view = view[:size]
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            writable = not flags & SlotFlags.READONLY
            log = self._log(view, flags, None)
            new = Memslot(slot_id, base, size, flags, view, view.cast("Q"), address, writable, *log, backing is None)
        self._publish((*others, new))
        return new

    def close(self) -> None:
        """Give the system back what was made here, at once: a machine is circles of objects, and outlives its end."""
        gone, self.map = self.map, MemoryMap(self.map.generation + 2)
        for slot in gone.slots:
            if slot.own and isinstance(slot.bytes_.obj, mmap.mmap):
                with suppress(OSError):
                    slot.bytes_.obj.madvise(mmap.MADV_REMOVE)

    def on_change(self, listener: Callable[[MemoryMap, MemoryMap], None]) -> None:
        """Call ``listener(old, new)`` while each update is under way (the engine maps and unmaps)."""
        self._listeners.append(listener)

    def on_write(self, listener: Callable[[int, int], None]) -> None:
        """Call ``listener(gpa, length)`` after each host-side write (the engine drops stale translations)."""
        self._written.append(listener)

    def on_log(self, listener: Callable[[], None]) -> None:
        """Call ``listener()`` before a log is brought up to date (the engine will note each page's next store again);
        who may not be asked now raises."""
        self._asked.append(listener)

    def _publish(self, slots: tuple[Memslot, ...]) -> None:
        before = self.map
        self.map = before.with_slots(slots, before.generation + 1)  # odd: caches do not store
        try:
            for listener in self._listeners:
                listener(before, self.map)
        except BaseException:  # somebody refuses: nothing has changed
            self.map = before
            raise
        self.map = before.with_slots(slots, before.generation + 2)

    # ---- access --------------------------------------------------------------------------------------------

    def read(self, gpa: int, length: int) -> bytes:
        """``length`` bytes at ``gpa``, which may cross slots; :class:`NoMemory` where none is."""
        if length < 0:
            raise ConfigError(f"{length} bytes cannot be read")
        slot = self.map.find(gpa)
        if slot is not None and gpa + length <= slot.base + slot.size:
            at = gpa - slot.base
            return bytes(slot.bytes_[at : at + length])
        parts = []
        while length:
            slot = self.map.find(gpa)
            if slot is None:
                raise NoMemory(gpa)
            n = min(length, slot.end - gpa)
            at = gpa - slot.base
            parts.append(bytes(slot.bytes_[at : at + n]))
            gpa += n
            length -= n
        return b"".join(parts)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``; nothing is stored when any byte of it has no writable memory."""
        length = len(data)
        slot = self.map.find(gpa)
        if slot is not None and slot.writable and gpa + length <= slot.base + slot.size:
            offset = gpa - slot.base
            slot.bytes_[offset : offset + length] = data
            if slot.dirty is not None:
                _mark(slot.dirty, offset, length)
            self.wrote(gpa, length)
            return
        pieces: list[tuple[Memslot, int, int]] = []
        at, left = gpa, length
        while left:
            slot = self.map.find(at)
            if slot is None or not slot.writable:
                raise NoMemory(at)
            n = min(left, slot.end - at)
            pieces.append((slot, at - slot.base, n))
            at += n
            left -= n
        done = 0
        for slot, offset, n in pieces:
            slot.bytes_[offset : offset + n] = data[done : done + n]
            if slot.dirty is not None:
                _mark(slot.dirty, offset, n)
            done += n
        self.wrote(gpa, length)

    def read_u(self, gpa: int, size: int) -> int:
        """An unsigned little-endian integer of ``size`` bytes."""
        if size == 8 and not gpa & 7:
            slot = self.map.find(gpa)
            if slot is None:
                raise NoMemory(gpa)
            word: int = slot.words[(gpa - slot.base) >> 3]
            return word
        return int.from_bytes(self.read(gpa, size), "little")

    def write_u(self, gpa: int, size: int, value: int) -> None:
        """Store an unsigned little-endian integer of ``size`` bytes; ``value`` is cut to fit."""
        self.write(gpa, (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little"))

    def wrote(self, gpa: int, length: int) -> None:
        """Tell who watches that the host stored into ``[gpa, gpa + length)`` (for whoever has a raw view)."""
        for listener in self._written:
            listener(gpa, length)

    def load_rom(self, gpa: int, data: bytes) -> None:
        """Store ``data`` for a loader: like :meth:`write`, read-only slots too; :class:`ConfigError` outside memory."""
        at, done = gpa, 0
        while done < len(data):
            slot = self.map.find(at)
            if slot is None:
                raise ConfigError(f"{len(data):#x} bytes at {gpa:#x} do not fit memory: nothing at {at:#x}")
            n = min(len(data) - done, slot.end - at)
            slot.bytes_[at - slot.base : at - slot.base + n] = data[done : done + n]
            if slot.dirty is not None:
                _mark(slot.dirty, at - slot.base, n)
            at += n
            done += n
        self.wrote(gpa, len(data))

    def is_ram(self, gpa: int) -> bool:
        """Whether a slot backs ``gpa``."""
        return self.map.find(gpa) is not None

    # ---- the dirty log -------------------------------------------------------------------------------------

    def take_dirty_log(self, slot_id: int) -> bytes:
        """KVM_GET_DIRTY_LOG: one bit a page, little-endian, taken and cleared; ConfigError (ENOENT) if not logged."""
        slot = next((s for s in self.map.slots if s.slot_id == slot_id), None)
        if slot is None or slot.dirty is None:
            raise ConfigError(f"memslot {slot_id} does not log dirty pages (ENOENT)")
        dirty = self.gather_log(slot)
        taken = bytes(dirty)
        dirty[:] = bytes(len(dirty))
        return taken

    def gather_log(self, slot: Memslot) -> bytearray:
        """The log itself, brought up to date with what the guest has stored; the slot logs."""
        assert slot.dirty is not None
        for listener in self._asked:
            listener()
        if slot.stored is not None:
            size = len(slot.dirty)
            both = int.from_bytes(slot.dirty, "little") | int.from_bytes(slot.stored, "little")
            slot.dirty[:] = both.to_bytes(size, "little")
            slot.stored[:] = bytes(size)
        if slot.seen is not None:
            _compare(slot.bytes_, slot.seen, slot.dirty)
        return slot.dirty

    def _log(
        self, view: memoryview, flags: SlotFlags, old: Memslot | None
    ) -> tuple[bytearray | None, bytearray | None, bytearray | None]:
        """The log of a slot that begins, goes on or ends logging: what the slot has as dirty, stored and seen."""
        if not flags & SlotFlags.LOG_DIRTY:
            return None, None, None
        if old is not None and old.dirty is not None:
            return old.dirty, old.stored, old.seen
        size = (len(view) // PAGE + 63) // 64 * 8
        if self.notes_stores:
            return bytearray(size), bytearray(size), None
        return bytearray(size), None, bytearray(view)

    def mark_dirty(self, gpa: int, length: int = 1) -> None:
        """Note that the guest (or whoever has a raw view) wrote ``[gpa, gpa + length)``."""
        slot = self.map.find(gpa)
        if slot is not None and slot.dirty is not None:
            _mark(slot.dirty, gpa - slot.base, length)


def _zeroed(slot_id: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"memslot {slot_id}: the host has no {size:#x} bytes to give (ENOMEM)") from error


def _compare(view: memoryview, seen: bytearray, dirty: bytearray) -> None:
    """Mark the pages whose bytes are no longer what was seen, and have seen them."""
    for start in range(0, len(view), _COMPARED):
        now = bytes(view[start : start + _COMPARED])
        if now == seen[start : start + _COMPARED]:
            continue
        for at in range(0, len(now), PAGE):
            if now[at : at + PAGE] != seen[start + at : start + at + PAGE]:
                _mark(dirty, start + at, 1)
        seen[start : start + _COMPARED] = now


def _mark(dirty: bytearray, offset: int, length: int) -> None:
    for page in range(offset >> 12, (offset + length - 1 >> 12) + 1):
        dirty[page >> 3] |= 1 << (page & 7)


class GuestPtr:
    """A guest physical address that a mechanism writes again and again (``gfn_to_hva_cache``).

    ``valid`` says whether all ``length`` bytes are backed now; reads and writes on an invalid pointer do nothing
    and say so, as KVM's do.
    """

    __slots__ = ("_generation", "_memory", "_offset", "_slot", "gpa", "length")

    def __init__(self, memory: GuestMemory, gpa: int, length: int) -> None:
        self._memory = memory
        self.gpa = gpa
        self.length = length
        self._generation = -1
        self._slot: Memslot | None = None
        self._offset = 0

    def _resolve(self) -> Memslot | None:
        current = self._memory.map
        if self._generation != current.generation:
            slot = current.find(self.gpa)
            self._slot = slot if slot is not None and self.gpa + self.length <= slot.end else None
            self._offset = 0 if slot is None else self.gpa - slot.base
            self._generation = -1 if current.generation & 1 else current.generation
        return self._slot

    @property
    def valid(self) -> bool:
        """Whether the whole range lies in one slot now."""
        return self._resolve() is not None

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of the record, or None when it is not backed."""
        slot = self._resolve()
        if slot is None:
            return None
        at = self._offset + offset
        return bytes(slot.bytes_[at : at + length])

    def write(self, offset: int, data: bytes) -> bool:
        """Whether the bytes were stored."""
        slot = self._resolve()
        if slot is None or not slot.writable:
            return False
        at = self._offset + offset
        slot.bytes_[at : at + len(data)] = data
        if slot.dirty is not None:
            _mark(slot.dirty, at, len(data))
        self._memory.wrote(self.gpa + offset, len(data))
        return True
