"""Packets of the virtio socket device (Virtio 1.2, 5.10.6): a header of 44 bytes, then the payload."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["HEADER_BYTES", "HOST_CID", "MAX_PAYLOAD", "STREAM", "Packet", "Shutdown", "VsockOp"]

_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_BYTES: Final = _HEADER.size
#: The well-known context id of the host (5.10.4).
HOST_CID: Final = 2
STREAM: Final = 1
#: Linux' VIRTIO_VSOCK_MAX_PKT_BUF_SIZE (include/linux/virtio_vsock.h, 6.1).
MAX_PAYLOAD: Final = 0x1_0000


class VsockOp(enum.IntEnum):
    """What a packet says."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shutdown(enum.IntFlag):
    """Flags of a SHUTDOWN: the sender will receive, or send, nothing more."""

    NONE = 0
    RECEIVE = 1
    SEND = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet. ``buf_alloc`` and ``fwd_cnt`` are the sender's credit."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    type: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
    payload: bytes = b""

    def pack(self) -> bytes:
        """As it lies in a buffer."""
        header = _HEADER.pack(
            self.src_cid,
            self.dst_cid,
            self.src_port,
            self.dst_port,
            len(self.payload),
            self.type,
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        )
        return header + self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Packet | None:
        """The packet in ``data``, which may be longer; None when it is shorter than it says."""
        if len(data) < HEADER_BYTES:
            return None
        src, dst, src_port, dst_port, length, type_, op, flags, buf_alloc, fwd_cnt = _HEADER.unpack_from(data)
        payload = data[HEADER_BYTES : HEADER_BYTES + length]
        if len(payload) < length:
            return None
        return cls(src, dst, src_port, dst_port, type_, op, flags, buf_alloc, fwd_cnt, payload)
