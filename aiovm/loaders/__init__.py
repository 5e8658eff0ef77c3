"""Bring a guest's image into memory and say how its first CPU begins.

:func:`load` finds out what the image is, in this order (:data:`KINDS`), unless ``kind`` says so:

=============  =====================================================================  ==============================
``multiboot``  a Multiboot 1 header in the first 8192 bytes                           32-bit, EBX = information
``bzimage``    a Linux setup header                                                   64-bit, RSI = zero page
``pvh``        an ELF file with Xen's note of type 18                                 32-bit, EBX = start information
``vmlinux``    an ELF64 file with a Linux kernel's banner                             64-bit, RSI = zero page
``elf``        any other ELF executable                                               32-bit or 64-bit, plain
``flat``       anything else                                                          real mode at 0000:7C00
=============  =====================================================================  ==============================

Each format is one module; they share :mod:`~aiovm.loaders.ram` (what lies where), :mod:`~aiovm.loaders.entry` (the CPU)
and :mod:`~aiovm.loaders.image` (request and result). A bad image is a :class:`~aiovm.errors.ConfigError` of one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.loaders import bzimage, elf, flat, linux, multiboot, pvh
from aiovm.loaders.entry import EntryState, apply
from aiovm.loaders.image import LoadedImage, LoadRequest, Module, read_image, read_modules
from aiovm.loaders.ram import MapEntry, MemoryType, Ram, Region, memory_map
from aiovm.loaders.symbols import Symbol, Symbols
from aiovm.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "KINDS",
    "EntryState",
    "LoadedImage",
    "MapEntry",
    "MemoryType",
    "Module",
    "Region",
    "Symbol",
    "Symbols",
    "apply",
    "identify",
    "load",
    "memory_map",
    "read_image",
    "read_modules",
]

_FORMATS: dict[str, tuple[Callable[[LoadRequest], bool], Callable[[LoadRequest], LoadedImage]]] = {
    "multiboot": (multiboot.is_multiboot, multiboot.load),
    "bzimage": (bzimage.is_bzimage, bzimage.load),
    "pvh": (pvh.is_pvh, pvh.load),
    "vmlinux": (linux.is_vmlinux, linux.load),
    "elf": (elf.is_elf, elf.load),
    "flat": (lambda _: True, flat.load),
}

#: The formats, in the order in which they are tried.
KINDS = tuple(_FORMATS)


def identify(image: bytes) -> str:
    """The image's format, one of :data:`KINDS`."""
    return _identify(LoadRequest(image=image, name="image", ram=Ram(GuestMemory(), "image")))


def _identify(request: LoadRequest) -> str:
    return next(kind for kind, (matches, _) in _FORMATS.items() if matches(request))


def load(
    image: bytes,
    *,
    name: str,
    memory: GuestMemory,
    cmdline: str = "",
    modules: Sequence[Module] = (),
    kind: str | None = None,
    load_address: int | None = None,
    entry: int | None = None,
    bits: int | None = None,
    unpack: bool = True,
    rsdp: int = 0,
) -> LoadedImage:
    """Place ``image`` in ``memory``.

    ``name`` is the image's file name; ``modules`` are further files (:func:`read_modules`). ``load_address``,
    ``entry`` and ``bits`` are for flat images (:mod:`aiovm.loaders.flat`). Without ``unpack`` a bzImage's own
    decompressor runs. ``rsdp`` is the address of ACPI's root pointer, for Linux and PVH.
    Raises :class:`~aiovm.errors.ConfigError`.
    """
    request = LoadRequest(
        image=image,
        name=name,
        ram=Ram(memory, name),
        cmdline=cmdline,
        modules=tuple(modules),
        load_address=load_address,
        entry=entry,
        bits=bits,
        unpack=unpack,
        rsdp=rsdp,
    )
    if kind is None:
        kind = _identify(request)
    elif kind not in _FORMATS:
        raise request.refuse(f"unknown image kind {kind!r}: one of {', '.join(KINDS)}")
    if kind != "flat" and (load_address, entry, bits) != (None, None, None):
        raise request.refuse(f"load address, entry and bits are for flat images, this is {kind}")
    return _FORMATS[kind][1](request)
