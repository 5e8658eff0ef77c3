"""Memslots, generations, cached pointers, the dirty log (``virt/kvm/kvm_main.c``)."""

import mmap

import pytest

from aiovm.errors import ConfigError
from aiovm.memory import GuestMemory, GuestPtr, MemoryMap, NoMemory, SlotFlags


def machine(*slots):
    memory = GuestMemory()
    for number, (base, size) in enumerate(slots):
        memory.set_region(number, base, size)
    return memory


# ---- set_region ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "size"),
    [(0x800, 0x1000), (0, 0x1800), (0, 1), (0x1001, 0x1000), (-0x1000, 0x1000), (0, -0x1000), (1 << 52, 0x1000)],
)
def test_a_slot_is_whole_pages_within_the_physical_space(base, size):
    with pytest.raises(ConfigError, match="EINVAL"):
        GuestMemory().set_region(0, base, size)


def test_the_last_page_of_the_physical_space_may_be_memory():
    slot = GuestMemory().set_region(0, (1 << 52) - 0x1000, 0x1000)
    assert slot.end == 1 << 52


@pytest.mark.parametrize(
    ("base", "size"), [(0x1000, 0x1000), (0, 0x2000), (0x2000, 0x2000), (0, 0x10000), (0x2000, 0x1000)]
)
def test_overlap_is_refused(base, size):
    memory = GuestMemory()
    memory.set_region(0, 0x1000, 0x2000)
    with pytest.raises(ConfigError, match=r"overlaps slot 0 at 0x1000 \(EEXIST\)"):
        memory.set_region(1, base, size)
    assert len(memory.map.slots) == 1


def test_neighbours_may_touch():
    memory = machine((0x1000, 0x1000), (0x2000, 0x1000), (0, 0x1000))
    assert [s.base for s in memory.map.slots] == [0, 0x1000, 0x2000]


def test_size_and_read_only_of_a_slot_never_change():
    memory = machine((0, 0x2000))
    with pytest.raises(ConfigError, match="EINVAL"):
        memory.set_region(0, 0, 0x1000)
    with pytest.raises(ConfigError, match="EINVAL"):
        memory.set_region(0, 0, 0x2000, flags=SlotFlags.READONLY)
    with pytest.raises(ConfigError, match="EINVAL"):
        memory.set_region(0, 0, 0x2000, backing=bytearray(0x2000))


def test_a_slot_may_move_and_keeps_its_contents():
    memory = machine((0, 0x1000))
    memory.write(0x10, b"kept")
    memory.set_region(0, 0x8000, 0x1000)
    assert memory.read(0x8010, 4) == b"kept"
    assert not memory.is_ram(0x10)


def test_a_slot_may_move_onto_part_of_its_own_range():
    memory = machine((0, 0x3000))
    memory.set_region(0, 0x1000, 0x3000)
    assert [(s.base, s.end) for s in memory.map.slots] == [(0x1000, 0x4000)]


def test_an_identical_region_is_a_no_op():
    memory = machine((0, 0x1000))
    before = memory.map
    assert memory.set_region(0, 0, 0x1000) is before.slots[0]
    assert memory.map is before


def test_size_zero_deletes_and_deleting_nothing_is_refused():
    memory = machine((0, 0x1000))
    assert memory.set_region(0, 0, 0) is None
    assert memory.map.slots == ()
    with pytest.raises(ConfigError, match="EINVAL"):
        memory.set_region(0, 0, 0)


def test_new_memory_is_zero_and_backing_is_shared():
    host = bytearray(0x2000)
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000)
    memory.set_region(1, 0x1000, 0x1000, backing=host)
    assert memory.read(0, 0x1000) == bytes(0x1000)
    memory.write(0x1008, b"hi")
    assert host[8:10] == b"hi"
    host[9] = 0x21
    assert memory.read(0x1008, 2) == b"h!"


def test_the_host_address_is_where_the_bytes_are():
    import ctypes

    memory = machine((0, 0x1000))
    memory.write(0, b"here")
    assert ctypes.string_at(memory.map.slots[0].host_address, 4) == b"here"


def test_backing_must_be_writable_and_long_enough():
    for backing in (bytearray(0xFFF), memoryview(bytes(0x1000)), mmap.mmap(-1, 0x1000, access=mmap.ACCESS_READ)):
        with pytest.raises(ConfigError, match="EINVAL"):
            GuestMemory().set_region(0, 0, 0x1000, backing=backing)


# ---- generations -----------------------------------------------------------------------------------------------


def test_generation_is_odd_while_an_update_is_under_way_and_even_after():
    memory = GuestMemory()
    seen = []
    memory.on_change(lambda old, new: seen.append((old.generation, new.generation, memory.map.generation)))
    memory.set_region(0, 0, 0x1000)
    memory.set_region(0, 0x4000, 0x1000)
    memory.set_region(0, 0, 0)
    assert seen == [(0, 1, 1), (2, 3, 3), (4, 5, 5)]
    assert memory.map.generation == 6


