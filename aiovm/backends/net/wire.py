"""Frames, packets and segments as values, to and from bytes (Ethernet II; RFC 791, 768, 792, 826, 9293).

Rules: ``parse_*`` answers None for anything that is cut short, has a wrong checksum or is not understood; the guest may
send what it likes. IP options are skipped. Not modelled: fragments (dropped), IPv6.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

__all__ = [
    "ARP",
    "BROADCAST",
    "ICMP",
    "IPV4",
    "TCP",
    "UDP",
    "Arp",
    "Datagram",
    "Frame",
    "Packet",
    "Segment",
    "TcpFlag",
    "checksum",
    "parse_arp",
    "parse_datagram",
    "parse_frame",
    "parse_packet",
    "parse_segment",
]

IPV4: Final = 0x0800
ARP: Final = 0x0806
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
BROADCAST: Final = b"\xff" * 6

_MAX_TTL: Final = 64
_SHORTEST_FRAME: Final = 60
_ARP = struct.Struct(">HHBBH6s4s6s4s")
_IP = struct.Struct(">BBHHHBBH4s4s")
_TCP = struct.Struct(">HHIIBBHHH")
_OPTION_END: Final = 0
_OPTION_NOTHING: Final = 1
_OPTION_MSS: Final = 2


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); 0 over data that holds its own correct checksum.

    A sum of 16-bit words with the carries added is the number itself modulo 0xFFFF, whatever its length.
    """
    if len(data) & 1:
        data += b"\0"
    return -int.from_bytes(data, "big") % 0xFFFF


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame without its check sequence."""

    dst: bytes
    src: bytes
    kind: int
    payload: bytes

    def pack(self) -> bytes:
        """As it is on the wire, padded."""
        return (self.dst + self.src + self.kind.to_bytes(2, "big") + self.payload).ljust(_SHORTEST_FRAME, b"\0")


def parse_frame(data: bytes) -> Frame | None:
    """The frame in ``data``."""
    if len(data) < 14:
        return None
    return Frame(data[:6], data[6:12], int.from_bytes(data[12:14], "big"), data[14:])


@dataclass(frozen=True, slots=True)
class Arp:
    """An ARP message: ``op`` 1 asks, 2 answers."""

    op: int
    sender_mac: bytes
    sender: IPv4Address
    target_mac: bytes
    target: IPv4Address

    def pack(self) -> bytes:
        """The message of an Ethernet and IPv4 network."""
        return _ARP.pack(
            1, IPV4, 6, 4, self.op, self.sender_mac, self.sender.packed, self.target_mac, self.target.packed
        )


def parse_arp(data: bytes) -> Arp | None:
    """The message in ``data``."""
    if len(data) < _ARP.size:
        return None
    hardware, protocol, mac_bytes, ip_bytes, op, sender_mac, sender, target_mac, target = _ARP.unpack_from(data)
    if (hardware, protocol, mac_bytes, ip_bytes) != (1, IPV4, 6, 4):
        return None
    return Arp(op, sender_mac, IPv4Address(sender), target_mac, IPv4Address(target))


@dataclass(frozen=True, slots=True)
class Packet:
    """An IPv4 packet."""

    src: IPv4Address
    dst: IPv4Address
    protocol: int
    payload: bytes

    def pack(self) -> bytes:
        """With a header of 20 bytes."""
        length = _IP.size + len(self.payload)
        head = (0x45, 0, length, 0, 0x4000, _MAX_TTL, self.protocol)
        total = checksum(_IP.pack(*head, 0, self.src.packed, self.dst.packed))
        return _IP.pack(*head, total, self.src.packed, self.dst.packed) + self.payload

    def pseudo_header(self, length: int) -> bytes:
        """What the checksums of UDP and TCP cover besides their own bytes."""
        return self.src.packed + self.dst.packed + struct.pack(">HH", self.protocol, length)


def parse_packet(data: bytes) -> Packet | None:
    """The packet in ``data``, which may have padding behind it."""
    if len(data) < _IP.size:
        return None
    version, _, length, _, fragment, _, protocol, _, src, dst = _IP.unpack_from(data)
    header = 4 * (version & 0xF)
    if version >> 4 != 4 or not _IP.size <= header <= length <= len(data):
        return None
    # More fragments, or an offset.
    if fragment & 0x3FFF or checksum(data[:header]):
        return None
    return Packet(IPv4Address(src), IPv4Address(dst), protocol, data[header:length])


@dataclass(frozen=True, slots=True)
class Datagram:
    """A UDP datagram."""

    src_port: int
    dst_port: int
    payload: bytes

    def packet(self, src: IPv4Address, dst: IPv4Address) -> Packet:
        """Inside a packet."""
        length = 8 + len(self.payload)
        body = struct.pack(">HHHH", self.src_port, self.dst_port, length, 0) + self.payload
        total = checksum(Packet(src, dst, UDP, b"").pseudo_header(length) + body)
        # A sum of zero is sent as its other form: zero means "none" (RFC 768).
        return Packet(src, dst, UDP, body[:6] + (total or 0xFFFF).to_bytes(2, "big") + self.payload)


def parse_datagram(packet: Packet) -> Datagram | None:
    """The datagram in ``packet``."""
    data = packet.payload
    if len(data) < 8:
        return None
    src_port, dst_port, length, total = struct.unpack_from(">HHHH", data)
    if not 8 <= length <= len(data):
        return None
    data = data[:length]
    if total and checksum(packet.pseudo_header(length) + data):
        return None
    return Datagram(src_port, dst_port, data[8:])


class TcpFlag(enum.IntFlag):
    """Control bits of a segment."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment. ``mss``: the option that comes with SYN, 0 for none."""

    src_port: int
    dst_port: int
    seq: int
    ack: int
    flags: TcpFlag
    window: int
    payload: bytes = b""
    mss: int = 0

    @property
    def length(self) -> int:
        """How far it moves the sequence."""
        return len(self.payload) + bool(self.flags & TcpFlag.SYN) + bool(self.flags & TcpFlag.FIN)

    def packet(self, src: IPv4Address, dst: IPv4Address) -> Packet:
        """Inside a packet."""
        options = struct.pack(">BBH", _OPTION_MSS, 4, self.mss) if self.mss else b""
        size = (_TCP.size + len(options)) // 4 << 4
        head = (self.src_port, self.dst_port, self.seq, self.ack, size, self.flags, self.window)
        rest = options + self.payload
        pseudo = Packet(src, dst, TCP, b"").pseudo_header(_TCP.size + len(rest))
        total = checksum(pseudo + _TCP.pack(*head, 0, 0) + rest)
        return Packet(src, dst, TCP, _TCP.pack(*head, total, 0) + rest)


def parse_segment(packet: Packet) -> Segment | None:
    """The segment in ``packet``."""
    data = packet.payload
    if len(data) < _TCP.size or checksum(packet.pseudo_header(len(data)) + data):
        return None
    src_port, dst_port, seq, ack, size, flags, window, _, _ = _TCP.unpack_from(data)
    header = size >> 4 << 2
    if not _TCP.size <= header <= len(data):
        return None
    mss = _find_mss(data[_TCP.size : header])
    return Segment(src_port, dst_port, seq, ack, TcpFlag(flags & 0x1F), window, data[header:], mss)


def _find_mss(options: bytes) -> int:
    at = 0
    while at + 1 < len(options) and options[at] != _OPTION_END:
        if options[at] == _OPTION_NOTHING:
            at += 1
            continue
        size = options[at + 1]
        if size < 2:
            break
        if options[at] == _OPTION_MSS and size == 4 and at + 4 <= len(options):
            return int.from_bytes(options[at + 2 : at + 4], "big")
        at += size
    return 0
