"""A word of a model guest's memory that others may spin on.

A spin loop is one operation here, not a stream of polls: a waiting CPU registers with the cell and is woken at the
moment at which its loop would first have read the new value, that is at its own start plus a whole number of turns.
Of several that wait for the same value the earliest poller comes first; what it does may send the others on spinning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiovm.engine.model.context import ModelContext

__all__ = ["Cell"]


class Cell:
    """One word. Write it through :meth:`store`; read ``value``."""

    __slots__ = ("spinners", "value")

    def __init__(self, value: int = 0) -> None:
        self.value = value
        #: Who spins on it and runs now, in order of arrival.
        self.spinners: list[ModelContext] = []

    def store(self, value: int) -> None:
        """Write; whoever waits for ``value`` sees it at the next turn of its loop."""
        self.value = value
        if self.spinners:
            self.notify()

    def notify(self) -> None:
        """Wake the earliest poller among those whom the present value satisfies."""
        value = self.value
        first: ModelContext | None = None
        first_at = 0
        for context in self.spinners:
            if context.wanted == value:
                at = context.next_poll()
                if first is None or at < first_at:
                    first, first_at = context, at
        if first is not None:
            first.end_spin_at(first_at)