def test_a_refused_update_changes_nothing():
    memory = machine((0, 0x1000))
    before = memory.map
    with pytest.raises(ConfigError):
        memory.set_region(1, 0, 0x1000)
    assert memory.map is before


def test_a_map_is_a_value():
    memory = machine((0, 0x1000))
    old = memory.map
    memory.set_region(1, 0x1000, 0x1000)
    assert len(old.slots) == 1
    assert old.find(0x1000) is None
    assert memory.map.find(0x1000).slot_id == 1


@pytest.mark.parametrize(
    ("gpa", "slot"), [(0, None), (0xFFF, None), (0x1000, 0), (0x1FFF, 0), (0x2000, None), (0x4000, 1), (0x5000, None)]
)
def test_find(gpa, slot):
    found = machine((0x1000, 0x1000), (0x4000, 0x1000)).map.find(gpa)
    assert (None if found is None else found.slot_id) == slot


def test_an_empty_map_finds_nothing():
    assert MemoryMap().find(0) is None


# ---- access ----------------------------------------------------------------------------------------------------


def test_an_access_may_cross_slots():
    memory = machine((0, 0x1000), (0x1000, 0x1000))
    memory.write(0xFFE, b"abcd")
    assert memory.read(0xFFE, 4) == b"abcd"
    assert memory.read(0x1000, 2) == b"cd"


def test_reading_where_nothing_is_says_where():
    memory = machine((0, 0x1000))
    with pytest.raises(NoMemory) as info:
        memory.read(0xFFC, 8)
    assert info.value.gpa == 0x1000
    assert str(info.value) == "no memory at 0x1000"


def test_a_write_stores_all_or_nothing():
    memory = machine((0, 0x1000))
    with pytest.raises(NoMemory):
        memory.write(0xFFE, b"abcd")
    assert memory.read(0xFFE, 2) == b"\0\0"


def test_a_read_only_slot_reads_and_refuses_writes():
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000, flags=SlotFlags.READONLY)
    memory.load_rom(0x10, b"rom")
    assert memory.read(0x10, 3) == b"rom"
    with pytest.raises(NoMemory) as info:
        memory.write(0x10, b"ram")
    assert info.value.gpa == 0x10
    assert memory.read(0x10, 3) == b"rom"


def test_a_loader_that_runs_out_of_memory_is_told():
    memory = machine((0, 0x1000))
    with pytest.raises(ConfigError, match="nothing at 0x1000"):
        memory.load_rom(0xFF0, bytes(0x20))


def test_load_rom_crosses_slots():
    memory = machine((0, 0x1000), (0x1000, 0x1000))
    memory.load_rom(0xFFF, b"xy")
    assert memory.read(0xFFF, 2) == b"xy"


@pytest.mark.parametrize(("size", "value"), [(1, 0x88), (2, 0x7788), (4, 0x55667788), (8, 0x1122334455667788)])
@pytest.mark.parametrize("gpa", [0x100, 0x103])
def test_integers_are_little_endian(gpa, size, value):
    memory = machine((0, 0x1000))
    memory.write(gpa, bytes.fromhex("8877665544332211"))
    assert memory.read_u(gpa, size) == value


def test_integers_are_cut_to_fit():
    memory = machine((0, 0x1000))
    memory.write_u(0, 4, -1)
    memory.write_u(8, 2, 0x12345)
    assert memory.read(0, 12) == bytes.fromhex("ffffffff 00000000 4523 0000")


def test_reading_an_integer_where_nothing_is():
    with pytest.raises(NoMemory):
        GuestMemory().read_u(8, 8)
    with pytest.raises(NoMemory):
        machine((0, 0x1000)).read_u(0x1000, 8)


def test_writers_are_heard_with_address_and_length():
    memory = machine((0, 0x1000), (0x1000, 0x1000))
    heard = []
    memory.on_write(lambda gpa, length: heard.append((gpa, length)))
    memory.write(0xFFE, b"abcd")
    memory.write_u(0x20, 8, 1)
    memory.load_rom(0, b"x")
    with pytest.raises(NoMemory):
        memory.write(0x1FFF, b"zz")
    assert heard == [(0xFFE, 4), (0x20, 8), (0, 1)]


# ---- the dirty log -----------------------------------------------------------------------------------------------


def logged():
    memory = GuestMemory()
    memory.set_region(3, 0x10000, 0x48000, flags=SlotFlags.LOG_DIRTY)  # 72 pages: two words of bitmap
    return memory


