"""A snapshot in a file.

    24 bytes  magic, "aiovm snapshot" and a line end that text conversion would break
     4 bytes  format version
     8 bytes  length of the rest
     4 bytes  CRC-32 of the rest
    the rest  MessagePack: the state as :mod:`aiovm.snapshot` names it, with memory's place empty; then, slot by slot,
              a list of [offset, zlib data], one for each 64 KiB that is not all zeroes

Numbers in the head are little-endian. An integer above 64 bits (the interrupt bitmaps) is extension type 1. A file is
written beside its name and renamed, so a name never holds half a snapshot. It is data, and reading it executes nothing;
what does not hold together is refused with :class:`~aiovm.errors.ConfigError`.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import msgspec

from aiovm.errors import ConfigError
from aiovm.snapshot import CHUNK, SlotImage, Snapshot

__all__ = ["FORMAT", "pack", "read", "unpack", "write"]

#: Raised whenever a saved field comes, goes or changes its meaning.
FORMAT: Final = 5
_MAGIC: Final = b"aiovm snapshot\r\n\x1a\n".ljust(24, b"\0")
_HEAD: Final = struct.Struct("<24sIQI")
_BIG: Final = 1
_FASTEST: Final = 1

_Tree = object


def write(path: str | Path, snapshot: Snapshot) -> None:
    """Store ``snapshot`` at ``path``."""
    beside = f"{path}.{os.getpid()}.part"
    try:
        try:
            Path(beside).write_bytes(pack(snapshot))
            Path(beside).replace(path)
        finally:
            Path(beside).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the snapshot {path}: {error.strerror}") from error


def read(path: str | Path) -> Snapshot:
    """The snapshot at ``path``."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the snapshot {path}: {error.strerror}") from error
    try:
        return unpack(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def pack(snapshot: Snapshot) -> bytes:
    """The file's bytes."""
    state = msgspec.to_builtins(replace(snapshot, memory=()), builtin_types=(bytes, bytearray))
    slots = [
        [replace(image, chunks=()), [(at, zlib.compress(piece, _FASTEST)) for at, piece in image.chunks]]
        for image in snapshot.memory
    ]
    body = msgspec.msgpack.encode([_small(state), slots])
    return _HEAD.pack(_MAGIC, FORMAT, len(body), zlib.crc32(body)) + body


def unpack(data: bytes) -> Snapshot:
    """The snapshot in a file's bytes."""
    if len(data) < _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
        raise ConfigError("not a snapshot of aiovm's")
    _magic, version, length, checksum = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if version != FORMAT:
        raise ConfigError(f"a snapshot of format {version}; this aiovm reads format {FORMAT}")
    if len(body) != length or zlib.crc32(body) != checksum:
        raise ConfigError(f"the snapshot is damaged: {len(body)} of {length} bytes, or some of them changed")
    try:
        state, slots = msgspec.msgpack.decode(body, ext_hook=_grow)
        snapshot = msgspec.convert(state, Snapshot, builtin_types=(bytes, bytearray))
        memory = tuple(_swell(msgspec.convert(image, SlotImage), chunks) for image, chunks in slots)
    except (msgspec.MsgspecError, ValueError, TypeError, zlib.error) as error:
        raise ConfigError(f"the snapshot does not hold together: {error}") from error
    return replace(snapshot, memory=memory)


def _swell(image: SlotImage, squeezed: list[tuple[int, bytes]]) -> SlotImage:
    chunks = []
    for at, data in squeezed:
        room = min(CHUNK, image.size - at)
        piece = zlib.decompressobj().decompress(data, CHUNK + 1)
        if at % CHUNK or len(piece) != room:
            raise ValueError(f"memory at {image.base + at:#x} is {len(piece)} bytes, not {room}")
        chunks.append((at, piece))
    return replace(image, chunks=tuple(chunks))


def _small(tree: _Tree) -> _Tree:
    """MessagePack's integers end at 64 bits."""
    if isinstance(tree, dict):
        return {name: _small(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_small(value) for value in tree]
    if isinstance(tree, int) and not -(1 << 63) <= tree < 1 << 64:
        return msgspec.msgpack.Ext(_BIG, tree.to_bytes(tree.bit_length() // 8 + 1, "little", signed=True))
    return tree


def _grow(code: int, data: memoryview) -> object:
    if code != _BIG:
        raise ValueError(f"unknown extension {code}")
    return cast("object", int.from_bytes(data, "little", signed=True))
