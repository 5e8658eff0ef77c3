"""PVH, Xen's direct boot: an ELF image whose note names a 32-bit entry.

The image begins in protected mode without paging, EBX = ``hvm_start_info``, which tells it the command line, the
modules, the memory map and ACPI's root pointer. These lie in low memory, the modules at the end of RAM, each on a page
boundary. Linux built with CONFIG_PVH is such an image; the first module is its ramdisk.

Source: docs/misc/pvh.pandoc, xen/include/public/arch-x86/hvm/start_info.h and elfnote.h (Xen 4.19).
Modelled: version 1 of the structure. Not modelled: hypercalls of Xen; its flags are 0.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING

from aiovm.engine.base import Reg
from aiovm.errors import ConfigError
from aiovm.loaders import elf
from aiovm.loaders.entry import protected_mode
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.ram import HIGH, memory_map
from aiovm.loaders.symbols import Symbols

if TYPE_CHECKING:
    from aiovm.loaders.elf import Elf
    from aiovm.loaders.image import LoadRequest, PlacedModule

__all__ = ["is_pvh", "load"]

_PAGE = 4096
_OWNER = b"Xen\0"
_PHYS32_ENTRY = 18
_MAGIC = 0x336E_C578
_VERSION = 1
_START_INFO = "4I4Q2I"


def _entry(request: LoadRequest, image: Elf) -> int | None:
    """The entry that the notes name."""
    for notes in image.notes:
        at, end = notes.offset, notes.offset + notes.filesz
        while at + 12 <= end:
            name_size, size, kind = request.fields("3I", at, "note")
            owner = request.piece(at + 12, name_size, "note")
            value_at = at + 12 + (name_size + 3 & ~3)
            value = request.piece(value_at, size, "note")
            if kind == _PHYS32_ENTRY and owner == _OWNER:
                return int.from_bytes(value, "little")
            at = value_at + (size + 3 & ~3)
    return None


def is_pvh(request: LoadRequest) -> bool:
    """Whether the image is a sound ELF file with the note."""
    try:
        return _entry(request, elf.parse(request)) is not None
    except ConfigError:
        return False


def load(request: LoadRequest) -> LoadedImage:
    """The image, its modules and its start information."""
    image = elf.parse(request)
    start = _entry(request, image)
    if start is None:
        raise request.refuse("no PVH entry: the ELF notes have no Xen note of type 18")
    if not any(s.paddr <= start < s.paddr + s.memsz for s in image.loads):
        raise request.refuse(f"PVH entry {start:#x} lies outside every loaded segment")
    elf.place(request, image)
    info = _place_information(request, request.place_modules(HIGH, top=True))
    return LoadedImage(
        kind="pvh",
        name=request.name,
        entry=protected_mode(request.ram, start, gpr={Reg.RBX: info}),
        summary=f"PVH {image.describe()}, PVH entry {start:#x}",
        regions=request.ram.regions,
        symbols=Symbols(request.image, request.name),
    )


def _place_information(request: LoadRequest, modules: list[PlacedModule]) -> int:
    """One block: ``hvm_start_info``, the module list, the memory map, the strings; its address."""
    memory = memory_map(request.ram.memory)
    strings = [request.text(request.cmdline, "command line"), *(m.string for m in modules)]
    sizes = [struct.calcsize(_START_INFO), 32 * len(modules), 24 * len(memory), *map(len, strings)]
    base = request.ram.place(sum(sizes), "PVH start information")
    _, list_at, map_at, cmdline_at, *strings_at = accumulate(sizes[:-1], initial=base)
    info = struct.pack(
        "<" + _START_INFO,
        *(_MAGIC, _VERSION, 0, len(modules)),
        *(list_at if modules else 0, cmdline_at, request.rsdp, map_at),
        *(len(memory), 0),
    )
    entries = (struct.pack("<4Q", m.base, m.end - m.base, at, 0) for m, at in zip(modules, strings_at, strict=True))
    ranges = (struct.pack("<2Q2I", *entry, 0) for entry in memory)
    request.ram.write(base, b"".join((info, *entries, *ranges, *strings)))
    return base
