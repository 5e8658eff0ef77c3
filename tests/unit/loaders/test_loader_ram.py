"""Claims, free places and the memory map."""

from __future__ import annotations

import pytest
from images import MIB, memory

from aiovm.errors import ConfigError
from aiovm.loaders.ram import HIGH, MapEntry, Ram, memory_map
from aiovm.memory import GuestMemory, SlotFlags


def test_the_map_holds_back_the_bios_areas():
    assert memory_map(memory(16 * MIB)) == (
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (0x100000, 0xF00000, 1),
    )


def test_the_map_of_less_than_a_megabyte():
    assert memory_map(memory(0x80000)) == ((0, 0x80000, 1), (0x9FC00, 0x400, 2), (0xE0000, 0x20000, 2))


def test_the_map_lists_ram_above_the_pci_hole_and_leaves_out_rom():
    m = GuestMemory()
    m.set_region(0, 0, 0x200000)
    m.set_region(1, 0x1_0000_0000, 0x100000)
    m.set_region(2, 0xFFFF0000, 0x10000, flags=SlotFlags.READONLY)
    assert memory_map(m)[3:] == (MapEntry(0x100000, 0x100000, 1), MapEntry(0x1_0000_0000, 0x100000, 1))


def test_adjoining_slots_are_one_range():
    m = GuestMemory()
    m.set_region(0, 0, 0x200000)
    m.set_region(1, 0x200000, 0x200000)
    assert memory_map(m)[3:] == (MapEntry(0x100000, 0x300000, 1),)
    Ram(m, "x").claim(0x1FF000, 0x2000, "across")


def test_a_claim_outside_ram_names_the_thing_and_the_sizes():
    ram = Ram(memory(2 * MIB), "a.elf")
    ram.claim(0x1FF000, 0x1000, "the last page")
    with pytest.raises(ConfigError) as error:
        ram.claim(0x1FF001, 0x1000, "segment 3")
    assert str(error.value) == (
        "a.elf: segment 3 at 0x1ff001-0x200001 does not fit RAM below 4 GiB (0x200000 bytes: 0x0-0x200000)"
    )


def test_nothing_is_loaded_above_4_gib():
    m = GuestMemory()
    m.set_region(0, 0x1_0000_0000, 0x100000)
    with pytest.raises(ConfigError, match="none"):
        Ram(m, "x").claim(0x1_0000_0000, 1, "it")


def test_a_range_across_4_gib_is_cut_there():
    m = GuestMemory()
    m.set_region(0, 0xFFFF_F000, 0x2000)
    ram = Ram(m, "x")
    assert ram.place(0x1000, "a", windows=HIGH, top=True) == 0xFFFF_F000
    with pytest.raises(ConfigError):
        ram.claim(0x1_0000_0000, 1, "b")


def test_overlapping_claims_name_both():
    ram = Ram(memory(), "x")
    ram.claim(0x1000, 0x1000, "one")
    ram.claim(0x2000, 0x1000, "beside")
    with pytest.raises(ConfigError, match="two at 0x1800-0x1900 overlaps one at 0x1000-0x2000"):
        ram.claim(0x1800, 0x100, "two")


def test_places_go_around_what_is_taken():
    ram = Ram(memory(), "x")
    ram.claim(0x10010, 0x10, "image")
    assert ram.place(0x10, "fits before") == 0x10000
    assert ram.place(0x20, "does not") == 0x10020
    assert ram.place(0x1000, "aligned", align=0x1000) == 0x11000
    assert ram.place(8, "in between") == 0x10040


def test_low_places_move_up_when_low_memory_is_full():
    ram = Ram(memory(2 * MIB), "x")
    ram.claim(0x0, 0x9F000, "image")
    assert ram.place(0x10, "table") == 0x100000


def test_high_places_go_down_from_the_end():
    ram = Ram(memory(2 * MIB), "x")
    assert ram.place(0x1800, "a", align=0x1000, windows=HIGH, top=True) == 0x1FE000
    assert ram.place(0x1000, "b", align=0x1000, windows=HIGH, top=True) == 0x1FD000
    assert [r.what for r in ram.regions] == ["b", "a"]


def test_no_room_says_where_it_looked():
    with pytest.raises(ConfigError, match=r"x: no room for it \(0x200000 bytes\) in 0x100000-0x100000000: RAM"):
        Ram(memory(2 * MIB), "x").place(0x200000, "it", windows=HIGH)


def test_clear_stores_zeros_and_no_more():
    m = memory(4 * MIB, fill=0xAA)
    Ram(m, "x").clear(0x1001, 0x200002)
    assert m.read(0x1000, 2) == b"\xaa\0"
    assert m.read(0x201002, 2) == b"\0\xaa"
