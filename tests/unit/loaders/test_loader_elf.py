"""ELF headers, placement, and the plain entry states."""

from __future__ import annotations

import struct

import pytest
from images import MIB, Load, elf, memory

from aiovm import guests
from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import KINDS, Module, identify, load, read_modules
from aiovm.loaders.symbols import Symbols
from aiovm.memory import GuestMemory

CODE = b"\xf4" * 32


def refused(image, *, ram=8 * MIB, **options):
    """The one line that says why."""
    with pytest.raises(ConfigError) as error:
        load(image, name="a.elf", memory=memory(ram), **options)
    text = str(error.value)
    assert text.startswith("a.elf: ")
    assert "\n" not in text
    return text[7:]


def test_segments_go_to_their_physical_addresses_and_the_rest_is_zero():
    m = memory(fill=0xAA)
    image = elf(32, [Load(0x200000, CODE, vaddr=0xC0200000), Load(0x300000, b"data", 0x2000)], 0x200004)
    loaded = load(image, name="a.elf", memory=m)
    assert loaded.kind == "elf"
    assert m.read(0x200000, 33) == CODE + b"\xaa"
    assert m.read(0x300000, 0x2001) == b"data" + bytes(0x1FFC) + b"\xaa"
    assert loaded.entry.rip == 0x200004
    assert loaded.summary == "ELF32, 2 segments at 0x200000-0x302000, entry 0x200004"
    assert [(r.base, r.what) for r in loaded.regions if r.what.startswith("segment")] == [
        (0x200000, "segment 0"),
        (0x300000, "segment 1"),
    ]


def test_elf32_begins_in_protected_mode_with_a_stack():
    entry = load(elf(32, [Load(0x100000, CODE)], 0x100000), name="a", memory=memory(4 * MIB)).entry
    assert (entry.cr0, entry.efer) == (0x11, 0)
    assert entry.segments[Seg.CS].default_big
    assert entry.gpr == {Reg.RSP: 0x400000}


def test_elf64_begins_in_long_mode_with_a_stack():
    m = memory(8 * MIB)
    image = elf(64, [Load(0x200000, CODE), Load(0x400000, b"x", 0x1000, flags=6)], 0x200000)
    entry = load(image, name="a", memory=m).entry
    assert (entry.cr0 >> 31, entry.efer & 0x500) == (1, 0x500)
    assert entry.segments[Seg.CS].long
    assert entry.gpr == {Reg.RSP: 0x800000}
    directory = entry.cr3 + 0x2000
    assert [m.read_u(directory + 8 * n, 8) >> 63 for n in range(4)] == [0, 0, 1, 1]


def test_tables_and_stack_avoid_the_image():
    m = memory(4 * MIB)
    image = elf(64, [Load(0x10000, CODE, 0x80000), Load(0x3F0000, b"x", 0x10000)], 0x10000)
    loaded = load(image, name="a", memory=m)
    for before, after in zip(loaded.regions, loaded.regions[1:], strict=False):
        assert before.end <= after.base
    assert loaded.entry.gpr[Reg.RSP] == 0x3F0000
    assert loaded.entry.cr3 == 0x91000


def test_a_virtual_entry_is_translated_through_its_segment():
    image = elf(32, [Load(0x200000, CODE, vaddr=0xC0200000)], 0xC0200010)
    assert load(image, name="a", memory=memory()).entry.rip == 0x200010


def test_a_segment_without_memory_is_not_loaded():
    image = elf(32, [Load(0x10_000_000, b""), Load(0x200000, CODE)], 0x200000)
    assert load(image, name="a", memory=memory()).summary.startswith("ELF32, 1 segment at")


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (elf(32, [Load(0x200000, CODE)], 0x200020), "entry 0x200020 lies outside every loaded segment"),
        (elf(32, [Load(0x200000, CODE, 8)], 0x200000), "segment 0 has 0x20 bytes in the file, 0x8 in memory"),
        (elf(32, [Load(0x200000, CODE, type=4)], 0), "ELF image without a segment to load"),
        (elf(64, [Load(0x200000, CODE)], 0x200000, machine=183), "ELF64 image for machine 0xb7: only x86-64 (0x3e)"),
        (elf(32, [Load(0x200000, CODE)], 0x200000, machine=62), "ELF32 image for machine 0x3e: only i386 (0x3)"),
        (
            elf(32, [Load(0x200000, CODE)], 0x200000, elf_class=3),
            "ELF class 3, byte order 1: only little-endian ELF32 and ELF64 can be run",
        ),
        (
            elf(32, [Load(0x200000, CODE)], 0x200000, data=2),
            "ELF class 1, byte order 2: only little-endian ELF32 and ELF64 can be run",
        ),
        (
            elf(64, [Load(0x200000, CODE)], 0x200000, kind=3),
            "ELF type 0x3 (position-independent): link a fixed executable (-no-pie)",
        ),
        (
            elf(64, [Load(0x200000, CODE)], 0x200000, kind=0xFE00),
            "ELF type 0xfe00 (unknown): link a fixed executable (-no-pie)",
        ),
        (elf(32, [Load(0x200000, CODE)], 0x200000, phentsize=40), "ELF program headers of 0x28 bytes"),
        (
            elf(32, [Load(0x200000, CODE), Load(0x200010, CODE)], 0x200000),
            "segment 1 at 0x200010-0x200030 overlaps segment 0 at 0x200000-0x200020",
        ),
        (
            elf(32, [Load(0x7FFFF0, CODE)], 0x7FFFF0),
            "segment 0 at 0x7ffff0-0x800010 does not fit RAM below 4 GiB (0x800000 bytes: 0x0-0x800000)",
        ),
    ],
)
def test_a_wrong_image_is_refused(image, why):
    assert refused(image) == why


