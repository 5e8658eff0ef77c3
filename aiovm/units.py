"""Units at the edge: what people write (``6ms``, ``64M``) becomes integers, and back.

Inside, time is integer nanoseconds and sizes are integer bytes. Nothing here is a float: a fraction in the
text is read as a decimal and must come out whole.
"""

from __future__ import annotations

import re
from decimal import Decimal

from aiovm.errors import ConfigError

__all__ = ["GIB", "KIB", "MIB", "MS", "SEC", "US", "format_ns", "parse_duration", "parse_size", "whole"]

US = 1_000
MS = 1_000_000
SEC = 1_000_000_000

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s|min)\s*")
_DURATION_UNITS = {"ns": 1, "us": US, "µs": US, "ms": MS, "s": SEC, "min": 60 * SEC}
_SIZE = re.compile(r"\s*(\d+)\s*(|[KMG])(?:i?B)?\s*", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB}


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer from ``low`` to ``high``; else a :class:`ConfigError` that calls it ``name``."""
    if isinstance(value, int) and low <= value and (high is None or value <= high):
        return value
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{name}: {value!r} is not a whole number {bounds}")


def parse_duration(text: str) -> int:
    """Nanoseconds in ``text``: a number and one of ``ns us µs ms s min``.

    >>> parse_duration("6ms"), parse_duration("1.5us")
    (6000000, 1500)
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"bad duration {text!r}: write a number and a unit (ns, us, ms, s or min), as in 6ms")
    value = Decimal(match[1]) * _DURATION_UNITS[match[2]]
    if value != value.to_integral_value():
        raise ConfigError(f"bad duration {text!r}: finer than a nanosecond")
    return int(value)


def parse_size(text: str) -> int:
    """Bytes in ``text``: a whole number and one of ``K M G`` (powers of 1024), or none.

    >>> parse_size("64M")
    67108864
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"bad size {text!r}: write a whole number and K, M or G, as in 64M")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def format_ns(ns: int) -> str:
    """``ns`` for people: three significant digits and a unit.

    >>> format_ns(1_234_567)
    '1.23 ms'
    """
    size = abs(ns)
    if size < US:
        return f"{ns} ns"
    # Rounded first: what rounds up to 1000 µs is written as 1.00 ms.
    step = min(10 ** (len(str(size)) - 3), SEC)
    size = (size + step // 2) // step * step
    unit, name = next((u, n) for u, n in ((SEC, "s"), (MS, "ms"), (US, "µs")) if size >= u)
    whole, rest = divmod(size, unit)
    digits = 2 if whole < 10 else 1 if whole < 100 else 0
    sign = "-" if ns < 0 else ""
    return f"{sign}{whole}.{rest * 10**digits // unit:0{digits}d} {name}" if digits else f"{sign}{whole} {name}"
