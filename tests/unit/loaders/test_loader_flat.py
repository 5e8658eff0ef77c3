"""Flat images."""

from __future__ import annotations

import pytest
from images import MIB, memory

from aiovm.engine.base import Reg, Seg
from aiovm.errors import ConfigError
from aiovm.loaders import Module, load

SECTOR = (b"\xeb\xfe".ljust(510, b"\0")) + b"\x55\xaa"


def test_a_boot_sector_begins_at_7c00_in_real_mode():
    m = memory()
    loaded = load(SECTOR, name="boot.bin", memory=m)
    assert loaded.kind == "flat"
    assert m.read(0x7C00, 512) == SECTOR
    assert (loaded.entry.cr0 & 1, loaded.entry.rip, loaded.entry.segments[Seg.CS].base) == (0, 0x7C00, 0)
    assert loaded.entry.gpr == {Reg.RDX: 0x80, Reg.RSP: 0x7C00}
    assert loaded.summary == "flat 16-bit image at 0x7c00-0x7e00, entry 0x7c00"
    assert not loaded.symbols


def test_an_image_in_high_memory_begins_in_protected_mode():
    m = memory(4 * MIB)
    entry = load(b"\xf4" * 16, name="x", memory=m, load_address=0x100000, entry=0x100004).entry
    assert (entry.cr0, entry.rip, entry.gpr[Reg.RSP]) == (0x11, 0x100004, 0x400000)
    assert m.read(0x100000, 16) == b"\xf4" * 16


def test_bits_choose_the_mode():
    low = load(b"\xf4", name="x", memory=memory(), bits=32)
    assert (low.entry.cr0, low.entry.rip) == (0x11, 0x7C00)
    m = memory(8 * MIB)
    wide = load(b"\xf4" * 0x200001, name="x", memory=m, bits=64, load_address=0x200000).entry
    assert (wide.efer & 0x400, wide.rip) == (0x400, 0x200000)
    assert [m.read_u(wide.cr3 + 0x2000 + 8 * n, 8) >> 63 for n in range(4)] == [0, 0, 0, 1]


def test_real_mode_above_64_kib_uses_a_segment():
    entry = load(b"\xf4", name="x", memory=memory(), load_address=0x20010).entry
    assert (entry.rip, entry.segments[Seg.CS].selector) == (0, 0x2001)


@pytest.mark.parametrize(
    ("image", "options", "why"),
    [
        (b"", {}, "empty image"),
        (b"x", {"bits": 8}, "bits is 8: 16, 32 or 64"),
        (b"xx", {"entry": 0x7C02}, "entry 0x7c02 lies outside the image at 0x7c00-0x7c02"),
        (b"xx", {"entry": 0x7BFF}, "entry 0x7bff lies outside the image at 0x7c00-0x7c02"),
        (b"x", {"load_address": 0x100000, "bits": 16}, "entry 0x100000: real mode begins below 0x100000"),
        (b"x", {"load_address": -1}, "flat image at -0x1-0x0 does not fit RAM"),
        (b"x", {"load_address": 0x800000}, "flat image at 0x800000-0x800001 does not fit RAM"),
        (b"x", {"cmdline": "a"}, "a flat image takes no command line"),
        (b"x", {"modules": [Module(b"")]}, "a flat image takes no module"),
    ],
)
def test_what_cannot_be_is_refused(image, options, why):
    with pytest.raises(ConfigError) as error:
        load(image, name="x", memory=memory(), **options)
    assert str(error.value).startswith(f"x: {why}")
