"""Process statuses, and the one line that goes with them (docs/exit-status.md).

Statuses of our own are even, because the debug-exit port's are odd: ``(value << 1) | 1``.
"""

from __future__ import annotations

from typing import Final

from aiovm.errors import (
    AiovmError,
    GuestPanic,
    HostError,
    StallError,
    TimeoutExpired,
    TripleFault,
    UnhandledExit,
)

__all__ = [
    "BAD_INPUT",
    "INTERNAL",
    "INTERRUPTED",
    "OK",
    "PANIC",
    "STALL",
    "TIMEOUT",
    "TRIPLE_FAULT",
    "UNHANDLED_EXIT",
    "status_of",
]

OK: Final = 0
BAD_INPUT: Final = 2
TRIPLE_FAULT: Final = 64
UNHANDLED_EXIT: Final = 66
STALL: Final = 68
TIMEOUT: Final = 70
INTERNAL: Final = 72
PANIC: Final = 74
INTERRUPTED: Final = 130


def status_of(error: AiovmError) -> int:
    """The process status for an error that ended a command."""
    match error:
        case HostError():
            return BAD_INPUT
        case TripleFault():
            return TRIPLE_FAULT
        case GuestPanic():
            return PANIC
        case UnhandledExit():
            return UNHANDLED_EXIT
        case StallError():
            return STALL
        case TimeoutExpired():
            return TIMEOUT
        case _:
            return INTERNAL
