"""Guest memory against a plain model: a dictionary of bytes, a set of dirty pages."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiovm.errors import ConfigError
from aiovm.memory import GuestMemory, GuestPtr, NoMemory, SlotFlags

PAGES = 12
SLOTS = st.integers(0, 3)
ADDRESSES = st.integers(0, PAGES * 4096 - 1)
FLAGS = st.sampled_from([SlotFlags(0), SlotFlags(1), SlotFlags(2), SlotFlags(3)])


class Memory(RuleBasedStateMachine):
    """Slots come, move, change and go; every read, write and log agrees with the model."""

    def __init__(self):
        super().__init__()
        self.memory = GuestMemory()
        self.slots = {}  # slot id: [first page, pages, flags, {offset: byte}, dirty pages]
        self.generation = 0
        self.pointer = GuestPtr(self.memory, 0x2FF8, 16)

    def at(self, gpa):
        for slot in self.slots.values():
            if slot[0] <= gpa >> 12 < slot[0] + slot[1]:
                return slot, gpa - (slot[0] << 12)
        return None, 0

    def model_write(self, gpa, data):
        places = [self.at(gpa + n) for n in range(len(data))]
        if any(slot is None or slot[2] & 2 for slot, _ in places):
            return False
        for (slot, offset), byte in zip(places, data, strict=True):
            slot[3][offset] = byte
            if slot[2] & 1:
                slot[4].add(offset >> 12)
        return True

    @rule(slot=SLOTS, page=st.integers(0, PAGES - 1), pages=st.integers(0, 4), flags=FLAGS)
    def set_region(self, slot, page, pages, flags):
        old = self.slots.get(slot)
        others = [s for n, s in self.slots.items() if n != slot]
        overlaps = any(page < s[0] + s[1] and s[0] < page + pages for s in others)
        if pages == 0:
            allowed = old is not None
        else:
            allowed = not overlaps and (old is None or (old[1] == pages and not (old[2] ^ flags) & 2))
        try:
            self.memory.set_region(slot, page << 12, pages << 12, flags=flags)
        except ConfigError:
            assert not allowed
            return
        assert allowed
        if pages == 0:
            del self.slots[slot]
        elif old is None:
            self.slots[slot] = [page, pages, flags, {}, set()]
        elif (old[0], old[2]) == (page, flags):
            return
        else:
            self.slots[slot] = [page, pages, flags, old[3], old[4] if flags & 1 else set()]
        self.generation += 2

    @rule(gpa=ADDRESSES, data=st.binary(min_size=1, max_size=9000))
    def write(self, gpa, data):
        if self.model_write(gpa, data):
            self.memory.write(gpa, data)
        else:
            with pytest.raises(NoMemory) as info:
                self.memory.write(gpa, data)
            assert gpa <= info.value.gpa < gpa + len(data)

    @rule(gpa=ADDRESSES, length=st.integers(1, 9000))
    def read(self, gpa, length):
        places = [self.at(gpa + n) for n in range(length)]
        hole = next((n for n, (slot, _) in enumerate(places) if slot is None), None)
        if hole is None:
            assert self.memory.read(gpa, length) == bytes(slot[3].get(offset, 0) for slot, offset in places)
        else:
            with pytest.raises(NoMemory) as info:
                self.memory.read(gpa, length)
            assert info.value.gpa == gpa + hole

    @rule(gpa=ADDRESSES, size=st.sampled_from([1, 2, 4, 8]), value=st.integers(-(1 << 63), (1 << 64) - 1))
    def integers(self, gpa, size, value):
        try:
            self.memory.write_u(gpa, size, value)
        except NoMemory:
            assert not self.model_write(gpa, bytes(size))
        else:
            assert self.model_write(gpa, (value % (1 << 8 * size)).to_bytes(size, "little"))
            assert self.memory.read_u(gpa, size) == value % (1 << 8 * size)

    @rule(offset=st.integers(0, 12), data=st.binary(min_size=1, max_size=4))
    def through_a_pointer(self, offset, data):
        first, last = self.at(0x2FF8)[0], self.at(0x3007)[0]
        backed = first is not None and first is last
        assert self.pointer.valid is backed
        written = self.pointer.write(offset, data)
        assert written is (backed and not first[2] & 2)
        if written:
            assert self.model_write(0x2FF8 + offset, data)
            assert self.pointer.read(offset, len(data)) == data

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def take_the_log(self, data):
        number = data.draw(st.sampled_from(sorted(self.slots)))
        slot = self.slots[number]
        try:
            log = self.memory.take_dirty_log(number)
        except ConfigError:
            assert not slot[2] & 1
            return
        assert {n for n in range(len(log) * 8) if log[n >> 3] >> (n & 7) & 1} == slot[4]
        slot[4].clear()

    @invariant()
    def the_map_is_even_ordered_and_disjoint(self):
        map_ = self.memory.map
        assert map_.generation == self.generation
        spans = [(s.base, s.end) for s in map_.slots]
        assert spans == sorted((s[0] << 12, s[0] + s[1] << 12) for s in self.slots.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=8), st.integers(0, 35 * 4096))
def test_find_is_a_linear_search(regions, gpa):
    memory = GuestMemory()
    for number, (page, pages) in enumerate(regions):
        try:
            memory.set_region(number, page << 12, pages << 12)
        except ConfigError:
            continue
    expected = [s for s in memory.map.slots if s.base <= gpa < s.base + s.size]
    assert memory.map.find(gpa) is (expected[0] if expected else None)
    assert memory.is_ram(gpa) is bool(expected)