def test_the_log_is_one_bit_a_page_taken_and_cleared():
    memory = logged()
    memory.write(0x10000, b"x")
    memory.write(0x12FFF, b"xy")  # pages 2 and 3
    memory.mark_dirty(0x57FFF)  # page 71
    memory.mark_dirty(0x9999_0000)  # nobody's
    assert memory.take_dirty_log(3) == bytes([0b1101, 0, 0, 0, 0, 0, 0, 0, 0x80]) + bytes(7)
    assert memory.take_dirty_log(3) == bytes(16)


def test_a_long_mark_covers_every_page():
    memory = logged()
    memory.mark_dirty(0x10FFF, 0x1002)
    assert memory.take_dirty_log(3)[:2] == b"\x07\x00"


@pytest.mark.parametrize("slot", [0, 9])
def test_a_slot_that_does_not_log_is_refused(slot):
    memory = machine((0, 0x1000))
    with pytest.raises(ConfigError, match="ENOENT"):
        memory.take_dirty_log(slot)


def test_logging_can_be_turned_on_and_off():
    memory = machine((0, 0x1000))
    memory.write(0, b"early")
    memory.set_region(0, 0, 0x1000, flags=SlotFlags.LOG_DIRTY)
    assert memory.take_dirty_log(0) == bytes(8)
    memory.write(0, b"seen")
    memory.set_region(0, 0x1000, 0x1000, flags=SlotFlags.LOG_DIRTY)  # a move keeps the log
    assert memory.take_dirty_log(0)[0] == 1
    memory.set_region(0, 0x1000, 0x1000)
    with pytest.raises(ConfigError, match="ENOENT"):
        memory.take_dirty_log(0)


# ---- cached pointers -----------------------------------------------------------------------------------------------


def test_a_pointer_reads_and_writes_its_record():
    memory = machine((0x1000, 0x1000))
    pointer = GuestPtr(memory, 0x1040, 32)
    assert pointer.valid
    assert pointer.write(8, b"\x34\x12") is True
    assert memory.read_u(0x1048, 2) == 0x1234
    assert pointer.read(8, 2) == b"\x34\x12"


def test_a_pointer_to_nothing_does_nothing_and_says_so():
    memory = machine((0, 0x1000))
    for pointer in (GuestPtr(memory, 0x9000, 4), GuestPtr(memory, 0xFFE, 4)):
        assert not pointer.valid
        assert pointer.read(0, 1) is None
        assert pointer.write(0, b"x") is False
    assert memory.read(0xFFE, 2) == b"\0\0"


def test_a_pointer_into_a_read_only_slot_reads_only():
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000, flags=SlotFlags.READONLY)
    pointer = GuestPtr(memory, 0, 8)
    assert pointer.read(0, 8) == bytes(8)
    assert pointer.write(0, b"x") is False


def test_a_pointer_asks_again_when_the_map_changed():
    memory = machine((0, 0x1000))
    pointer = GuestPtr(memory, 0x2010, 4)
    assert not pointer.valid
    memory.set_region(1, 0x2000, 0x1000)
    assert pointer.write(0, b"late") is True
    assert memory.read(0x2010, 4) == b"late"
    memory.set_region(1, 0, 0)
    assert pointer.write(0, b"gone") is False
    memory.set_region(1, 0x2000, 0x1000)
    assert pointer.read(0, 4) == b"\0\0\0\0"


def test_what_a_pointer_learns_during_an_update_is_not_kept():
    memory = machine((0, 0x1000))
    pointer = GuestPtr(memory, 0x2000, 4)
    during = []
    memory.on_change(lambda old, new: during.append(pointer.valid))
    memory.set_region(1, 0x2000, 0x1000)
    assert during == [True]
    memory.set_region(1, 0x5000, 0x1000)  # the slot moved: what was learnt at generation 3 must not survive
    assert during == [True, False]
    assert not pointer.valid


def test_a_pointers_write_is_logged_and_heard():
    memory = logged()
    heard = []
    memory.on_write(lambda gpa, length: heard.append((gpa, length)))
    pointer = GuestPtr(memory, 0x11FFC, 8)
    assert pointer.write(2, b"abcd")
    assert memory.take_dirty_log(3)[0] == 0b110
    assert heard == [(0x11FFE, 4)]


def test_slots_have_numbers_and_reads_have_lengths():
    memory = GuestMemory()
    with pytest.raises(ConfigError, match="memslot -1"):
        memory.set_region(-1, 0, 0x1000)
    memory.set_region(0, 0, 0x1000)
    with pytest.raises(ConfigError, match="-1 bytes"):
        memory.read(0, -1)


def test_closed_memory_leaves_the_programs_own_alone():
    backing = bytearray(b"mine" + bytes(0xFFC))
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000)
    memory.set_region(1, 0x1000, 0x1000, backing=backing)
    cached = GuestPtr(memory, 0x1000, 4)
    assert cached.read(0, 4) == b"mine"
    memory.close()
    assert cached.read(0, 4) is None
    assert not memory.is_ram(0)
    assert backing[:4] == b"mine"
