"""Guest images made by hand, for the loaders' tests: only what the formats require, numbers restated."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from aiovm.memory import GuestMemory

MIB = 0x100000


def memory(size=8 * MIB, *, fill=0):
    """One slot of RAM at 0, filled with ``fill``."""
    result = GuestMemory()
    result.set_region(0, 0, size)
    if fill:
        result.write(0, bytes([fill]) * size)
    return result


@dataclass
class Load:
    """A program header and the bytes behind it."""

    paddr: int
    data: bytes
    memsz: int | None = None
    vaddr: int | None = None
    flags: int = 5
    type: int = 1


def elf(bits, loads, entry, *, prefix=b"", kind=2, machine=None, elf_class=None, data=1, phentsize=None):
    """An ELF file: headers, ``prefix``, then the bytes of each load."""
    wide = bits == 64
    header, entry_size = (64, 56) if wide else (52, 32)
    at = header + entry_size * len(loads)
    at = (at + 15) & ~15
    body = prefix + bytes(-len(prefix) % 16)
    table = b""
    for load in loads:
        offset = at + len(body)
        vaddr = load.paddr if load.vaddr is None else load.vaddr
        memsz = len(load.data) if load.memsz is None else load.memsz
        if wide:
            table += struct.pack(
                "<IIQQQQQQ", load.type, load.flags, offset, vaddr, load.paddr, len(load.data), memsz, 16
            )
        else:
            table += struct.pack(
                "<IIIIIIII", load.type, offset, vaddr, load.paddr, len(load.data), memsz, load.flags, 16
            )
        body += load.data
    ident = b"\x7fELF" + bytes([elf_class or bits // 32, data, 1]) + bytes(9)
    fields = (
        kind,
        (62 if wide else 3) if machine is None else machine,
        1,
        entry,
        header,
        0,
        0,
        header,
        phentsize or entry_size,
        len(loads),
        0,
        0,
        0,
    )
    start = ident + struct.pack("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", *fields)
    return (start + table).ljust(at, b"\0") + body


def multiboot_header(flags=0, *, checksum=None, addresses=()):
    """The header's words; ``addresses`` are header, load, load end, bss end, entry."""
    magic = 0x1BADB002
    if checksum is None:
        checksum = -(magic + flags) & 0xFFFFFFFF
    return struct.pack(f"<{3 + len(addresses)}I", magic, flags, checksum, *addresses)
