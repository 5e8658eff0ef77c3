"""The 32-bit and 64-bit Linux boot protocols: the zero page, and ``vmlinux`` images.

A kernel begins with RSI = the zero page (``struct boot_params``), which tells it the command line, the ramdisk, the
memory map and ACPI's root pointer. CS is 0x10, the data segments 0x18, interrupts are off. A 64-bit kernel finds 4 GiB
mapped to themselves, all of it executable, a 32-bit one no paging: each builds its own tables within its first
instructions.

The zero page and the command line lie in low memory, the ramdisk as high as the kernel allows. Several modules make one
ramdisk, each padded to four bytes, as the kernel reads a row of cpio archives.

A ``vmlinux`` is an ELF file that carries the kernel's banner; what a bzImage's header would say is what kernels since
3.8 say.

Source: Documentation/arch/x86/boot.rst and zero-page.rst (Linux 6.16; protocol 2.15). Not modelled: the 16-bit entry,
setup_data, screen_info (no display), EFI.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aiovm.engine.base import Reg
from aiovm.loaders import elf
from aiovm.loaders.entry import long_mode, protected_mode
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.ram import memory_map
from aiovm.loaders.symbols import Symbols
from aiovm.units import GIB, MIB

if TYPE_CHECKING:
    from aiovm.loaders.entry import EntryState
    from aiovm.loaders.image import LoadRequest

__all__ = ["HDRS", "SETUP", "enter", "is_vmlinux", "load"]

_PAGE = 4096
_BANNER = b"Linux version "

#: Where the setup header begins, in a bzImage and in the zero page; its signature.
SETUP = 0x1F1
HDRS = 0x53726448
_SETUP_END = 0x290

_CODE = 0x10
_DATA = 0x18
_LOADER_UNKNOWN = 0xFF
_LOADED_HIGH = 1
_MAP_AT = 0x2D0
_MAP_ENTRIES = 128

_VMLINUX_SETUP = {(0x1FE, 2): 0xAA55, (0x202, 4): HDRS, (0x206, 2): 0x20F, (0x230, 4): 2 * MIB}
_VMLINUX_CMDLINE = 2047
_VMLINUX_INITRD_MAX = {32: 0x37FF_FFFF, 64: 0x7FFF_FFFF}


def is_vmlinux(request: LoadRequest) -> bool:
    """Whether the image is an ELF file with a kernel's banner in it."""
    return elf.is_elf(request) and _BANNER in request.image


def load(request: LoadRequest) -> LoadedImage:
    """A kernel as the linker made it."""
    image = elf.parse(request)
    elf.place(request, image)
    setup = bytearray(_SETUP_END - SETUP)
    for (offset, size), value in _VMLINUX_SETUP.items():
        setup[offset - SETUP : offset - SETUP + size] = value.to_bytes(size, "little")
    entry = enter(
        request,
        image.entry,
        bits=image.bits,
        setup=setup,
        cmdline_max=_VMLINUX_CMDLINE,
        initrd_max=_VMLINUX_INITRD_MAX[image.bits],
    )
    return LoadedImage(
        kind="vmlinux",
        name=request.name,
        entry=entry,
        summary=f"Linux {image.describe()}",
        regions=request.ram.regions,
        symbols=Symbols(request.image, request.name),
    )


def enter(
    request: LoadRequest, rip: int, *, bits: int, setup: bytes | bytearray, cmdline_max: int, initrd_max: int
) -> EntryState:
    """Place ramdisk, command line and zero page around a kernel that lies in place; its entry state.

    ``bits`` are 32 or 64, the protocol that ``rip`` is the entry of; ``setup`` is the setup header from offset 0x1F1
    on; ``initrd_max`` the last address that a ramdisk may have.
    """
    ram = request.ram
    cmdline = request.text(request.cmdline, "command line")
    if len(cmdline) - 1 > cmdline_max:
        raise request.refuse(f"command line of {len(cmdline) - 1} bytes: this kernel takes {cmdline_max}")
    ramdisk = b"".join(module.data + bytes(-len(module.data) % 4) for module in request.modules)
    ramdisk_at = 0
    if ramdisk:
        windows = ((MIB, min(initrd_max + 1, 4 * GIB)),)
        ramdisk_at = ram.place(len(ramdisk), "ramdisk", align=_PAGE, windows=windows, top=True)
        ram.write(ramdisk_at, ramdisk)
    cmdline_at = ram.place(len(cmdline), "command line")
    ram.write(cmdline_at, cmdline)

    memory = memory_map(ram.memory)
    if len(memory) > _MAP_ENTRIES:
        raise request.refuse(f"memory of {len(memory)} ranges: the zero page has room for {_MAP_ENTRIES}")
    page = bytearray(_PAGE)
    known = setup[: _SETUP_END - SETUP]
    page[SETUP : SETUP + len(known)] = known
    page[0x211] |= _LOADED_HIGH
    fields = {
        (0x070, 8): request.rsdp,
        (0x1E8, 1): len(memory),
        (0x210, 1): _LOADER_UNKNOWN,
        (0x218, 4): ramdisk_at,
        (0x21C, 4): len(ramdisk),
        (0x228, 4): cmdline_at,
    }
    for (offset, size), value in fields.items():
        page[offset : offset + size] = value.to_bytes(size, "little")
    for n, entry in enumerate(memory):
        struct.pack_into("<QQI", page, _MAP_AT + 20 * n, *entry)
    page_at = ram.place(_PAGE, "zero page", align=_PAGE)
    ram.write(page_at, page)
    gpr = {Reg.RSI: page_at}
    if bits == 32:
        return protected_mode(ram, rip, gpr=gpr, code_selector=_CODE, data_selector=_DATA)
    return long_mode(ram, rip, gpr=gpr, executable=[(0, 4 * GIB)], code_selector=_CODE, data_selector=_DATA)
