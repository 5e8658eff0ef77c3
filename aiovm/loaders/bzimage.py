"""Linux's bzImage: a setup header, a decompressor, and the kernel packed inside it.

By default the kernel is unpacked here and loaded as the ELF file that it is: it starts at once, where the guest's own
decompressor would run for many emulated seconds. With ``unpack=False`` the decompressor runs, at the address that the
kernel prefers (a relocatable kernel may move up from it), through the entry 0x200 bytes into its code (the first
byte of a 32-bit kernel's). So does an image that holds no packed kernel (its payload has no bytes: MemTest86+).

Source: Documentation/arch/x86/boot.rst (Linux 6.16); header fields by their offset there. Modelled: protocol 2.08 and
later (payload fields), the 32-bit entry and from 2.12 on the 64-bit one. Not modelled: the real-mode and EFI entries,
KASLR when unpacked here (the kernel lies where it was linked).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from aiovm.loaders import elf
from aiovm.loaders.checksum import check
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.linux import HDRS, SETUP, enter
from aiovm.loaders.symbols import Symbols
from aiovm.loaders.unpack import unpack
from aiovm.units import GIB

if TYPE_CHECKING:
    from aiovm.loaders.image import LoadRequest

__all__ = ["is_bzimage", "load"]

_SECTOR = 512
_BOOT_FLAG = 0xAA55
_WITH_CMDLINE_SIZE = 0x206
_WITH_PAYLOAD = 0x208
_WITH_XLOADFLAGS = 0x20C
_CMDLINE_DEFAULT = 255
_XLF_KERNEL_64 = 1
_ENTRY_64 = 0x200


def is_bzimage(request: LoadRequest) -> bool:
    """Whether the boot sector's flag and the header's signature stand where they should."""
    image = request.image
    return image[0x1FE:0x200] == _BOOT_FLAG.to_bytes(2, "little") and image[0x202:0x206] == HDRS.to_bytes(4, "little")


def load(request: LoadRequest) -> LoadedImage:
    """The kernel, unpacked or with its decompressor."""
    if not is_bzimage(request):
        raise request.refuse("no Linux setup header: the signature HdrS is missing at 0x202")
    (version,) = request.fields("H", 0x206, "setup header")
    if version < _WITH_PAYLOAD:
        raise request.refuse(f"Linux boot protocol {version:#x}: 0x208 (Linux 2.6.26) or later")
    (sectors,) = request.fields("B", SETUP, "setup header")
    code_at = ((sectors or 4) + 1) * _SECTOR
    setup = request.piece(SETUP, 0x11 + request.image[0x201], "setup header")
    release = _release(request)
    check(request, code_at, release)
    payload, length = request.fields("II", 0x248, "setup header")
    if request.unpack and length:
        kernel = request.piece(code_at + payload, length, "payload")
        rip, bits, how, symbols = _load_unpacked(request, kernel)
    else:
        rip, bits, how, symbols = _load_packed(request, code_at, version)
    (initrd_max,) = request.fields("I", 0x22C, "setup header")
    cmdline_max = request.fields("I", 0x238, "setup header")[0] if version >= _WITH_CMDLINE_SIZE else _CMDLINE_DEFAULT
    entry = enter(request, rip, bits=bits, setup=bytes(setup), cmdline_max=cmdline_max, initrd_max=initrd_max)
    return LoadedImage(
        kind="bzimage",
        name=request.name,
        entry=entry,
        summary=f"Linux {release}{how}",
        regions=request.ram.regions,
        symbols=symbols,
    )


def _load_unpacked(request: LoadRequest, payload: memoryview) -> tuple[int, int, str, Symbols]:
    codec, kernel = unpack(request, payload)
    inner = dataclasses.replace(request, image=kernel)
    image = elf.parse(inner)
    elf.place(inner, image)
    return image.entry, image.bits, f"{codec}, {image.describe()}", Symbols(kernel, request.name)


def _load_packed(request: LoadRequest, code_at: int, version: int) -> tuple[int, int, str, Symbols]:
    flags = request.fields("H", 0x236, "setup header")[0] if version >= _WITH_XLOADFLAGS else 0
    bits, entry = (64, _ENTRY_64) if flags & _XLF_KERNEL_64 else (32, 0)
    alignment, relocatable = request.fields("IB", 0x230, "setup header")
    preferred, room = request.fields("QI", 0x258, "setup header")
    code = request.piece(code_at, len(request.image) - code_at, "kernel") if code_at < len(request.image) else b""
    if len(code) <= entry:
        raise request.refuse(f"truncated: kernel at {code_at:#x}, the image has {len(request.image):#x} bytes")
    size = max(room, len(code))
    windows = ((preferred, 4 * GIB if relocatable else preferred + size),)
    base = request.ram.place(size, "kernel", align=max(alignment, 1), windows=windows)
    request.ram.write(base, code)
    return base + entry, bits, f"packed, at {base:#x}-{base + size:#x}, entry {base + entry:#x}", Symbols()


def _release(request: LoadRequest) -> str:
    """``6.1.0-50-cloud-amd64, `` where the header points to it."""
    (at,) = request.fields("H", 0x20E, "setup header")
    words = request.image[at + 0x200 : at + 0x240].split(b"\0")[0].split()
    release = words[0].decode("ascii", "replace") if at and words else ""
    return f"{release}, " if release.isprintable() and release else ""
