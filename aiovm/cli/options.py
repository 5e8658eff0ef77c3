"""Options that several commands have, and what they refuse."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = ["ClockName", "TraceFiles", "check_jobs", "check_seed", "parse_counts", "warn_as_lines"]


class ClockName(StrEnum):
    """Which clock a guest lives by."""

    VIRTUAL = "virtual"
    WALL = "wall"


def warn_as_lines(trace: str | None) -> str | None:
    """Whoever wants a trace may be warned of it: in a line on standard error, which does not belong among results."""
    if trace is not None:
        import structlog  # takes a quarter of the command's start, and there is nothing else to warn of

        structlog.configure(processors=[_line], logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    return trace


def _line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    details = ", ".join(f"{key}: {value}" for key, value in event.items() if key != "event")
    return f"aiovm: {event['event']} ({details})"


TraceFiles = Annotated[
    str | None, typer.Option(help="Record to .pftrace (Perfetto), .json (Chrome) or .jsonl.", callback=warn_as_lines)
]


def check_seed(seed: int) -> None:
    """Refuse what does not fit 64 bits."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"bad seed {seed}: 64 bits at most")


def check_jobs(jobs: int) -> None:
    """Refuse a negative number of processes; 0 means as many as there are CPUs."""
    if jobs < 0:
        raise ConfigError(f"bad number of processes {jobs}")


def parse_counts(text: str) -> list[int]:
    """``8,4,2``: numbers of physical CPUs."""
    counts = []
    for part in text.split(","):
        try:
            counts.append(int(part))
        except ValueError:
            raise ConfigError(f"bad number of physical CPUs {part!r}") from None
    return counts
