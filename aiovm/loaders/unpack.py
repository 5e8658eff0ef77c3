"""The codecs that Linux packs its kernel with: told apart by their first bytes, bounded by the size at the end.

The last four bytes of a payload are the unpacked size (gzip's own trailer says the same); a stream that does not give
exactly that is damaged. gzip, bzip2, xz and lzma come with Python; lz4 and zstd need a package each, the optional
dependencies ``aiovm[linux]``.

Source: Documentation/arch/x86/boot.rst (payload_offset), scripts/Makefile.lib (Linux 6.16), the LZ4 legacy frame
format (lz4_Frame_format.md). Not modelled: LZO, which no distribution uses.
"""

from __future__ import annotations

import bz2
import importlib
import io
import lzma
import zlib
from typing import TYPE_CHECKING, Any

from aiovm.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.loaders.image import LoadRequest

__all__ = ["unpack"]

_LARGEST = GIB
_LZ4_BLOCK = 8 * MIB
_GZIP_WINDOW = 31  # 32 KiB, with gzip's header and trailer


def _gzip(_: Any, data: memoryview, size: int) -> bytes:
    return zlib.decompressobj(_GZIP_WINDOW).decompress(data, size + 1)


def _bzip2(_: Any, data: memoryview, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _xz(_: Any, data: memoryview, size: int) -> bytes:
    return lzma.LZMADecompressor().decompress(data, size + 1)


def _lz4(block: Any, data: memoryview, size: int) -> bytes:
    """The legacy format: a magic number, then blocks with their lengths; the size says where they end."""
    unpacked = io.BytesIO()
    at = 4
    while unpacked.tell() < size:
        length = int.from_bytes(data[at : at + 4], "little")
        part = block.decompress(data[at + 4 : at + 4 + length], uncompressed_size=_LZ4_BLOCK)
        if not part:
            break
        unpacked.write(part)
        at += 4 + length
    return unpacked.getvalue()


def _zstd(zstandard: Any, data: memoryview, size: int) -> bytes:
    unpacked: bytes = zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
    return unpacked


#: First bytes, name, package to import, function.
_CODECS: tuple[tuple[bytes, str, str | None, Callable[[Any, memoryview, int], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", None, _gzip),
    (b"BZh", "bzip2", None, _bzip2),
    (b"\xfd7zXZ\0", "xz", None, _xz),
    (b"\x5d\0\0", "lzma", None, _xz),
    (b"\x02\x21\x4c\x18", "lz4", "lz4.block", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstandard", _zstd),
)


def unpack(request: LoadRequest, payload: memoryview) -> tuple[str, bytes]:
    """The codec's name and the kernel."""
    size = int.from_bytes(payload[-4:], "little")
    head = bytes(payload[:8])
    found = next((codec for codec in _CODECS if head.startswith(codec[0])), None)
    if found is None:
        raise request.refuse(f"payload begins with {head.hex(' ')}: no codec that is known here")
    _, name, package, function = found
    if size > _LARGEST:
        raise request.refuse(f"{name} payload says that it unpacks to {size:#x} bytes")
    module = None
    if package is not None:
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise request.refuse(
                f"kernel packed with {name}: install the package {package.split('.')[0]} (aiovm[linux])"
            ) from error
    # Each codec has its own errors, some derived from Exception alone: the boundary is here.
    try:
        unpacked = function(module, payload, size)
    except Exception as error:
        raise request.refuse(f"damaged {name} payload: {error!r}") from error
    if len(unpacked) != size:
        raise request.refuse(f"damaged {name} payload: it does not unpack to the {size:#x} bytes that it says")
    return name, unpacked
