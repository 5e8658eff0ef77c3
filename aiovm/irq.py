"""Interrupt lines: the one way a device is heard.

A device holds an :class:`IrqLine` and sets its level; it does not know where the line ends. The line tells its
sink only about changes, so a device may compute its pin as often as it likes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IrqLine"]


class IrqLine:
    """A wire with a level. ``sink(level)`` is called at each change."""

    __slots__ = ("_level", "_sink")

    def __init__(self, sink: Callable[[bool], None] | None = None) -> None:
        self._sink = sink
        self._level = False

    @property
    def level(self) -> bool:
        """The level that was last set."""
        return self._level

    def set(self, level: bool) -> None:
        """Drive the line; nothing happens when the level does not change."""
        if level != self._level:
            self._level = level
            if self._sink is not None:
                self._sink(level)

    def restore(self, level: bool) -> None:
        """Take over a saved level; who listens has a state of its own, and is not told."""
        self._level = level

    def pulse(self) -> None:
        """Drive the line high, then low: one edge."""
        self.set(True)
        self.set(False)
