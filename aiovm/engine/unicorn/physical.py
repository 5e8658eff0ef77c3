"""The core's physical address space follows the machine's memory map.

Slots become host memory. Where nobody is, loads and stores call the port; from ranges that the embedding program
answers loads are refused (:mod:`~aiovm.engine.unicorn.claims`). Translations of code that the host has stored to are
stale.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.budget import PHYSICAL_END, DeviceRange
from aiovm.errors import ConfigError, EngineError
from aiovm.memory import MemoryMap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.engine.unicorn.engine import UnicornEngine
    from aiovm.memory import Memslot

__all__ = ["PhysicalSpace"]

_4G: Final = 1 << 32
_NONE: Final = 0
_STORES_ONLY: Final = 2
_READ_EXEC: Final = 5
_ALL: Final = 7


#: Low, high, host address or 0 where nobody is, rights.
_Range = tuple[int, int, int, int]


class PhysicalSpace:
    """One engine's."""

    def __init__(self, engine: UnicornEngine) -> None:
        self._engine = engine
        #: What is mapped, with the callbacks that keep alive.
        self._mapped: dict[_Range, tuple[object, ...]] = {}
        self._rom_hook: object = None
        memory = engine.memory
        memory.on_change(self._remap)
        memory.on_write(self._host_wrote)
        if engine.budget.notes_stores:
            memory.on_log(self._forget_noted)
            memory.notes_stores = True
        self._remap(MemoryMap(), memory.map)

    def _remap(self, _old: MemoryMap, new: MemoryMap) -> None:
        """Follow the memory map, wholly or not at all."""
        engine = self._engine
        if engine.closed:
            return
        for slot in new.slots:
            if slot.end > PHYSICAL_END:
                raise ConfigError(
                    f"memslot {slot.slot_id}: {slot.base:#x}+{slot.size:#x} lies beyond 40 bits of address (EINVAL)"
                )
        before = list(self._mapped)
        try:
            self._bring(_layout(new, engine.claims.ranges))
            if not all(slot.writable for slot in new.slots):
                self._watch_rom()
        except EngineError as error:
            self._bring(before)
            raise ConfigError("the core cannot map these memslots (ENOMEM); the old ones stay") from error
        engine.budget.cover(
            [(slot.base, slot.end, slot.host_address, slot.writable, _log_address(slot)) for slot in new.slots]
        )
        engine.core.flush_tlb()

    def _bring(self, ranges: Sequence[_Range]) -> None:
        """Have these ranges mapped and no others. What stays is left alone."""
        uc, wanted = self._engine.core.handle, dict.fromkeys(ranges)
        with self._engine.core.unmapping():
            for one in [r for r in self._mapped if r not in wanted]:
                low, high, address, _ = one
                lib.check(lib.uc_mem_unmap(uc, low, high - low), f"unmap {low:#x}")
                del self._mapped[one]
                if address:
                    self._engine.forget_translations()
        for one in [r for r in wanted if r not in self._mapped]:
            low, high, address, rights = one
            keep: tuple[object, ...] = ()
            if address:
                error = lib.uc_mem_map_ptr(uc, low, high - low, _ALL, address)
            else:
                error, keep = self._map_device(low, high, rights)
            lib.check(error, f"map {low:#x}+{high - low:#x}")
            self._mapped[one] = keep
            if rights not in (_ALL, _NONE):
                # What is mapped read-only from the start the core reports stores to, and then makes them.
                lib.check(lib.uc_mem_protect(uc, low, high - low, rights), f"protect {low:#x}+{high - low:#x}")

    def _map_device(self, low: int, high: int, rights: int) -> tuple[int, tuple[object, ...]]:
        """Addresses where nobody is: the core's error number, and what must live as long as they are mapped."""
        engine, uc, budget = self._engine, self._engine.core.handle, self._engine.budget
        device = DeviceRange(budget.address, low)
        reader = engine.claims.reader(low) if rights == _STORES_ONLY else self._reader(low)
        twins = lib.MMIO_READ_T(reader), lib.MMIO_WRITE_T(self._writer(low))
        read, write = (lib.address_of(twin) for twin in twins)
        if rights != _STORES_ONLY:
            read = budget.on_mmio_read or read
        write = budget.on_mmio_write or write
        at = ctypes.addressof(device)
        return lib.uc_mmio_map(uc, low, high - low, read, at, write, at), (device, *twins)

    def claim(self, base: int, length: int) -> None:
        """Loads from these addresses leave before they happen (:mod:`aiovm.engine.unicorn.claims`)."""
        claims, map_ = self._engine.claims, self._engine.memory.map
        before = list(claims.ranges)
        claims.add(base, length)
        try:
            self._remap(map_, map_)
        except ConfigError:
            claims.ranges[:] = before
            raise

    def _forget_noted(self) -> None:
        """A log is taken: the next store to each of its pages is noted again."""
        if not self._engine.closed:
            self._engine.core.flush_tlb()

    def _host_wrote(self, gpa: int, length: int) -> None:
        """The host stored into guest memory: what was translated from those pages is stale."""
        pages = self._engine.budget.code_pages
        if 1 in pages[gpa >> 12 : (gpa + length - 1 >> 12) + 1]:
            self._engine.forget_translations()

    def _reader(self, base: int) -> Callable[[int, int, int, int], int]:
        engine = self._engine

        def read(_uc: int, offset: int, size: int, _user: int) -> int:
            try:
                engine.cells[0] += engine.costs.exit_ns
                assert engine.current is not None
                return engine.current.port.on_mmio_read(base + offset, size) & (1 << 8 * size) - 1
            except BaseException as error:
                engine.fail(error)
                return 0

        return read

    def _writer(self, base: int) -> Callable[[int, int, int, int, int], None]:
        return lambda _uc, offset, size, value, _user: self._store(base + offset, size, value)

    def _store(self, gpa: int, size: int, value: int) -> None:
        engine = self._engine
        try:
            engine.cells[0] += engine.costs.exit_ns
            assert engine.current is not None
            engine.current.port.on_mmio_write(gpa, size, value & (1 << 8 * size) - 1)
        except BaseException as error:
            engine.fail(error)

    def _watch_rom(self) -> None:
        """Hear of stores to read-only slots. Only where there are any: a memory hook of whatever kind sends every load
        and store through the core's slow path, which costs a factor of fifteen (benchmarks/bench_engine.py)."""
        if self._rom_hook is None:
            callback = self._rom_hook = lib.HOOK_MEM_T(self._on_rom_write)
            kind = lib.const.UC_HOOK_MEM_WRITE_PROT
            lib.check(lib.hook_add(self._engine.core.handle, kind, lib.address_of(callback), 0), "hook stores to ROM")

    def _on_rom_write(self, _uc: int, _kind: int, gpa: int, size: int, value: int, _user: int) -> bool:
        """A store to a read-only slot is MMIO, and the core drops it. An unaligned one comes again byte by byte."""
        if not gpa & size - 1:
            self._store(gpa, size, value)
        return True


