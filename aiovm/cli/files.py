"""Files that a command writes, where failing is the user's to hear: if possible before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from aiovm.errors import ConfigError
from aiovm.results import store

__all__ = ["check_writable", "write_file"]


def check_writable(path: str | Path) -> None:
    """Refuse a path in a directory that does not exist, a directory, and ``-``, which elsewhere is standard output."""
    if str(path) == "-":
        raise ConfigError("cannot write -: name a file; /dev/stdout is one")
    if Path(path).is_dir():
        raise ConfigError(f"cannot write {path}: Is a directory")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"cannot write {path}: No such directory")


def write_file(path: Path, data: bytes) -> None:
    """Store ``data`` at ``path``, whole or not at all."""
    try:
        store(path, data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
