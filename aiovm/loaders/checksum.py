"""The checksum at the end of a bzImage: a damaged kernel is told before it runs.

The build appends a CRC-32 (polynomial 0x04C11DB7, first remainder all ones, not inverted), so that the remainder over
the whole image, whose length ``syssize`` gives, is 0. In a kernel that was signed for UEFI afterwards three fields of
the PE header are filled in, the checksum and the place of the certificates behind the image. They were 0 when the CRC
was made, and are taken as 0 here.

Source: Documentation/arch/x86/boot.rst, "The Image Checksum" (protocol 2.08); arch/x86/boot/tools/build.c (Linux 6.1).
Linux 6.16 builds no checksum any more, and no field says so: it is looked for up to 6.15.
"""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiovm.loaders.image import LoadRequest

__all__ = ["check"]

_PARAGRAPH = 16
_SYSSIZE = 0x1F4
#: Where the PE header's place stands; from it on the optional header's magic and checksum,
#: and where it has its certificates, by its magic (PE32, PE32+).
_PE_AT = 0x3C
_MAGIC, _CHECKSUM = 24, 24 + 64
_CERTIFICATES = {0x10B: 24 + 96 + 4 * 8, 0x20B: 24 + 112 + 4 * 8}
_SETUP = 0x1F1
_WITHOUT = (6, 16)
#: ``zlib.crc32`` gives the remainder inverted.
_GOOD = 0xFFFF_FFFF


def check(request: LoadRequest, code_at: int, release: str) -> None:
    """Refuse an image whose bytes are not those that were built. ``release``: as ``uname -r`` prints it, or empty."""
    (paragraphs,) = request.fields("I", _SYSSIZE, "setup header")
    version = re.match(r"(\d+)\.(\d+)", release)
    if not paragraphs or version is None or (int(version[1]), int(version[2])) >= _WITHOUT:
        return
    end = code_at + paragraphs * _PARAGRAPH
    if end > len(request.image):
        raise request.refuse(f"truncated: a kernel of {end:#x} bytes, the image has {len(request.image):#x}")
    image = memoryview(request.image)
    header = bytearray(image[:code_at])
    _unsign(header)
    if zlib.crc32(image[code_at:end], zlib.crc32(header)) != _GOOD:
        raise request.refuse("damaged: the image's checksum is wrong")


def _unsign(header: bytearray) -> None:
    """Clear what signing filled in."""
    pe = int.from_bytes(header[_PE_AT : _PE_AT + 4], "little")
    certificates = _CERTIFICATES.get(int.from_bytes(header[pe + _MAGIC : pe + _MAGIC + 2], "little"))
    if header[pe : pe + 4] != b"PE\0\0" or certificates is None or pe + certificates + 8 > _SETUP:
        return
    header[pe + _CHECKSUM : pe + _CHECKSUM + 4] = bytes(4)
    header[pe + certificates : pe + certificates + 8] = bytes(8)
