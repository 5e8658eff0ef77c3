"""Port 0x92, system control port A of a PC (IBM PS/2 technical reference): bit 0 fast reset, bit 1 A20.

A rise of bit 0 calls ``reset()``; bit 1 calls ``a20(enabled)`` when it changes. A20 is on at power-on here, as the
loaders expect. Not modelled: the security lock, watchdog and disk lamp bits (they read 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Port92", "Port92State"]


@dataclass(slots=True)
class Port92State:
    """The register's two bits."""

    value: int = 2


class Port92:
    """The port."""

    LENGTH = 1

    def __init__(self, reset: Callable[[], None], a20: Callable[[bool], None]) -> None:
        self._reset = reset
        self._a20 = a20
        self._s = Port92State()

    def read(self, offset: int, size: int, now: int) -> int:
        """Both bits."""
        return self._s.value

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """Both bits."""
        before = self._s.value
        self._s.value = value & 3
        if (before ^ value) & 2:
            self._a20(bool(value & 2))
        if value & ~before & 1:
            self._reset()

    def save(self) -> Port92State:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: Port92State) -> None:
        """Take over a copy of ``state``."""
        before = self._s.value
        self._s = replace(state)
        if (before ^ state.value) & 2:
            self._a20(bool(state.value & 2))

    def reset(self) -> None:
        """The power-on state."""
        self.restore(Port92State())
