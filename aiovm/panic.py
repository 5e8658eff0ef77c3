"""Has the guest's Linux kernel panicked? Seen in what it prints on its console.

A panicking kernel prints ``Kernel panic - not syncing: why``, a stack, and then either ``---[ end Kernel panic`` and
spins for ever, or (``panic=`` on its command line) asks for a reset. The first line alone proves nothing, as a program
may print it; the watch says "over" at the end line, and its owner asks :attr:`PanicWatch.message` when a reset comes.

Source: ``kernel/panic.c`` of Linux 6.1 (the words are the same since 4.4). Not modelled: pvpanic's port.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["PanicState", "PanicWatch"]

_BEGIN = re.compile(rb"(?:\[ *\d+\.\d+\](?:\[ *\w+\])? )?Kernel panic - not syncing: (.*)")
_END = b"---[ end Kernel panic"
_LINE_FEED = 10
_LONGEST = 1024
_MOST_LINES = 60


@dataclass(frozen=True, slots=True)
class PanicState:
    """The line that has begun, why the kernel panicked (or None), and the lines since."""

    line: bytes
    message: str | None
    lines: tuple[str, ...]


class PanicWatch:
    """One console's lines, looked at as they end."""

    __slots__ = ("_line", "_lines", "message")

    def __init__(self) -> None:
        self._line = bytearray()
        self._lines: list[str] = []
        #: Why the kernel panicked, or None.
        self.message: str | None = None

    def save(self) -> PanicState:
        """A copy of what was seen."""
        return PanicState(bytes(self._line), self.message, self.lines)

    def restore(self, state: PanicState) -> None:
        """Take over a saved state."""
        self._line[:] = state.line
        self.message = state.message
        self._lines[:] = state.lines

    def put(self, byte: int) -> bool:
        """One byte of output; whether the kernel has just said its last word."""
        line = self._line
        if byte != _LINE_FEED:
            if len(line) < _LONGEST:
                line.append(byte)
            return False
        found = _BEGIN.match(line) if self.message is None else None
        if found is not None:
            self.message = found[1].decode("utf-8", "replace").rstrip()
        over = self.message is not None and _END in line
        if self.message is not None and len(self._lines) < _MOST_LINES:
            self._lines.append(line.decode("utf-8", "replace").rstrip())
        line.clear()
        return over

    @property
    def lines(self) -> tuple[str, ...]:
        """What was printed from the panic on."""
        return tuple(self._lines)
