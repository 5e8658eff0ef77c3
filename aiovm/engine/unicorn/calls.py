"""The calls that the core's library makes to functions of its own, and how to stand in one's way.

The library exports them, so that each call goes through a slot of its procedure linkage table (System V ABI, AMD64
supplement, 5.2): a pointer in writable memory, which the dynamic linker fills in. Who stores another address there gets
the calls of every core in the process, and must do what the function did. Where the library is laid out otherwise, or
its slots are read-only, there is no slot and the functions stay.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char, c_int, c_uint32, c_uint64, c_void_p
from typing import Final

from aiovm.engine.unicorn import lib

__all__ = ["slot"]

_LINKMAP: Final = 2  # RTLD_DI_LINKMAP
_PLTRELSZ, _STRTAB, _SYMTAB, _STRSZ, _JMPREL = 2, 5, 6, 10, 23
_SYMBOL_WORDS: Final = 6  # 24 bytes
_GNU_RELRO: Final = 0x6474_E552


def _memory(address: int, size: int) -> memoryview:
    return memoryview((c_char * size).from_address(address)).cast("B")


def slot(name: str) -> int:
    """The address of the pointer through which the library calls ``name``; 0 where there is none."""
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return 0
    map_ = c_void_p()
    dlinfo = getattr(ctypes.CDLL(None), "dlinfo", None)
    if dlinfo is None or dlinfo(c_void_p(lib.raw._handle), c_int(_LINKMAP), ctypes.byref(map_)) or not map_.value:
        return 0
    base, _, dynamic = _memory(map_.value, 24).cast("Q")
    tags: dict[int, int] = {}
    while tag := c_uint64.from_address(dynamic).value:
        tags[tag] = c_uint64.from_address(dynamic + 8).value
        dynamic += 16
    if not tags.keys() >= {_PLTRELSZ, _STRTAB, _SYMTAB, _STRSZ, _JMPREL}:
        return 0
    strings, symbols, jumps = (at if at >= base else at + base for at in (tags[_STRTAB], tags[_SYMTAB], tags[_JMPREL]))
    wanted = bytes(_memory(strings, tags[_STRSZ])).find(b"\0%s\0" % name.encode()) + 1
    if not wanted:
        return 0
    relocations = _memory(jumps, tags[_PLTRELSZ]).cast("Q")
    last = max((info >> 32 for info in relocations[1::3]), default=0)
    names = _memory(symbols, (last + 1) * 4 * _SYMBOL_WORDS).cast("I")
    found = next((i for i, info in enumerate(relocations[1::3]) if names[_SYMBOL_WORDS * (info >> 32)] == wanted), None)
    if found is None or _read_only(base, at := relocations[3 * found]):
        return 0
    return base + at


def _read_only(base: int, offset: int) -> bool:
    """Whether the dynamic linker took away the right to store there."""
    headers = c_uint64.from_address(base + 0x20).value
    size, count = _memory(base + 0x36, 4).cast("H")
    for at in range(base + headers, base + headers + size * count, size):
        _, _, address, _, _, length, _ = _memory(at, 56).cast("Q")
        if c_uint32.from_address(at).value == _GNU_RELRO and address <= offset < address + length:
            return True
    return False
