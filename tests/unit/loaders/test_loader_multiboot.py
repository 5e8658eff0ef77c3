"""Multiboot 1: the header, where things go, and what the guest is told."""

from __future__ import annotations

import struct

import pytest
from images import MIB, Load, elf, memory, multiboot_header

from aiovm import guests
from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import Module, identify, load
from aiovm.memory import GuestMemory

CODE = b"\xf4" * 32


def image32(flags=0, **header):
    return elf(32, [Load(0x200000, CODE)], 0x200008, prefix=multiboot_header(flags, **header))


def refused(image, **options):
    with pytest.raises(ConfigError) as error:
        load(image, name="k", memory=memory(), **options)
    assert str(error.value).startswith("k: ")
    return str(error.value)[3:]


def words(m, base):
    """The information as words by offset."""
    return {n: m.read_u(base + n, 4) for n in range(0, 116, 4)}


def string(m, address):
    return m.read(address, 200).split(b"\0")[0]


def test_the_entry_state():
    loaded = load(image32(3), name="k", memory=memory())
    entry = loaded.entry
    assert loaded.kind == "multiboot"
    assert entry.rip == 0x200008
    assert entry.gpr[Reg.RAX] == 0x2BADB002
    assert (entry.cr0 & 0x80000001, entry.rflags & 0x20200) == (1, 0)
    assert (entry.segments[Seg.CS].base, entry.segments[Seg.CS].limit) == (0, 0xFFFFFFFF)
    assert entry.segments[Seg.CS].default_big
    assert (entry.segments[Seg.DS].base, entry.segments[Seg.DS].limit) == (0, 0xFFFFFFFF)


def test_the_information_without_modules():
    m = memory(8 * MIB)
    loaded = load(image32(), name="k", memory=m)
    info = words(m, loaded.entry.gpr[Reg.RBX])
    assert info[0] == 0b10_0100_1101
    assert info[4] == 639
    assert info[8] == 7 * 1024
    assert (info[20], info[12], info[28], info[52], info[72]) == (0, 0, 0, 0, 0)
    assert string(m, info[16]) == b"k"
    assert string(m, info[64]) == b"aiovm"


def test_the_memory_map():
    m = GuestMemory()
    m.set_region(0, 0, 8 * MIB)
    m.set_region(1, 0x1_0000_0000, 2 * MIB)
    info = words(m, load(image32(), name="k", memory=m).entry.gpr[Reg.RBX])
    entries = [struct.unpack("<IQQI", m.read(info[48] + n, 24)) for n in range(0, info[44], 24)]
    assert entries == [
        (20, 0, 0x9FC00, 1),
        (20, 0x9FC00, 0x400, 2),
        (20, 0xE0000, 0x20000, 2),
        (20, 0x100000, 0x700000, 1),
        (20, 0x1_0000_0000, 0x200000, 1),
    ]


def test_the_command_line_begins_with_the_images_name():
    m = memory()
    info = words(m, load(image32(), name="k.elf", memory=m, cmdline="a=1 b").entry.gpr[Reg.RBX])
    assert string(m, info[16]) == b"k.elf a=1 b"


def test_modules_lie_on_pages_behind_the_image():
    m = memory()
    modules = (Module(b"first", "one x"), Module(b"", ""), Module(b"third" * 1000, "three"))
    loaded = load(image32(1), name="k", memory=m, modules=modules)
    info = words(m, loaded.entry.gpr[Reg.RBX])
    assert info[20] == 3
    entries = [struct.unpack("<4I", m.read(info[24] + n, 16)) for n in (0, 16, 32)]
    assert [(start, end) for start, end, _, _ in entries] == [
        (0x201000, 0x201005),
        (0x202000, 0x202000),
        (0x203000, 0x204388),
    ]
    assert m.read(0x201000, 5) == b"first"
    assert m.read(0x203000, 5000) == b"third" * 1000
    assert [string(m, text) for _, _, text, _ in entries] == [b"one x", b"", b"three"]
    assert "3 modules" in loaded.summary
    for before, after in zip(loaded.regions, loaded.regions[1:], strict=False):
        assert before.end <= after.base


def test_modules_go_below_an_image_that_ends_at_the_end_of_ram():
    m = memory(2 * MIB)
    image = elf(32, [Load(0x180000, CODE, 0x80000)], 0x180000, prefix=multiboot_header())
    loaded = load(image, name="k", memory=m, modules=(Module(b"abc"),))
    assert m.read(0x100000, 3) == b"abc"
    assert "1 module" in loaded.summary


def test_an_image_in_low_memory_does_not_meet_the_information():
    m = memory(2 * MIB)
    image = elf(32, [Load(0x8000, CODE, 0x97000)], 0x8000, prefix=multiboot_header())
    loaded = load(image, name="k", memory=m)
    assert loaded.entry.gpr[Reg.RBX] == 0x100000
    assert m.read(0x8000, 33) == CODE + b"\0"


def test_our_own_guests_are_multiboot():
    loaded = load(guests.path("hello").read_bytes(), name="hello.elf", memory=memory(16 * MIB))
    assert loaded.kind == "multiboot"
    assert loaded.summary.startswith("Multiboot ELF32, 2 segments at 0x200000-")


def test_an_elf64_file_with_a_32_bit_entry():
    loaded = load(elf(64, [Load(0x200000, CODE)], 0x200000, prefix=multiboot_header()), name="k", memory=memory())
    assert (loaded.kind, loaded.entry.efer, loaded.entry.rip) == ("multiboot", 0, 0x200000)