def test_a_truncated_image_says_what_is_missing():
    image = elf(32, [Load(0x200000, CODE)], 0x200000)
    assert len(image) == 0x80
    assert refused(image[:0x7F]) == "truncated: segment 0 at 0x60-0x80, the image has 0x7f bytes"
    assert refused(image[:0x4F]) == "truncated: program header 0 at 0x34-0x50, the image has 0x4f bytes"
    assert refused(image[:0x20]).startswith("truncated: ELF header at 0x10-")
    assert refused(image[:6]) == "truncated: ELF header at 0x0-0x7, the image has 0x6 bytes"


def test_nothing_is_stored_when_a_segment_does_not_fit():
    m = memory()
    with pytest.raises(ConfigError):
        load(elf(32, [Load(0x200000, CODE), Load(0x800000, CODE)], 0x200000), name="a", memory=m)
    assert m.read(0x200000, 32) == bytes(32)


def test_a_plain_image_takes_no_command_line_and_no_modules():
    image = elf(32, [Load(0x200000, CODE)], 0x200000)
    assert refused(image, cmdline="x").startswith("a plain ELF image takes no command line")
    assert refused(image, modules=[Module(b"")]).startswith("a plain ELF image takes no module")


def test_kinds_and_options():
    assert KINDS[-1] == "flat"
    assert identify(b"\x7fELF") == "elf"
    assert identify(b"") == "flat"
    assert refused(b"abcd", kind="elf") == "truncated: ELF header at 0x0-0x7, the image has 0x4 bytes"
    assert refused(b"abcdefgh", kind="elf") == "not an ELF image: it does not begin with 7f 45 4c 46"
    assert refused(b"", kind="pe").startswith("unknown image kind 'pe': one of multiboot, ")
    assert refused(b"\x7fELF", bits=32) == "load address, entry and bits are for flat images, this is elf"


def test_ram_that_is_not_one_slot():
    m = GuestMemory()
    m.set_region(0, 0, 0x200000)
    m.set_region(1, 0x200000, 0x200000)
    load(elf(32, [Load(0x1FFFF0, CODE)], 0x1FFFF0), name="a", memory=m)
    assert m.read(0x1FFFF0, 32) == CODE


# ---- symbols ---------------------------------------------------------------------------------------------------


def test_symbols_of_a_guest_program():
    path = guests.path("hello")
    loaded = load(path.read_bytes(), name=path.name, memory=memory(16 * MIB))
    start = loaded.symbols["_start"]
    assert loaded.entry.rip == start.address
    assert "nobody" not in loaded.symbols
    assert len(loaded.symbols) == len(list(loaded.symbols)) > 10
    assert loaded.symbols.nearest(start.address + 3) == ("_start", 3)
    assert loaded.symbols.nearest(0x10) is None
    idt = loaded.symbols["idt"]
    assert idt.size == 4096
    assert loaded.symbols.nearest(idt.address + 4095) == ("idt", 4095)


def symtab(symbols):
    """An ELF32 file with nothing but a symbol table of (name, value, size, info, section index)."""
    names = b"\0.symtab\0.strtab\0"
    table = bytes(16)
    for name, value, size, info, section in symbols:
        table += struct.pack("<IIIBBH", len(names), value, size, info, 0, section)
        names += name.encode() + b"\0"
    sections = [
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (1, 2, 0, 0, 52, len(table), 2, 1, 4, 16),
        (9, 3, 0, 0, 52 + len(table), len(names), 0, 0, 1, 0),
    ]
    shoff = 52 + len(table) + len(names)
    ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0, 0, shoff, 0, 52, 0, 0, 40, 3, 2)
    return header + table + names + b"".join(struct.pack("<10I", *s) for s in sections)


def test_a_global_symbol_wins_over_a_local_one_of_the_same_name():
    image = symtab([("x", 1, 0, 0x01, 1), ("x", 2, 0, 0x11, 1), ("x", 3, 0, 0x01, 1), ("gone", 9, 0, 0x10, 0)])
    symbols = Symbols(image, "a")
    assert dict(symbols) == {"x": (2, 0, "x")}
    assert symbols.nearest(2000) == ("x", 1998)


def test_file_names_and_sized_neighbours_are_not_symbols():
    symbols = Symbols(symtab([("a.c", 0, 0, 0x04, 0xFFF1), ("f", 0x10, 4, 0x12, 1)]), "a")
    assert list(symbols) == ["f"]
    assert symbols.nearest(0x13) == ("f", 3)
    assert symbols.nearest(0x14) is None


def test_an_image_without_symbols_has_none():
    assert dict(Symbols()) == {}
    assert dict(Symbols(elf(32, [Load(0x200000, CODE)], 0x200000), "a")) == {}


def test_a_damaged_symbol_table_is_found_when_it_is_read():
    image = bytearray(elf(32, [Load(0x200000, CODE)], 0x200000))
    image[0x20:0x24] = b"\xff\xff\xff\x00"  # e_shoff far behind the end
    image[0x2E:0x34] = struct.pack("<3H", 40, 5, 4)
    loaded = load(bytes(image), name="a.elf", memory=memory())
    with pytest.raises(ConfigError, match=r"^a\.elf: damaged symbol table"):
        len(loaded.symbols)


# ---- modules from files ----------------------------------------------------------------------------------------


def test_modules_are_read_from_a_list_of_files(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "t,wo").write_bytes(b"2")
    text = f"{tmp_path}/one a b,{tmp_path}/t,,wo"
    assert read_modules(text) == (Module(b"1", f"{tmp_path}/one a b"), Module(b"2", f"{tmp_path}/t,wo"))
    assert read_modules("") == ()


def test_a_module_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read module .*/none"):
        read_modules(f"{tmp_path}/none x")
