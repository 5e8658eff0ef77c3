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


def pvh(bits, loads, entry, start, *, before=b"", start_size=4):
    """An ELF file with a PT_NOTE that names a PVH entry; ``before`` are other notes."""
    note = before + struct.pack("<3I", 4, start_size, 18) + b"Xen\0" + start.to_bytes(start_size, "little")
    return elf(bits, [*loads, Load(0, note, type=4, flags=4)], entry)


def bzimage(payload, *, version=0x20F, xloadflags=1, relocatable=1, header=None, code=b"", sectors=1):
    """A setup sector and header, ``code`` padded to 0x300 bytes, then the payload; ``header`` overrides fields."""
    head = bytearray((sectors or 4) * 512 + 512)
    code = code.ljust(0x300, b"\x90")
    fields = {
        (0x1F1, 1): sectors,
        (0x1FE, 2): 0xAA55,
        (0x201, 1): 0x6A,
        (0x202, 4): 0x53726448,
        (0x206, 2): version,
        (0x20E, 2): 0x100,
        (0x22C, 4): 0x7FFFFFFF,
        (0x230, 4): 0x200000,
        (0x234, 1): relocatable,
        (0x236, 2): xloadflags,
        (0x238, 4): 2047,
        (0x248, 4): len(code),
        (0x24C, 4): len(payload),
        (0x258, 8): 0x200000,
        (0x260, 4): 0x10000,
        **(header or {}),
    }
    for (offset, size), value in fields.items():
        head[offset : offset + size] = value.to_bytes(size, "little")
    head[0x300:0x320] = b"6.1.0-test (somebody) #1\0".ljust(32, b"\0")
    return bytes(head) + code + payload
