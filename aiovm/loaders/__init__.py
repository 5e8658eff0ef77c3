"""Bring a guest's image into memory and say how its first CPU begins.

:func:`load` finds out what the image is, in this order (:data:`KINDS`), unless ``kind`` says so:

=============  =====================================================================  ==============================
``multiboot``  a Multiboot 1 header in the first 8192 bytes                           32-bit, EBX = information
``elf``        any other ELF executable                                               32-bit or 64-bit, plain
``flat``       anything else                                                          real mode at 0000:7C00
=============  =====================================================================  ==============================

Each format is one module; they share :mod:`~aiovm.loaders.ram` (what lies where), :mod:`~aiovm.loaders.entry` (the CPU)
and :mod:`~aiovm.loaders.image` (request and result). A bad image is a :class:`~aiovm.errors.ConfigError` of one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.errors import ConfigError
from aiovm.loaders import elf, flat, multiboot
from aiovm.loaders.entry import EntryState, apply
from aiovm.loaders.image import LoadedImage, LoadRequest, Module, read_modules
from aiovm.loaders.ram import MapEntry, MemoryType, Ram, Region, memory_map
from aiovm.loaders.symbols import Symbol, Symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.memory import GuestMemory

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
    "read_modules",
]

_FORMATS: dict[str, tuple[Callable[[bytes], bool], Callable[[LoadRequest], LoadedImage]]] = {
    "multiboot": (multiboot.is_multiboot, multiboot.load),
    "elf": (elf.is_elf, elf.load),
    "flat": (lambda _: True, flat.load),
}

#: The formats, in the order in which they are tried.
KINDS = tuple(_FORMATS)


def identify(image: bytes) -> str:
    """The image's format, one of :data:`KINDS`."""
    return next(kind for kind, (matches, _) in _FORMATS.items() if matches(image))


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
) -> LoadedImage:
    """Place ``image`` in ``memory``.

    ``name`` is the image's file name; ``modules`` are further files (:func:`read_modules`). ``load_address``,
    ``entry`` and ``bits`` are for flat images (:mod:`aiovm.loaders.flat`). Raises :class:`ConfigError`.
    """
    if kind is None:
        kind = identify(image)
    elif kind not in _FORMATS:
        raise ConfigError(f"{name}: unknown image kind {kind!r}: one of {', '.join(KINDS)}")
    if kind != "flat" and (load_address, entry, bits) != (None, None, None):
        raise ConfigError(f"{name}: load address, entry and bits are for flat images, this is {kind}")
    request = LoadRequest(
        image=image,
        name=name,
        ram=Ram(memory, name),
        cmdline=cmdline,
        modules=tuple(modules),
        load_address=load_address,
        entry=entry,
        bits=bits,
    )
    return _FORMATS[kind][1](request)
