"""Frames, packets and segments to and from bytes, against octets written out from the RFCs."""

from ipaddress import IPv4Address

import pytest

from aiovm.backends.net.wire import (
    Arp,
    Datagram,
    Frame,
    Packet,
    Segment,
    TcpFlag,
    checksum,
    parse_arp,
    parse_datagram,
    parse_frame,
    parse_packet,
    parse_segment,
)

A, B = IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2")


def slow_checksum(data):
    """RFC 1071's own loop."""
    if len(data) % 2:
        data += b"\0"
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@pytest.mark.parametrize("data", [b"", b"\1", b"\0\1\xf2\3\xf4\xf5\xf6\xf7", bytes(range(251)), b"\xff" * 1501])
def test_checksum_is_rfc_1071s(data):
    assert checksum(data) % 0xFFFF == slow_checksum(data) % 0xFFFF


def test_a_known_header_has_its_known_checksum():
    header = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")
    assert checksum(header) == 0
    assert checksum(header[:10] + b"\0\0" + header[12:]) == 0xB861


def test_frames_are_padded_to_60():
    frame = Frame(b"\1" * 6, b"\2" * 6, 0x0806, b"hi")
    data = frame.pack()
    assert data == b"\1" * 6 + b"\2" * 6 + b"\x08\x06hi" + bytes(44)
    assert parse_frame(data) == Frame(b"\1" * 6, b"\2" * 6, 0x0806, b"hi" + bytes(44))
    assert parse_frame(data[:13]) is None


def test_arp():
    arp = Arp(1, b"\2" * 6, A, bytes(6), B)
    data = arp.pack()
    assert data == bytes.fromhex("0001 0800 06 04 0001 020202020202 0a00020f 000000000000 0a000202")
    assert parse_arp(data + bytes(18)) == arp
    assert parse_arp(data[:27]) is None
    assert parse_arp(b"\0\2" + data[2:]) is None


def test_packets():
    packet = Packet(A, B, 17, b"payload")
    data = packet.pack()
    assert data[:10] == bytes.fromhex("4500 001b 0000 4000 4011")
    assert data[12:] == A.packed + B.packed + b"payload"
    assert slow_checksum(data[:20]) == 0
    assert parse_packet(data + bytes(20)) == packet


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 0x65), (0, 0x44), (0, 0x4F), (2, 0xFF), (3, 19), (6, 0x20), (7, 1), (10, 0)],
)
def test_packets_that_are_wrong(at, value):
    data = bytearray(Packet(A, B, 17, b"payload").pack())
    data[at] = value
    if at != 10:
        data[10:12] = b"\0\0"
        data[10:12] = slow_checksum(bytes(data[:20])).to_bytes(2, "big")
    assert parse_packet(bytes(data)) is None
    assert parse_packet(bytes(data[:19])) is None


def test_ip_options_are_skipped():
    data = bytearray(Packet(A, B, 17, b"\1\1\1\1body").pack())
    data[0] = 0x46
    data[10:12] = b"\0\0"
    data[10:12] = slow_checksum(bytes(data[:24])).to_bytes(2, "big")
    assert parse_packet(bytes(data)).payload == b"body"


def test_datagrams():
    packet = Datagram(1000, 53, b"question").packet(A, B)
    assert packet.payload[:6] == bytes.fromhex("03e8 0035 0010")
    assert slow_checksum(A.packed + B.packed + b"\0\x11\0\x10" + packet.payload) == 0
    assert parse_datagram(packet) == Datagram(1000, 53, b"question")
    without = Packet(A, B, 17, packet.payload[:6] + b"\0\0" + b"question")
    assert parse_datagram(without) == Datagram(1000, 53, b"question")
    for data in (
        packet.payload[:7],
        packet.payload[:-1],
        packet.payload[:-1] + b"x",
        b"\3\xe8\0\x35\0\7\0\0",
    ):
        assert parse_datagram(Packet(A, B, 17, data)) is None


def test_segments():
    segment = Segment(80, 1024, 0xFFFF_FFFF, 5, TcpFlag.ACK | TcpFlag.PSH, 4096, b"data")
    packet = segment.packet(A, B)
    assert packet.payload[:16] == bytes.fromhex("0050 0400 ffffffff 00000005 50 18 1000")
    assert slow_checksum(A.packed + B.packed + b"\0\x06\0\x18" + packet.payload) == 0
    assert parse_segment(packet) == segment
    assert segment.length == 4
    syn = Segment(80, 1024, 1, 0, TcpFlag.SYN, 1, mss=1460)
    assert syn.packet(A, B).payload[12:][8:] == bytes.fromhex("020405b4")
    assert parse_segment(syn.packet(A, B)) == syn
    assert Segment(1, 2, 3, 4, TcpFlag.SYN | TcpFlag.FIN, 0).length == 2


def with_checksum(data):
    total = slow_checksum(
        A.packed + B.packed + b"\0\x06" + len(data).to_bytes(2, "big") + data[:16] + b"\0\0" + data[18:]
    )
    return Packet(A, B, 6, data[:16] + total.to_bytes(2, "big") + data[18:])


@pytest.mark.parametrize(
    ("options", "mss"),
    [("01010101", 0), ("0101020405b400", 0x5B4), ("00020405b4", 0), ("0200", 0), ("0204", 0), ("0303050204", 0)],
)
def test_options_are_walked_with_care(options, mss):
    raw = bytes.fromhex(options)
    raw = raw.ljust(-(-len(raw) // 4) * 4, b"\0")
    head = bytearray(Segment(1, 2, 3, 4, TcpFlag.SYN, 5).packet(A, B).payload)
    head[12] = (20 + len(raw)) // 4 << 4
    assert parse_segment(with_checksum(bytes(head) + raw)).mss == mss


def test_segments_that_are_wrong():
    data = Segment(80, 1024, 1, 5, TcpFlag.ACK, 4096, b"data").packet(A, B).payload
    assert parse_segment(Packet(A, B, 6, data[:19])) is None
    assert parse_segment(Packet(A, B, 6, data[:-1] + b"!")) is None
    for size in (0x40, 0xF0):
        assert parse_segment(with_checksum(data[:12] + bytes((size,)) + data[13:])) is None
