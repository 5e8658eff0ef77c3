"""Flat images: bytes that are code from the start, with no header.

Below 1 MiB an image begins in real mode, by default at 0000:7C00 as firmware starts a boot sector: DL is 0x80 (the
first fixed disk), data segments are 0, SP is 0x7C00. At 1 MiB and above it begins in 32-bit protected mode. ``bits``
chooses otherwise: 16, 32 or 64; ``entry`` begins elsewhere than at the first byte.

Source: the PC's boot convention (BIOS Boot Specification 1.01). Not modelled: firmware services (INT 10h
and the rest): the interrupt table is empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.engine.base import Reg
from aiovm.loaders.entry import long_mode, protected_mode, real_mode, stack
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.symbols import Symbols
from aiovm.units import MIB

if TYPE_CHECKING:
    from aiovm.loaders.image import LoadRequest

__all__ = ["load"]

_BOOT_SECTOR = 0x7C00
_FIRST_DISK = 0x80


def load(request: LoadRequest) -> LoadedImage:
    """Bytes at an address."""
    request.takes_no_extras("a flat image")
    size = len(request.image)
    if not size:
        raise request.refuse("empty image")
    base = _BOOT_SECTOR if request.load_address is None else request.load_address
    start = base if request.entry is None else request.entry
    bits = (16 if base < MIB else 32) if request.bits is None else request.bits
    if bits not in (16, 32, 64):
        raise request.refuse(f"bits is {bits}: 16, 32 or 64")
    if not base <= start < base + size:
        raise request.refuse(f"entry {start:#x} lies outside the image at {base:#x}-{base + size:#x}")
    if bits == 16 and start >= MIB:
        raise request.refuse(f"entry {start:#x}: real mode begins below 0x100000")
    request.ram.claim(base, size, "flat image")
    request.ram.write(base, request.image)
    if bits == 16:
        entry = real_mode(start, gpr={Reg.RDX: _FIRST_DISK, Reg.RSP: _BOOT_SECTOR})
    elif bits == 32:
        entry = protected_mode(request.ram, start, gpr={Reg.RSP: stack(request.ram)})
    else:
        code = [(base, base + size)]
        entry = long_mode(request.ram, start, gpr={Reg.RSP: stack(request.ram)}, executable=code)
    return LoadedImage(
        kind="flat",
        name=request.name,
        entry=entry,
        summary=f"flat {bits}-bit image at {base:#x}-{base + size:#x}, entry {start:#x}",
        regions=request.ram.regions,
        symbols=Symbols(),
    )
