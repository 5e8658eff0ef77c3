"""The zero page, and vmlinux images."""

from __future__ import annotations

import struct

import pytest
from images import MIB, Load, elf, memory

from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import Module, identify, load
from aiovm.memory import GuestMemory

TEXT = b"\xf4" * 16 + b"Linux version 6.1.0-test\0"
KERNEL = elf(64, [Load(0x200000, TEXT, 0x1000, vaddr=0xFFFFFFFF81000000)], 0x200000)


def boot(image=KERNEL, *, m=None, **options):
    """The loaded image, and the zero page."""
    m = memory() if m is None else m
    loaded = load(image, name="vmlinux", memory=m, **options)
    return loaded, m.read(loaded.entry.gpr[Reg.RSI], 4096)


def refused(image=KERNEL, **options):
    with pytest.raises(ConfigError) as error:
        boot(image, **options)
    return str(error.value)


def test_the_entry_state_is_the_64_bit_protocols():
    loaded, _ = boot()
    entry = loaded.entry
    assert (loaded.kind, entry.rip) == ("vmlinux", 0x200000)
    assert entry.efer & 0x500 == 0x500
    assert entry.rflags & 0x200 == 0
    assert entry.segments[Seg.CS][:3] == (0x10, 0, 0xFFFFFFFF)
    assert entry.segments[Seg.CS].long
    assert [entry.segments[s].selector for s in (Seg.DS, Seg.ES, Seg.SS)] == [0x18, 0x18, 0x18]


def test_the_entry_state_is_the_32_bit_protocols():
    m = memory()
    loaded, page = boot(elf(32, [Load(0x200000, TEXT, 0x1000, vaddr=0xC0200000)], 0x200000), m=m)
    entry = loaded.entry
    assert (loaded.kind, entry.rip) == ("vmlinux", 0x200000)
    assert (entry.cr0 & 0x80000001, entry.efer & 0x500, entry.rflags & 0x200) == (1, 0, 0)
    assert entry.segments[Seg.CS] == (0x10, 0, 0xFFFFFFFF, 0xC09B00)
    assert all(entry.segments[s] == (0x18, 0, 0xFFFFFFFF, 0xC09300) for s in (Seg.DS, Seg.ES, Seg.SS))
    assert m.read(entry.gdt.base, 32) == struct.pack("<4Q", 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    assert [entry.gpr.get(reg, 0) for reg in (Reg.RBP, Reg.RDI, Reg.RBX)] == [0, 0, 0]
    assert page[0x202:0x206] == b"HdrS"


def test_everything_below_4_gib_is_executable():
    m = memory()
    loaded, _ = boot(m=m)
    assert not any(m.read_u(loaded.entry.cr3 + 0x2000 + 8 * n, 8) >> 63 for n in range(2048))


def test_the_zero_page_of_a_vmlinux():
    _, page = boot(rsdp=0xE1234)
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert page[0x211] & 1
    assert page[0x1EF] == 0
    assert struct.unpack_from("<Q", page, 0x70) == (0xE1234,)
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)


def test_the_zero_page_has_the_memory_map():
    m = GuestMemory()
    m.set_region(0, 0, 8 * MIB)
    m.set_region(1, 0x1_0000_0000, 2 * MIB)
    _, page = boot(m=m)
    assert page[0x1E8] == 5
    assert [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(5)] == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (0x100000, 0x700000, 1),
        (0x1_0000_0000, 0x200000, 1),
    ]
    assert page[0x2D0 + 100 :] == bytes(4096 - 0x2D0 - 100)


def test_too_many_ranges_of_memory():
    m = GuestMemory()
    m.set_region(0, 0, 8 * MIB)
    for n in range(1, 127):
        m.set_region(n, 16 * MIB + n * 0x2000, 0x1000)
    assert "memory of 130 ranges: the zero page has room for 128" in refused(m=m)


def test_the_command_line():
    m = memory()
    _, page = boot(m=m, cmdline="console=ttyS0 quiet")
    (at,) = struct.unpack_from("<I", page, 0x228)
    assert m.read(at, 20) == b"console=ttyS0 quiet\0"
    boot(cmdline="x" * 2047)
    assert refused(cmdline="x" * 2048) == "vmlinux: command line of 2048 bytes: this kernel takes 2047"


def test_the_ramdisk_is_every_module_padded_to_words_at_the_end_of_ram():
    m = memory(8 * MIB)
    _, page = boot(m=m, modules=(Module(b"abcde", "ignored"), Module(b"fg")))
    assert struct.unpack_from("<II", page, 0x218) == (0x7FF000, 12)
    assert m.read(0x7FF000, 12) == b"abcde\0\0\0fg\0\0"


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_file_with_the_banner_is_a_vmlinux(bits):
    assert identify(elf(bits, [Load(0x200000, b"Linux")], 0x200000)) == "elf"
    assert identify(elf(bits, [Load(0x200000, TEXT)], 0x200000)) == "vmlinux"


def test_the_summary():
    assert boot()[0].summary == "Linux ELF64, 1 segment at 0x200000-0x201000, entry 0x200000"
