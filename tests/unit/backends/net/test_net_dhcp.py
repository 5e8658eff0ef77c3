"""The DHCP server (RFC 2131)."""

import struct
from ipaddress import IPv4Address

import pytest

from aiovm.backends.net.dhcp import Lease, answer_dhcp

MAC = bytes.fromhex("525400123456")
LEASE = Lease(
    MAC,
    IPv4Address("10.0.2.15"),
    IPv4Address("255.255.255.0"),
    IPv4Address("10.0.2.2"),
    IPv4Address("10.0.2.3"),
    1400,
)


def message(kind, options=b"", *, ciaddr=bytes(4), op=1, mac=MAC, cookie=b"\x63\x82\x53\x63"):
    head = struct.pack(">BBBBIHH", op, 1, 6, 0, 0xCAFE, 3, 0x8000) + ciaddr + bytes(12) + mac + bytes(10 + 64 + 128)
    return head + cookie + (b"\x35\x01" + bytes((kind,)) if kind else b"") + options + b"\xff"


def parse(answer):
    assert answer[:8] == b"\2\1\6\0\0\0\xca\xfe"
    assert answer[28:34] == MAC
    assert answer[236:240] == b"\x63\x82\x53\x63"
    options, at = {}, 240
    while answer[at] != 255:
        options[answer[at]] = answer[at + 2 : at + 2 + answer[at + 1]]
        at += 2 + answer[at + 1]
    return IPv4Address(answer[16:20]), options


def test_discover_is_offered_the_lease():
    address, options = parse(answer_dhcp(message(1, b"\0\0\x37\x02\x01\x03"), LEASE))
    assert address == LEASE.address
    assert options == {
        53: b"\2",
        54: b"\x0a\0\2\2",
        51: (86_400).to_bytes(4, "big"),
        1: b"\xff\xff\xff\0",
        3: b"\x0a\0\2\2",
        6: b"\x0a\0\2\3",
        26: (1400).to_bytes(2, "big"),
    }


@pytest.mark.parametrize(
    ("options", "ciaddr", "kind"),
    [
        (b"\x32\x04\x0a\0\2\x0f", bytes(4), 5),
        (b"\x36\x04\x0a\0\2\2\x32\x04\x0a\0\2\x0f", bytes(4), 5),
        (b"", b"\x0a\0\2\x0f", 5),
        (b"\x32\x04\x0a\0\2\x10", bytes(4), 6),
        (b"", bytes(4), 6),
    ],
)
def test_request_is_acknowledged_for_the_lease_only(options, ciaddr, kind):
    address, answer = parse(answer_dhcp(message(3, options, ciaddr=ciaddr), LEASE))
    assert answer[53] == bytes((kind,))
    assert address == (LEASE.address if kind == 5 else IPv4Address(0))
    assert (51 in answer) is (kind == 5)


def test_inform_gets_settings_without_a_lease():
    address, options = parse(answer_dhcp(message(8, ciaddr=b"\x0a\0\2\x0f"), LEASE))
    assert address == IPv4Address(0)
    assert options[53] == b"\5"
    assert options[3] == b"\x0a\0\2\2"
    assert 51 not in options


@pytest.mark.parametrize(
    "request_",
    [
        message(1)[:239],
        message(1, op=2),
        message(1, cookie=b"\0\0\0\0"),
        message(1, mac=b"\2" * 6),
        message(3, b"\x36\x04\x0a\0\2\x63"),
        message(4),
        message(7),
        message(0),
        message(0, b"\x35"),
    ],
)
def test_everything_else_is_ignored(request_):
    assert answer_dhcp(request_, LEASE) is None