def _log_address(slot: Memslot) -> int:
    """Where the core's stores are noted; 0: nowhere."""
    if slot.stored is None or not slot.writable:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(slot.stored))


def _layout(map_: MemoryMap, claims: Sequence[tuple[int, int]]) -> list[_Range]:
    """The physical address space in order. ``claims``: where nobody is, what leaves to the embedding program."""
    ranges: list[_Range] = []
    at = 0
    for slot in map_.slots:
        ranges += _device(at, slot.base, claims)
        rights = _ALL if slot.writable else _READ_EXEC
        ranges.append((slot.base, slot.end, slot.host_address, rights))
        at = slot.end
    return ranges + _device(at, PHYSICAL_END, claims)


def _device(low: int, high: int, claims: Sequence[tuple[int, int]]) -> list[_Range]:
    """Nobody's addresses, with the claims among them."""
    ranges: list[_Range] = []
    for start, end in claims:
        if start < high and low < end:
            ranges += _hole(low, start)
            ranges.append((max(start, low), min(end, high), 0, _STORES_ONLY))
            low = min(end, high)
    return ranges + _hole(low, high)


def _hole(low: int, high: int) -> list[_Range]:
    """Nobody's addresses in pieces: without pointers the core takes a time for each page that it unmaps, so that a slot
    that comes or goes should not unmap a terabyte. Every half GiB up to 4 GiB, then doubling."""
    pieces: list[_Range] = []
    while low < high:
        end = (low >> 29) + 1 << 29 if low < _4G else 1 << low.bit_length()
        end = min(end, high)
        pieces.append((low, end, 0, _NONE))
        low = end
    return pieces
