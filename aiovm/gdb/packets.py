"""GDB's remote protocol, the wire: ``$data#checksum``, acknowledgements, escapes, and the interrupt byte.

Source: the GDB manual, appendix E.1 ("Remote Protocol Overview"). The peer is not trusted: a wrong checksum is refused
and asked for again, what stands between packets is skipped, and a packet that is too long ends the connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

__all__ = ["INTERRUPT", "LONGEST", "PacketStream", "escape", "frame", "unescape"]

#: What :meth:`PacketStream.receive` gives for Ctrl-C.
INTERRUPT: Final = b"\x03"
#: Bytes of a packet's data; told to GDB as PacketSize.
LONGEST: Final = 0x4000
_ESCAPE: Final = 0x7D
_SPECIAL: Final = frozenset(b"#$}*")


def escape(data: bytes) -> bytes:
    """Binary data for a packet."""
    out = bytearray()
    for byte in data:
        out += bytes((_ESCAPE, byte ^ 0x20)) if byte in _SPECIAL else bytes((byte,))
    return bytes(out)


def unescape(data: bytes) -> bytes:
    """What was escaped; an escape with nothing behind it is dropped."""
    out = bytearray()
    escaped = False
    for byte in data:
        if escaped:
            out.append(byte ^ 0x20)
            escaped = False
        elif byte == _ESCAPE:
            escaped = True
        else:
            out.append(byte)
    return bytes(out)


def frame(data: bytes) -> bytes:
    """``data``, already escaped, as a packet."""
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


class PacketStream:
    """One connection's packets. ``acknowledge`` until GDB turns it off (QStartNoAckMode)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.acknowledge = True
        self._last = b""

    async def receive(self) -> bytes | None:
        """The next packet's data, :data:`INTERRUPT`, or None when the peer has gone or misbehaves."""
        while True:
            byte = await self._reader.read(1)
            if not byte:
                return None
            if byte == INTERRUPT:
                return INTERRUPT
            if byte == b"-" and self._last:
                self._writer.write(self._last)
            if byte != b"$":
                continue
            data = await self._data()
            if data is None:
                return None
            given = (await self._reader.read(1)) + (await self._reader.read(1))
            if given.lower() == b"%02x" % (sum(data) & 0xFF):
                if self.acknowledge:
                    self._writer.write(b"+")
                return data
            if self.acknowledge:
                self._writer.write(b"-")

    async def _data(self) -> bytes | None:
        """Up to the ``#``."""
        data = bytearray()
        while (byte := await self._reader.read(1)) != b"#":
            if not byte or len(data) >= 2 * LONGEST:
                return None
            if byte == b"$":
                data.clear()  # the packet was given up, and another one begins
            else:
                data += byte
        return bytes(data)

    async def send(self, data: bytes) -> None:
        """One packet."""
        self._last = frame(data)
        self._writer.write(self._last)
        await self._writer.drain()
