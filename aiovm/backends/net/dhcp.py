"""A DHCP server with one lease that never changes (RFC 2131, 2132).

DISCOVER is answered with OFFER; REQUEST with ACK, or NAK when the client wants another address; INFORM with ACK. Every
answer is meant to be broadcast, since the client may not have its address yet. Messages of other clients, RELEASE and
DECLINE are ignored.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ipaddress import IPv4Address

__all__ = ["DHCP_CLIENT", "DHCP_SERVER", "Lease", "answer_dhcp"]

DHCP_SERVER: Final = 67
DHCP_CLIENT: Final = 68

_FIXED = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE: Final = b"\x63\x82\x53\x63"
_DAY: Final = 86_400

_PAD: Final = 0
_NETMASK: Final = 1
_ROUTER: Final = 3
_DNS: Final = 6
_MTU: Final = 26
_WANTED_ADDRESS: Final = 50
_LEASE_TIME: Final = 51
_MESSAGE_TYPE: Final = 53
_SERVER: Final = 54
_END: Final = 255


class _Message(enum.IntEnum):
    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    ACK = 5
    NAK = 6
    INFORM = 8


@dataclass(frozen=True, slots=True)
class Lease:
    """What the guest is told."""

    mac: bytes
    address: IPv4Address
    netmask: IPv4Address
    gateway: IPv4Address
    dns: IPv4Address
    mtu: int


def answer_dhcp(request: bytes, lease: Lease) -> bytes | None:
    """The answer to a client's message; None for none."""
    if len(request) < _FIXED.size:
        return None
    op, hardware, mac_bytes, _, xid, _, flags, ciaddr, _, _, giaddr, chaddr, _, _, cookie = _FIXED.unpack_from(request)
    if (op, hardware, mac_bytes, cookie) != (1, 1, 6, _COOKIE) or chaddr[:6] != lease.mac:
        return None
    options = _options(request[_FIXED.size :])
    kind = int.from_bytes(options.get(_MESSAGE_TYPE, b""), "big")
    address = lease.address.packed
    yours = address
    match kind:
        case _Message.DISCOVER:
            answer = _Message.OFFER
        case _Message.REQUEST:
            if options.get(_SERVER, lease.gateway.packed) != lease.gateway.packed:
                return None
            wanted = options.get(_WANTED_ADDRESS) or ciaddr
            answer = _Message.ACK if wanted == address else _Message.NAK
        case _Message.INFORM:
            answer, yours = _Message.ACK, bytes(4)
        case _:
            return None
    parts = [_option(_MESSAGE_TYPE, bytes((answer,))), _option(_SERVER, lease.gateway.packed)]
    if answer is _Message.NAK:
        yours = bytes(4)
    else:
        if kind != _Message.INFORM:
            parts.append(_option(_LEASE_TIME, _DAY.to_bytes(4, "big")))
        parts += [
            _option(_NETMASK, lease.netmask.packed),
            _option(_ROUTER, lease.gateway.packed),
            _option(_DNS, lease.dns.packed),
            _option(_MTU, lease.mtu.to_bytes(2, "big")),
        ]
    fixed = _FIXED.pack(
        2, 1, 6, 0, xid, 0, flags, bytes(4), yours, lease.gateway.packed, giaddr, chaddr, b"", b"", _COOKIE
    )
    return fixed + b"".join(parts) + bytes((_END,))


def _option(code: int, value: bytes) -> bytes:
    return bytes((code, len(value))) + value


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        size = data[at + 1] if at + 1 < len(data) else 0
        found[data[at]] = data[at + 2 : at + 2 + size]
        at += 2 + size
    return found
