"""A DNS server that knows a few names (RFC 1035): one question at a time, addresses (type A) only.

A known name without the wanted type has an empty answer, an unknown one NXDOMAIN; what is no simple query is refused
with the code for it, or not answered at all when it has no header.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DNS_PORT", "answer_dns"]

DNS_PORT: Final = 53

_HEADER = struct.Struct(">HHHHHH")
_TTL: Final = 60
_RESPONSE: Final = 0x8000
_OPCODE: Final = 0x7800
_RECURSION_DESIRED: Final = 0x0100
_RECURSION_AVAILABLE: Final = 0x0080
_FORMAT_ERROR: Final = 1
_NO_SUCH_NAME: Final = 3
_NOT_IMPLEMENTED: Final = 4
_TYPE_A: Final = 1
_CLASS_IN: Final = 1
#: The name in an answer: "as at offset 12", where the question stands.
_POINTER: Final = b"\xc0\x0c"


def answer_dns(query: bytes, names: Mapping[str, str]) -> bytes | None:
    """The answer to ``query`` from ``names`` (name in lower case → address); None for none."""
    if len(query) < _HEADER.size:
        return None
    ident, flags, questions, *_ = _HEADER.unpack_from(query)
    if flags & _RESPONSE:
        return None
    base = _RESPONSE | _RECURSION_AVAILABLE | flags & (_OPCODE | _RECURSION_DESIRED)
    if flags & _OPCODE:
        return _HEADER.pack(ident, base | _NOT_IMPLEMENTED, 0, 0, 0, 0)
    parsed = _question(query) if questions == 1 else None
    if parsed is None:
        return _HEADER.pack(ident, base | _FORMAT_ERROR, 0, 0, 0, 0)
    name, kind, klass, question = parsed
    address = names.get(name)
    if address is None:
        return _HEADER.pack(ident, base | _NO_SUCH_NAME, 1, 0, 0, 0) + question
    if (kind, klass) != (_TYPE_A, _CLASS_IN):
        return _HEADER.pack(ident, base, 1, 0, 0, 0) + question
    record = _POINTER + struct.pack(">HHIH", _TYPE_A, _CLASS_IN, _TTL, 4) + IPv4Address(address).packed
    return _HEADER.pack(ident, base, 1, 1, 0, 0) + question + record


def _question(query: bytes) -> tuple[str, int, int, bytes] | None:
    """(name, type, class, the question's bytes)."""
    labels = []
    at = _HEADER.size
    while at < len(query) and query[at]:
        size = query[at]
        if size > 63:
            return None
        labels.append(query[at + 1 : at + 1 + size].decode("ascii", "replace").lower())
        at += 1 + size
    end = at + 5
    if end > len(query):
        return None
    kind, klass = struct.unpack_from(">HH", query, at + 1)
    return ".".join(labels), kind, klass, query[_HEADER.size : end]
