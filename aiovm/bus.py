"""Where port and memory-mapped accesses find their device.

One :class:`Bus` serves ports, another memory. A device owns a range, sees offsets into it, and never the bus.
An access that no device claims reads all ones and is dropped on write, as on a PC whose bus nobody drives;
the caller is told (``None`` / ``False``), so that the embedding program may answer first.

Width and straddling are decided here once: an access must lie inside one range, else nobody claims it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

from aiovm.errors import ConfigError

__all__ = ["Bus", "Device"]


class Device(Protocol):
    """What a bus needs. Times are ns of the machine's clock; sizes are bytes (1, 2, 4 or 8).

    A device whose answers depend on time also has ``next_deadline() -> int | None`` and ``advance(now)``;
    ``advance`` is safe to call early, late or twice. ``reset()`` is the power-on state.
    """

    def read(self, offset: int, size: int, now: int) -> int: ...
    def write(self, offset: int, size: int, value: int, now: int) -> None: ...


class Bus:
    """Ranges and their devices. ``name`` is for messages; ``width`` is the address size in bits."""

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self._limit = 1 << width
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Device]] = []

    def register(self, base: int, length: int, device: Device) -> None:
        """Give ``[base, base + length)`` to ``device``; ``ConfigError`` when it overlaps or does not fit."""
        if length <= 0 or base < 0 or base + length > self._limit:
            raise ConfigError(f"{self.name} range {base:#x}+{length:#x} does not fit the bus")
        at = bisect_right(self._starts, base)
        for low, high, other in self._ranges[max(0, at - 1) : at + 1]:
            if base < high and low < base + length:
                raise ConfigError(
                    f"{self.name} range {base:#x}+{length:#x} overlaps {type(other).__name__} at {low:#x}"
                )
        self._starts.insert(at, base)
        self._ranges.insert(at, (base, base + length, device))

    def unregister(self, base: int) -> None:
        """Take back the range that starts at ``base``."""
        for at, (low, _, _) in enumerate(self._ranges):
            if low == base:
                del self._starts[at], self._ranges[at]
                return
        raise ConfigError(f"no {self.name} range starts at {base:#x}")

    def find(self, address: int, size: int) -> tuple[Device, int] | None:
        """The device that claims the whole access, and the offset into it."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        low, high, device = self._ranges[at]
        if address + size > high:
            return None
        return device, address - low

    def read(self, address: int, size: int, now: int) -> int | None:
        """The device's answer, or None when nobody claims the access."""
        found = self.find(address, size)
        return None if found is None else found[0].read(found[1], size, now) & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int, now: int) -> bool:
        """Whether a device took the access."""
        found = self.find(address, size)
        if found is None:
            return False
        found[0].write(found[1], size, value, now)
        return True

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device, in address order, once."""
        seen: list[Device] = []
        for _, _, device in self._ranges:
            if not any(device is other for other in seen):
                seen.append(device)
        return tuple(seen)
