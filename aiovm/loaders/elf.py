"""ELF executables: where the segments go, and the plain ones that begin without a boot protocol.

Segments are placed at their physical addresses (``p_paddr``); what the file does not fill is zero. The entry point is
taken as physical where a segment lies there, else as virtual and translated through its segment.

A plain 32-bit image begins in protected mode, a plain 64-bit one in long mode, with a stack and the other registers 0
(:mod:`aiovm.loaders.entry`).

Source: System V ABI, chapters 4 and 5; the i386 and x86-64 supplements. Modelled: ET_EXEC for i386 and x86-64.
Not modelled: relocation (ET_DYN), x32, more than 65534 program headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiovm.engine.base import Reg
from aiovm.loaders.entry import long_mode, protected_mode, stack
from aiovm.loaders.image import LoadedImage
from aiovm.loaders.symbols import Symbols

if TYPE_CHECKING:
    from aiovm.loaders.image import LoadRequest

__all__ = ["MAGIC", "Elf", "ElfSegment", "is_elf", "load", "parse", "place"]

MAGIC = b"\x7fELF"

_CLASS32 = 1
_CLASS64 = 2
_LITTLE_ENDIAN = 1
_EXECUTABLE = 2
_MACHINES = {_CLASS32: (3, "i386"), _CLASS64: (62, "x86-64")}
_TYPES = {1: "a relocatable object", 3: "position-independent", 4: "a core dump"}
_PT_LOAD = 1
_PT_NOTE = 4
_PF_X = 1


@dataclass(frozen=True, slots=True)
class ElfSegment:
    """One program header; ``index`` is its place in the table."""

    index: int
    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    flags: int

    @property
    def executable(self) -> bool:
        """PF_X."""
        return bool(self.flags & _PF_X)


@dataclass(frozen=True, slots=True)
class Elf:
    """A parsed image: 32 or 64 ``bits``, the entry's physical address, what to load, the notes."""

    bits: int
    entry: int
    loads: tuple[ElfSegment, ...]
    notes: tuple[ElfSegment, ...]

    @property
    def end(self) -> int:
        """The first physical address after the highest segment."""
        return max(s.paddr + s.memsz for s in self.loads)

    @property
    def code(self) -> list[tuple[int, int]]:
        """The physical ranges that hold code."""
        return [(s.paddr, s.paddr + s.memsz) for s in self.loads if s.executable]

    def describe(self) -> str:
        """For people: ``ELF64, 2 segments at 0x200000-0x50d460, entry 0x200100``."""
        low = min(s.paddr for s in self.loads)
        count = f"{len(self.loads)} segment" + ("s" if len(self.loads) > 1 else "")
        return f"ELF{self.bits}, {count} at {low:#x}-{self.end:#x}, entry {self.entry:#x}"


def is_elf(request: LoadRequest) -> bool:
    """Whether the image begins like an ELF file."""
    return request.image.startswith(MAGIC)


def parse(request: LoadRequest) -> Elf:
    """Read and check the headers."""
    magic, elf_class, data, _ = request.fields("4s3B", 0, "ELF header")
    if magic != MAGIC:
        raise request.refuse("not an ELF image: it does not begin with 7f 45 4c 46")
    if elf_class not in _MACHINES or data != _LITTLE_ENDIAN:
        raise request.refuse(f"ELF class {elf_class}, byte order {data}: only little-endian ELF32 and ELF64 can be run")
    wide = elf_class == _CLASS64
    kind, machine, _, entry, table, _, _, _, size, count = request.fields(
        "HHIQQQIHHH" if wide else "HHIIIIIHHH", 16, "ELF header"
    )
    expected, word = _MACHINES[elf_class]
    if machine != expected:
        raise request.refuse(f"ELF{64 if wide else 32} image for machine {machine:#x}: only {word} ({expected:#x})")
    if kind != _EXECUTABLE:
        raise request.refuse(f"ELF type {kind:#x} ({_TYPES.get(kind, 'unknown')}): link a fixed executable (-no-pie)")
    if size != (56 if wide else 32):
        raise request.refuse(f"ELF program headers of {size:#x} bytes")
    headers = [_segment(request, wide, table + n * size, n) for n in range(count)]
    loads = tuple(s for s in headers if s.type == _PT_LOAD and s.memsz)
    if not loads:
        raise request.refuse("ELF image without a segment to load")
    for segment in loads:
        if segment.filesz > segment.memsz:
            raise request.refuse(
                f"segment {segment.index} has {segment.filesz:#x} bytes in the file, {segment.memsz:#x} in memory"
            )
        request.piece(segment.offset, segment.filesz, f"segment {segment.index}")
    return Elf(
        bits=64 if wide else 32,
        entry=_physical(request, entry, loads),
        loads=loads,
        notes=tuple(s for s in headers if s.type == _PT_NOTE),
    )


def place(request: LoadRequest, elf: Elf) -> None:
    """Claim every segment, then store them."""
    for s in elf.loads:
        request.ram.claim(s.paddr, s.memsz, f"segment {s.index}")
    for s in elf.loads:
        request.ram.write(s.paddr, request.piece(s.offset, s.filesz, f"segment {s.index}"))
        request.ram.clear(s.paddr + s.filesz, s.memsz - s.filesz)


def load(request: LoadRequest) -> LoadedImage:
    """A plain executable."""
    request.takes_no_extras("a plain ELF image")
    elf = parse(request)
    place(request, elf)
    gpr = {Reg.RSP: stack(request.ram)}
    if elf.bits == 32:
        entry = protected_mode(request.ram, elf.entry, gpr=gpr)
    else:
        entry = long_mode(request.ram, elf.entry, gpr=gpr, executable=elf.code)
    return LoadedImage(
        kind="elf",
        name=request.name,
        entry=entry,
        summary=elf.describe(),
        regions=request.ram.regions,
        symbols=Symbols(request.image, request.name),
    )


def _segment(request: LoadRequest, wide: bool, at: int, index: int) -> ElfSegment:
    what = f"program header {index}"
    if wide:
        kind, flags, offset, vaddr, paddr, filesz, memsz = request.fields("IIQQQQQ", at, what)
    else:
        kind, offset, vaddr, paddr, filesz, memsz, flags = request.fields("IIIIIII", at, what)
    return ElfSegment(index, kind, offset, vaddr, paddr, filesz, memsz, flags)


def _physical(request: LoadRequest, entry: int, loads: tuple[ElfSegment, ...]) -> int:
    for s in loads:
        if s.paddr <= entry < s.paddr + s.memsz:
            return entry
    for s in loads:
        if s.vaddr <= entry < s.vaddr + s.memsz:
            return entry - s.vaddr + s.paddr
    raise request.refuse(f"entry {entry:#x} lies outside every loaded segment")
