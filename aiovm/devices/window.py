"""A range on a bus that belongs to a chip with several of them. No state of its own: the chip saves and restores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Window"]


class Window:
    """``length`` addresses whose accesses go to ``read(offset, size, now)`` and ``write(offset, size, value, now)``."""

    __slots__ = ("length", "read", "write")

    def __init__(
        self, length: int, read: Callable[[int, int, int], int], write: Callable[[int, int, int, int], None]
    ) -> None:
        self.length = length
        self.read = read
        self.write = write
