"""Options that several commands have, and what they refuse."""

from __future__ import annotations

from enum import StrEnum

from aiovm.errors import ConfigError

__all__ = ["ClockName", "check_jobs", "check_seed", "parse_counts"]


class ClockName(StrEnum):
    """Which clock a guest lives by."""

    VIRTUAL = "virtual"
    WALL = "wall"


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
