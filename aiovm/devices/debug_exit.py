"""A port whose write ends the machine, QEMU's ``isa-debug-exit`` (``hw/misc/debugexit.c``).

A write of ``v`` calls ``exit(2·v + 1)``: a guest can't report status 0 by accident. Reads give 0. No state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DebugExit"]


class DebugExit:
    """The port. ``exit_`` is told the status."""

    LENGTH = 4

    def __init__(self, exit_: Callable[[int], None]) -> None:
        self._exit = exit_

    def read(self, offset: int, size: int, now: int) -> int:
        """Nothing to see."""
        return 0

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """End the machine."""
        self._exit((value & (1 << (8 * size)) - 1) << 1 | 1)

    def save(self) -> None:
        """Nothing to save."""

    def restore(self, state: None) -> None:
        """Nothing to restore."""

    def reset(self) -> None:
        """Nothing to reset."""
