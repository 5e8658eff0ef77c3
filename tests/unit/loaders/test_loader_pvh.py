"""PVH: the note, and what the guest is told."""

from __future__ import annotations

import struct

import pytest
from images import MIB, Load, elf, memory, pvh

from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import Module, identify, load

CODE = b"\xf4" * 32
LOADS = [Load(0x200000, CODE)]
IMAGE = pvh(64, LOADS, 0x200000, 0x200010)


def refused(image, **options):
    with pytest.raises(ConfigError) as error:
        load(image, name="k", memory=memory(), **options)
    assert str(error.value).startswith("k: ")
    return str(error.value)[3:]


def boot(image=IMAGE, **options):
    """The loaded image, the memory, the start information."""
    m = memory(8 * MIB)
    loaded = load(image, name="k", memory=m, **options)
    return loaded, m, struct.unpack("<4I4Q2I", m.read(loaded.entry.gpr[Reg.RBX], 56))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("start_size", [4, 8])
def test_the_note_names_the_entry(bits, start_size):
    loaded, _, _ = boot(pvh(bits, LOADS, 0x200000, 0x200010, start_size=start_size))
    entry = loaded.entry
    assert (loaded.kind, entry.rip) == ("pvh", 0x200010)
    assert (entry.cr0, entry.cr4, entry.efer, entry.rflags & 0x20300) == (0x11, 0, 0, 0)
    assert entry.segments[Seg.CS][1:3] == (0, 0xFFFFFFFF)
    assert entry.segments[Seg.CS].default_big
    assert entry.segments[Seg.TR][1:] == (0, 0x67, 0x8B00)
    assert loaded.summary.endswith("entry 0x200000, PVH entry 0x200010")


def test_other_notes_are_stepped_over():
    before = struct.pack("<3I", 6, 5, 18) + b"Other\0\0\0" + b"12345\0\0\0"
    before += struct.pack("<3I", 4, 1, 6) + b"Xen\0" + b"x\0\0\0"
    assert boot(pvh(64, LOADS, 0x200000, 0x200010, before=before))[0].entry.rip == 0x200010


def test_the_start_information_without_modules():
    _, m, info = boot(cmdline="a b", rsdp=0xE0010)
    magic, version, flags, count, modules, cmdline, rsdp, memmap, entries, reserved = info
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert (count, modules) == (0, 0)
    assert m.read(cmdline, 4) == b"a b\0"
    assert rsdp == 0xE0010
    assert [struct.unpack("<QQII", m.read(memmap + 24 * n, 24)) for n in range(entries)] == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x400, 2, 0),
        (0xE0000, 0x20000, 2, 0),
        (0x100000, 0x700000, 1, 0),
    ]


def test_modules_and_their_strings():
    _, m, info = boot(modules=(Module(b"first", "one"), Module(b"second", "two x")))
    assert info[3] == 2
    first, second = (struct.unpack("<4Q", m.read(info[4] + 32 * n, 32)) for n in (0, 1))
    assert (first[0], first[1], first[3]) == (0x7FF000, 5, 0)
    assert (second[0], second[1], second[3]) == (0x7FE000, 6, 0)
    assert m.read(0x7FF000, 5) == b"first"
    assert m.read(first[2], 4) == b"one\0"
    assert m.read(second[2], 6) == b"two x\0"


def test_an_image_without_the_note_is_plain():
    image = elf(64, LOADS, 0x200000)
    assert identify(image) == "elf"
    assert refused(image, kind="pvh") == "no PVH entry: the ELF notes have no Xen note of type 18"


def test_damaged_notes_are_no_reason_to_refuse_a_plain_image():
    note = struct.pack("<3I", 0xFFFFFFFF, 4, 18) + b"Xen\0"
    image = elf(64, [*LOADS, Load(0, note, type=4)], 0x200000)
    assert identify(image) == "elf"
    assert refused(image, kind="pvh").startswith("truncated: note at ")
    short = elf(64, [*LOADS, Load(0, note[:11], type=4)], 0x200000)
    assert refused(short, kind="pvh").startswith("no PVH entry")


def test_an_entry_outside_the_image_is_refused():
    assert refused(pvh(64, LOADS, 0x200000, 0x200020)) == "PVH entry 0x200020 lies outside every loaded segment"
