"""Results as JSON: the one form of every file that a command or a sweep leaves."""

from __future__ import annotations

import msgspec

__all__ = ["to_json"]


def to_json(value: object) -> bytes:
    """``value`` as JSON, two spaces an indent, with a newline at the end; equal values give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
