"""A word of a model guest's memory that others may spin on.

A spin loop is one operation here, not a stream of polls: a waiting CPU registers with the cell and is woken at the
moment at which its loop would first have read the new value, that is at its own start plus a whole number of turns.
Of several that wait for the same value the earliest poller comes first; what it does may send the others on spinning.

A word on which many spin changes hands slowly: each spinner fetches the line anew, and the one that can go on gets it
after half of them on average (Boyd-Wickizer et al., "Non-scalable locks are dangerous", Linux Symposium 2012). A cell
with a ``line_ns`` does that; by default it is 0, as in the machine-code engine, which has no caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiovm.engine.model.context import ModelContext

__all__ = ["Cell"]


class Cell:
    """One word. Write it through :meth:`store`; read ``value``."""

    __slots__ = ("line_ns", "spinners", "value")

    def __init__(self, value: int = 0, line_ns: int = 0) -> None:
        self.value = value
        #: What it takes to bring the word from another CPU's cache (ns).
        self.line_ns = line_ns
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
            first.end_spin_at(first_at + self.line_ns * len(self.spinners) // 2)