# ---- the header ------------------------------------------------------------------------------------------------


def flat(at, flags=0, *, before=b"", **header):
    return before.ljust(at, b"\0") + multiboot_header(flags, **header)


def kludge(addresses, *, at=0x20, flags=0x10000, text=CODE):
    return flat(at, flags, addresses=addresses) + text


def test_the_header_is_searched_in_8192_bytes_on_words():
    assert identify(flat(8192 - 12)) == "multiboot"
    assert identify(flat(8192 - 8)) == "flat"
    assert identify(flat(0x22)) == "flat"
    assert identify(flat(0x20)[:-1]) == "flat"


def test_a_wrong_checksum_is_refused_unless_a_right_one_follows():
    wrong = multiboot_header(3, checksum=0)
    assert refused(flat(0x10, 3, checksum=0)) == "bad Multiboot header checksum at 0x10"
    image = elf(32, [Load(0x200000, CODE)], 0x200000, prefix=wrong + multiboot_header(3))
    assert load(image, name="k", memory=memory()).kind == "multiboot"


def test_unknown_requirements_are_refused():
    assert refused(image32(8)) == "Multiboot header requires what is not supported: flag bits 0x8"
    assert refused(image32(0x8003)) == "Multiboot header requires what is not supported: flag bits 0x8000"
    load(image32(0xFFFE0000), name="k", memory=memory())


def test_a_video_mode_is_not_set_and_the_summary_says_so():
    m = memory()
    loaded = load(image32(4), name="k", memory=m)
    assert loaded.summary.endswith("asks for a video mode: none is set")
    assert words(m, loaded.entry.gpr[Reg.RBX])[0] & 0x1800 == 0


def test_no_header_where_one_was_promised():
    assert refused(b"abc", kind="multiboot") == "no Multiboot header in the first 0x2000 bytes"


def test_addresses_in_the_header_place_the_image():
    m = memory(fill=0xAA)
    # Header at 0x20 of the file and 0x200010 in memory: the text begins at 0x10 of the file.
    image = kludge((0x200010, 0x200000, 0x200040, 0x200100, 0x200030))
    loaded = load(image, name="k", memory=m)
    assert m.read(0x200000, 0x40) == image[0x10:0x50]
    assert m.read(0x200040, 0xC1) == bytes(0xC0) + b"\xaa"
    assert loaded.entry.rip == 0x200030
    assert loaded.summary == "Multiboot image at 0x200000-0x200100, entry 0x200030"


def test_addresses_of_zero_mean_the_whole_file_and_no_bss():
    m = memory(fill=0xAA)
    image = kludge((0x200020, 0x200000, 0, 0, 0x200040))
    load(image, name="k", memory=m)
    assert m.read(0x200000, len(image) + 1) == image + b"\xaa"


def test_the_headers_addresses_win_over_elf():
    image = elf(
        32,
        [Load(0x200000, CODE)],
        0x200000,
        prefix=multiboot_header(0x10000, addresses=(0x300060, 0x300000, 0, 0, 0x300004)),
    )
    assert load(image, name="k", memory=memory()).entry.rip == 0x300004


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (
            kludge((0x1FFFFF, 0x200000, 0, 0, 0x200000)),
            "Multiboot header at 0x20 says that it lies at 0x1fffff, the load address is 0x200000",
        ),
        (
            kludge((0x200021, 0x200000, 0, 0, 0x200000)),
            "Multiboot header at 0x20 says that it lies at 0x200021, the load address is 0x200000",
        ),
        (
            kludge((0x200020, 0x200000, 0x200000, 0, 0x200000)),
            "Multiboot addresses are out of order: load 0x200000-0x200000, bss to 0x200000",
        ),
        (
            kludge((0x200020, 0x200000, 0x200030, 0x20002F, 0x200000)),
            "Multiboot addresses are out of order: load 0x200000-0x200030, bss to 0x20002f",
        ),
        (
            kludge((0x200020, 0x200000, 0x200030, 0, 0x200030)),
            "entry 0x200030 lies outside the image at 0x200000-0x200030",
        ),
        (
            kludge((0x200020, 0x200000, 0x200061, 0, 0x200000)),
            "truncated: text and data at 0x0-0x61, the image has 0x60 bytes",
        ),
        (
            kludge((0x800020, 0x800000, 0, 0, 0x800000)),
            "image at 0x800000-0x800060 does not fit RAM below 4 GiB (0x800000 bytes: 0x0-0x800000)",
        ),
        (
            flat(0x20, 0x10000),
            "truncated: Multiboot header addresses at 0x2c-0x40, the image has 0x2c bytes",
        ),
        (flat(0x20), "not an ELF image: it does not begin with 7f 45 4c 46"),
    ],
)
def test_wrong_addresses_are_refused(image, why):
    assert refused(image) == why


def test_strings_with_a_zero_byte_are_refused():
    assert refused(image32(), cmdline="a\0b") == "command line contains a zero byte"
    assert refused(image32(), modules=(Module(b"", "\0"),)) == "module 1's string contains a zero byte"


def test_a_module_that_does_not_fit_is_named():
    assert refused(image32(), modules=(Module(bytes(9 * MIB)),)).startswith(
        "no room for module 1 (0x900000 bytes) in 0x200020-0x100000000 or 0x100000-0x100000000: RAM below 4 GiB is "
    )
