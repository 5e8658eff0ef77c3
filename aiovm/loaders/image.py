"""What goes into a loader and what comes out: one request, one loaded image.

A loader reads bytes that anybody may have made. Whatever they are, the answer is a :class:`LoadedImage` or a
:class:`~aiovm.errors.ConfigError` of one line that begins with the image's name; a structure is read only through
:meth:`LoadRequest.fields`, which knows where the image ends.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiovm.errors import ConfigError
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from aiovm.loaders.entry import EntryState
    from aiovm.loaders.ram import Ram, Region
    from aiovm.loaders.symbols import Symbols

__all__ = ["LoadRequest", "LoadedImage", "Module", "PlacedModule", "read_image", "read_modules"]

_PART = re.compile(r"(?:[^,]|,,)+")


@dataclass(frozen=True, slots=True)
class Module:
    """A file handed to the guest beside its image; ``string`` is its name and arguments."""

    data: bytes
    string: str = ""


class PlacedModule(NamedTuple):
    """Where a module lies; its string with the terminating zero."""

    base: int
    end: int
    string: bytes


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One image and what goes with it."""

    image: bytes
    name: str
    ram: Ram
    cmdline: str = ""
    modules: tuple[Module, ...] = ()
    #: Flat images: where to, where to begin, and the mode (16, 32 or 64); None is the default.
    load_address: int | None = None
    entry: int | None = None
    bits: int | None = None
    #: Linux: unpack the kernel here, not in the guest.
    unpack: bool = True
    #: Address of ACPI's root pointer, 0 if there is none.
    rsdp: int = 0

    def refuse(self, why: str) -> ConfigError:
        """The error to raise."""
        return ConfigError(f"{self.name}: {why}")

    def fields(self, layout: str, offset: int, what: str) -> tuple[Any, ...]:
        """The fields of ``layout`` (:mod:`struct`, little-endian) at ``offset``."""
        size = struct.calcsize("<" + layout)
        if offset + size > len(self.image):
            raise self.refuse(
                f"truncated: {what} at {offset:#x}-{offset + size:#x}, the image has {len(self.image):#x} bytes"
            )
        return struct.unpack_from("<" + layout, self.image, offset)

    def piece(self, offset: int, size: int, what: str) -> memoryview:
        """``size`` bytes at ``offset``."""
        if offset + size > len(self.image):
            raise self.refuse(
                f"truncated: {what} at {offset:#x}-{offset + size:#x}, the image has {len(self.image):#x} bytes"
            )
        return memoryview(self.image)[offset : offset + size]

    def text(self, text: str, what: str) -> bytes:
        """``text`` with its terminating zero, for the guest."""
        data = text.encode("utf-8", "surrogateescape")
        if b"\0" in data:
            raise self.refuse(f"{what} contains a zero byte")
        return data + b"\0"

    def place_modules(self, windows: tuple[tuple[int, int], ...], *, top: bool = False) -> list[PlacedModule]:
        """Put every module into memory, on page boundaries."""
        placed = []
        for number, module in enumerate(self.modules, 1):
            size = len(module.data)
            base = self.ram.place(max(size, 1), f"module {number}", align=PAGE, windows=windows, top=top)
            self.ram.write(base, module.data)
            placed.append(PlacedModule(base, base + size, self.text(module.string, f"module {number}'s string")))
        return placed

    def takes_no_extras(self, kind: str) -> None:
        """Refuse a command line or modules where the format has no way to pass them."""
        if self.cmdline or self.modules:
            extra = "command line" if self.cmdline else "module"
            raise self.refuse(f"{kind} takes no {extra}: use a Multiboot, PVH or Linux image")


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image in memory: how to start it, what lies where, and its symbols (read when first asked for)."""

    kind: str
    name: str
    entry: EntryState
    summary: str
    regions: tuple[Region, ...]
    symbols: Symbols


def read_image(path: str | Path, what: str = "") -> bytes:
    """A file's bytes; ``what`` names it in the :class:`ConfigError`. A device, which has no end, is refused."""
    try:
        endless = Path(path).is_char_device()
        data = b"" if endless else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {what}{path}: {error.strerror}") from error
    except ValueError as error:  # a path that cannot be
        raise ConfigError(f"cannot read {what}{str(path)!r}: {error}") from error
    if endless:
        raise ConfigError(f"cannot read {what}{path}: a device is no image")
    return data


def read_modules(text: str) -> tuple[Module, ...]:
    """Modules from files: ``"F args,G"``, as ``qemu-system-x86_64 -initrd`` takes them; ``,,`` is a comma."""
    modules = []
    for part in _PART.findall(text):
        string = part.replace(",,", ",").strip()
        path = string.split(" ", 1)[0]
        modules.append(Module(read_image(path, "module "), string))
    return tuple(modules)
