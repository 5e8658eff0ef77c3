"""Multiboot 1 images, and the information that the loader leaves for them.

The header lies in the first 8192 bytes on a 4-byte boundary. Its flags ask: bit 0 modules on page boundaries (they
always are), bit 1 memory information (always given), bit 2 a video mode (there is no display: none is set), bit 16 load
by the header's own addresses instead of ELF. Other bits below 16 are requirements that nobody here knows: refused.

The image begins in protected mode with EAX = 0x2BADB002, EBX = the information, no paging, interrupts off. The
information block (with its memory map, module list and strings) and a GDT lie in low memory; modules follow the image,
each on a page boundary.

Source: Multiboot Specification 0.6.96, 3.1 to 3.3; an ELF64 file with a 32-bit entry is taken as well, as GRUB does.
Modelled: memory sizes and map, command line (the image's name first), modules, loader name.
Not modelled: boot device, symbols, drives, configuration table, APM, VBE and framebuffer: their flags are 0.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from aiovm.engine.base import Reg
from aiovm.loaders import elf
from aiovm.loaders.entry import protected_mode
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.ram import HIGH, MemoryType, memory_map
from aiovm.loaders.symbols import Symbols
from aiovm.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiovm.loaders.image import LoadRequest, PlacedModule

__all__ = ["is_multiboot", "load"]

_HEADER_MAGIC = 0x1BADB002
_LOADER_MAGIC = 0x2BADB002
_SEARCH = 8192

_WANTS_VIDEO = 1 << 2
_HAS_ADDRESSES = 1 << 16
_UNKNOWN_REQUIREMENTS = 0xFFF8

_INFO_SIZE = 116
_INFO_MEMORY = 1 << 0
_INFO_CMDLINE = 1 << 2
_INFO_MODULES = 1 << 3
_INFO_MAP = 1 << 6
_INFO_LOADER_NAME = 1 << 9
_LOADER_NAME = "aiovm"


class _Header(NamedTuple):
    """The header's place in the file and its words; the addresses count with flag bit 16."""

    offset: int
    flags: int
    header_addr: int
    load_addr: int
    load_end_addr: int
    bss_end_addr: int
    entry_addr: int


def is_multiboot(request: LoadRequest) -> bool:
    """Whether the magic number stands where a header may be; its checksum is for :func:`load`."""
    return next(_magics(request.image), None) is not None


def _magics(image: bytes) -> Iterator[int]:
    """Offsets of the magic number in the search area; the three checked words must lie inside it."""
    magic = struct.pack("<I", _HEADER_MAGIC)
    area = image[:_SEARCH]
    at = area.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(area):
            yield at
        at = area.find(magic, at + 1)


def _header(request: LoadRequest) -> _Header:
    wrong = None
    for at in _magics(request.image):
        magic, flags, checksum = request.fields("3I", at, "Multiboot header")
        if (magic + flags + checksum) & 0xFFFF_FFFF:
            wrong = at if wrong is None else wrong
            continue
        if flags & _UNKNOWN_REQUIREMENTS:
            raise request.refuse(
                f"Multiboot header requires what is not supported: flag bits {flags & _UNKNOWN_REQUIREMENTS:#x}"
            )
        addresses = request.fields("5I", at + 12, "Multiboot header addresses") if flags & _HAS_ADDRESSES else (0,) * 5
        return _Header(at, flags, *addresses)
    if wrong is None:
        raise request.refuse("no Multiboot header in the first 0x2000 bytes")
    raise request.refuse(f"bad Multiboot header checksum at {wrong:#x}")


def load(request: LoadRequest) -> LoadedImage:
    """The image, its modules and its information."""
    header = _header(request)
    if header.flags & _HAS_ADDRESSES:
        start, end, what = _load_by_addresses(request, header)
    else:
        start, end, what = _load_elf(request)
    modules = request.place_modules(((max(end, MIB), 4 * GIB), *HIGH))
    info = _place_information(request, modules)
    entry = protected_mode(request.ram, start, gpr={Reg.RAX: _LOADER_MAGIC, Reg.RBX: info})
    parts = [f"Multiboot {what}"]
    if modules:
        parts.append(f"{len(modules)} module" + ("s" if len(modules) > 1 else ""))
    if header.flags & _WANTS_VIDEO:
        parts.append("asks for a video mode: none is set")
    return LoadedImage(
        kind="multiboot",
        name=request.name,
        entry=entry,
        summary=", ".join(parts),
        regions=request.ram.regions,
        symbols=Symbols(request.image if elf.is_elf(request) else b"", request.name),
    )


def _load_elf(request: LoadRequest) -> tuple[int, int, str]:
    image = elf.parse(request)
    elf.place(request, image)
    return image.entry, image.end, image.describe()


def _load_by_addresses(request: LoadRequest, header: _Header) -> tuple[int, int, str]:
    """The a.out kludge: where the header itself lies tells where the text begins in the file."""
    base = header.load_addr
    offset = header.offset - (header.header_addr - base)
    if header.header_addr < base or offset < 0:
        raise request.refuse(
            f"Multiboot header at {header.offset:#x} says that it lies at {header.header_addr:#x}, "
            f"the load address is {base:#x}"
        )
    load_end = header.load_end_addr or base + len(request.image) - offset
    end = header.bss_end_addr or load_end
    if not base < load_end <= end:
        raise request.refuse(f"Multiboot addresses are out of order: load {base:#x}-{load_end:#x}, bss to {end:#x}")
    if not base <= header.entry_addr < end:
        raise request.refuse(f"entry {header.entry_addr:#x} lies outside the image at {base:#x}-{end:#x}")
    text = request.piece(offset, load_end - base, "text and data")
    request.ram.claim(base, end - base, "image")
    request.ram.write(base, text)
    request.ram.clear(load_end, end - load_end)
    return header.entry_addr, end, f"image at {base:#x}-{end:#x}, entry {header.entry_addr:#x}"


def _place_information(request: LoadRequest, modules: list[PlacedModule]) -> int:
    """One block: the information, the module list, the memory map, the strings; its address."""
    memory = memory_map(request.ram.memory)
    ranges = b"".join(struct.pack("<IQQI", 20, *entry) for entry in memory)
    strings = [
        request.text(f"{request.name} {request.cmdline}".rstrip(), "command line"),
        request.text(_LOADER_NAME, "loader name"),
        *(m.string for m in modules),
    ]
    sizes = [_INFO_SIZE, 16 * len(modules), len(ranges), *map(len, strings)]
    base = request.ram.place(sum(sizes), "Multiboot information")
    _, list_at, map_at, cmdline_at, loader_at, *strings_at = accumulate(sizes[:-1], initial=base)
    lower, upper = (next((e.size for e in memory if e.type is MemoryType.RAM and e.base == b), 0) for b in (0, MIB))
    fields = {
        0: _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODULES | _INFO_MAP | _INFO_LOADER_NAME,
        4: lower // KIB,
        8: upper // KIB,
        16: cmdline_at,
        20: len(modules),
        24: list_at,
        44: len(ranges),
        48: map_at,
        64: loader_at,
    }
    info = bytearray(_INFO_SIZE)
    for offset, value in fields.items():
        struct.pack_into("<I", info, offset, value)
    entries = (struct.pack("<4I", m.base, m.end, at, 0) for m, at in zip(modules, strings_at, strict=True))
    request.ram.write(base, b"".join((info, *entries, ranges, *strings)))
    return base
