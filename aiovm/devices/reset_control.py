"""Port 0xCF9, the reset control register (Intel ICH data sheets, "RST_CNT"): ``reset()`` when bit 2 rises.

Bit 1 says hard or soft, bit 3 power cycle: they are kept and read back, and every reset is the same here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ResetControl", "ResetControlState"]


@dataclass(slots=True)
class ResetControlState:
    """The register; bit 2 reads 0."""

    value: int = 0


class ResetControl:
    """The port."""

    LENGTH = 1

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._s = ResetControlState()

    def read(self, offset: int, size: int, now: int) -> int:
        """The kind of reset that was chosen."""
        return self._s.value

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """Choose the kind (bits 1 and 3), or reset (bit 2)."""
        self._s.value = value & 0xA
        if value & 4:
            self._reset()

    def save(self) -> ResetControlState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: ResetControlState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)

    def reset(self) -> None:
        """The power-on state."""
        self.restore(ResetControlState())
