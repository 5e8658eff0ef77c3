"""Results as JSON: the one form of every file that a command or a sweep leaves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["store", "to_json"]


def store(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside, then renamed. What is no file (a pipe) is just written to."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def to_json(value: object) -> bytes:
    """``value`` as JSON, two spaces an indent, with a newline at the end; equal values give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
