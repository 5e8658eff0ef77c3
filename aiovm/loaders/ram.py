"""Where things lie in guest RAM while a machine is loaded, and the map of it that a guest is told.

Every writable memslot is RAM. A loader claims what its image fixes and places the rest in what is left:

* ``LOW``: the loader's own tables and strings, from 64 KiB up to the end of conventional memory, or from 1 MiB on
  where that is full. The first 64 KiB stay free: boot sectors, SIPI trampolines and real-mode tables live there.
* ``HIGH``: modules, ramdisks and stacks, from 1 MiB on.

Nothing is loaded at 4 GiB or above, where the entry states map nothing. The map (the ranges of INT 15h E820; ACPI
6.5, chapter 15) has the conventional 639 KiB, holds back the extended BIOS data area and the BIOS area, where ACPI
tables are looked for, and lists the rest as it is.

Modelled: RAM in several slots, as around the PCI hole. Not modelled: ACPI reclaimable and NVS ranges.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from aiovm.errors import ConfigError
from aiovm.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiovm.memory import GuestMemory

__all__ = ["HIGH", "LOW", "MapEntry", "MemoryType", "Ram", "Region", "memory_map"]

_LIMIT = 4 * GIB
_CONVENTIONAL_END = 0x9FC00
_EBDA = (_CONVENTIONAL_END, 0xA0000)
_BIOS = (0xE0000, MIB)
_CHUNK = MIB

HIGH = ((MIB, _LIMIT),)
LOW = ((0x10000, 0x9F000), *HIGH)


class MemoryType(enum.IntEnum):
    """Address range types (ACPI 6.5, chapter 15)."""

    RAM = 1
    RESERVED = 2


class MapEntry(NamedTuple):
    """One range of the memory map."""

    base: int
    size: int
    type: MemoryType


class Region(NamedTuple):
    """What was loaded where; ``end`` is the first address after it."""

    base: int
    end: int
    what: str


def _ram_ranges(memory: GuestMemory) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for slot in memory.map.slots:
        if not slot.writable:
            continue
        if ranges and ranges[-1][1] == slot.base:
            ranges[-1] = (ranges[-1][0], slot.end)
        else:
            ranges.append((slot.base, slot.end))
    return ranges


def memory_map(memory: GuestMemory) -> tuple[MapEntry, ...]:
    """What the guest is told, in address order."""
    entries = [MapEntry(low, high - low, MemoryType.RESERVED) for low, high in (_EBDA, _BIOS)]
    for low, high in _ram_ranges(memory):
        for start, end in ((low, min(high, _CONVENTIONAL_END)), (max(low, MIB), high)):
            if start < end:
                entries.append(MapEntry(start, end - start, MemoryType.RAM))
    return tuple(sorted(entries))


class Ram:
    """RAM below 4 GiB and what has been loaded into it. ``name`` is the image's, for messages."""

    def __init__(self, memory: GuestMemory, name: str) -> None:
        self.memory = memory
        self._name = name
        self._ranges = [(low, min(high, _LIMIT)) for low, high in _ram_ranges(memory) if low < _LIMIT]
        self._taken: list[Region] = []

    @property
    def regions(self) -> tuple[Region, ...]:
        """Everything claimed and placed, in address order."""
        return tuple(sorted(self._taken))

    def claim(self, base: int, size: int, what: str) -> Region:
        """Take ``[base, base + size)``, which the image asks for."""
        region = Region(base, base + size, what)
        if not any(low <= base and region.end <= high for low, high in self._ranges):
            raise ConfigError(
                f"{self._name}: {what} at {base:#x}-{region.end:#x} does not fit RAM below 4 GiB ({self._sizes()})"
            )
        for other in self._taken:
            if base < other.end and other.base < region.end:
                raise ConfigError(
                    f"{self._name}: {what} at {base:#x}-{region.end:#x} overlaps "
                    f"{other.what} at {other.base:#x}-{other.end:#x}"
                )
        self._taken.append(region)
        return region

    def place(
        self,
        size: int,
        what: str,
        *,
        align: int = 16,
        windows: tuple[tuple[int, int], ...] = LOW,
        top: bool = False,
    ) -> int:
        """Take ``size`` free bytes in the first window that has them, lowest or (``top``) highest; their address."""
        for window in windows:
            fitting = [
                start
                for low, high in self._gaps(*window)
                for start in ((high - size) // align * align if top else -(-low // align) * align,)
                if low <= start and start + size <= high
            ]
            if fitting:
                base = fitting[-1] if top else fitting[0]
                self._taken.append(Region(base, base + size, what))
                return base
        where = " or ".join(f"{low:#x}-{high:#x}" for low, high in windows)
        raise ConfigError(
            f"{self._name}: no room for {what} ({size:#x} bytes) in {where}: RAM below 4 GiB is {self._sizes()}"
        )

    def write(self, base: int, data: bytes | bytearray | memoryview) -> None:
        """Store into what was claimed or placed."""
        self.memory.write(base, data)

    def clear(self, base: int, size: int) -> None:
        """Store zeros: memory may hold what an earlier run left."""
        for at in range(base, base + size, _CHUNK):
            self.memory.write(at, bytes(min(_CHUNK, base + size - at)))

    def _gaps(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The free ranges of a window, in address order."""
        for start, end in self._ranges:
            at, stop = max(start, low), min(end, high)
            for taken in self.regions:
                if taken.end <= at or taken.base >= stop:
                    continue
                if at < taken.base:
                    yield at, taken.base
                at = taken.end
            if at < stop:
                yield at, stop

    def _sizes(self) -> str:
        total = sum(high - low for low, high in self._ranges)
        return f"{total:#x} bytes: " + (", ".join(f"{low:#x}-{high:#x}" for low, high in self._ranges) or "none")
