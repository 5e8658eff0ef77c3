"""Steal time and the preempted byte (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import struct

import pytest

from aiovm.memory import GuestMemory, GuestPtr, SlotFlags
from aiovm.paravirt import StealTime

GPA = 0x1040


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def steal(memory):
    s = StealTime(memory)
    assert s.write_msr(GPA | 1)
    return s


def record(memory):
    return struct.unpack("<QIIB", memory.read(GPA, 17))


def preempted(memory):
    return memory.read_u(GPA + 16, 1)


@pytest.mark.parametrize("bit", [1, 2, 3, 4, 5])
def test_reserved_bits_fault(memory, bit):
    s = StealTime(memory)
    assert not s.write_msr(GPA | 1 | 1 << bit)
    assert s.read_msr() == 0


def test_first_update_reports_all_waiting_since_the_thread_began(memory, steal):
    assert steal.read_msr() == 0x1041
    assert not steal.update(700)
    assert record(memory) == (700, 2, 0, 0)
    steal.update(1_000)
    assert record(memory) == (1_000, 4, 0, 0)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (7, 10), (10, 12), (0xFFFF_FFFF, 2), (0xFFFF_FFFE, 0)])
def test_version_ends_even_whatever_it_was(memory, steal, before, after):
    memory.write_u(GPA + 8, 4, before)
    steal.update(0)
    assert record(memory)[1] == after


def test_version_is_odd_while_the_record_changes(memory, steal, monkeypatch):
    seen = []
    write = GuestPtr.write

    def watched(self, offset, data):
        seen.append((offset, memory.read_u(GPA + 8, 4)))
        return write(self, offset, data)

    monkeypatch.setattr(GuestPtr, "write", watched)
    steal.update(5)
    assert dict(seen)[0] == 1
    assert record(memory)[1] == 2


def test_steal_adds_to_what_the_guest_has_and_wraps(memory, steal):
    memory.write_u(GPA, 8, (1 << 64) - 1)
    steal.update(3)
    assert record(memory)[0] == 2


def test_preempted_is_stored_once_and_cleared_by_the_next_update(memory, steal):
    assert steal.report_preempted()
    assert preempted(memory) == 1
    memory.write_u(GPA + 16, 1, 3)  # the guest asks for a flush meanwhile
    assert steal.report_preempted()
    assert preempted(memory) == 3
    assert steal.update(0)
    assert preempted(memory) == 0
    assert steal.report_preempted()
    assert preempted(memory) == 1


def test_tlb_flush_race():
    """§13.5: the guest's compare-and-exchange either beats the host's swap, or fails and an IPI is sent."""
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    s = StealTime(m)
    s.write_msr(GPA | 1)

    def guest_defers(expected):
        if m.read_u(GPA + 16, 1) == expected == 1:
            m.write_u(GPA + 16, 1, 3)
            return True
        return False

    s.report_preempted()
    assert guest_defers(1)
    assert s.update(0)  # flush before entry
    s.report_preempted()
    assert not s.update(0)  # the host was first
    assert not guest_defers(1)
    assert not guest_defers(0)  # a running target is not deferred to


def test_disabled_touches_nothing(memory):
    s = StealTime(memory)
    assert s.write_msr(GPA)
    assert not s.enabled
    assert not s.update(100)
    assert not s.report_preempted()
    assert memory.read(GPA, 64) == bytes(64)


def test_an_address_without_memory_is_accepted_and_silent(memory):
    s = StealTime(memory)
    assert s.write_msr(0x100_0001)
    assert s.enabled
    assert not s.update(100)
    assert not s.report_preempted()
    memory.set_region(1, 0x100_0000, 0x1000)
    s.update(150)
    assert memory.read_u(0x100_0000, 8) == 150


def test_a_read_only_slot_takes_no_record(memory):
    memory.set_region(1, 0x100_0000, 0x1000, flags=SlotFlags.READONLY)
    s = StealTime(memory)
    s.write_msr(0x100_0001)
    s.update(100)
    assert not s.report_preempted()
    assert s.save().last_steal == 0


def test_reset_turns_it_off_and_keeps_the_account(memory, steal):
    steal.update(500)
    steal.reset()
    assert steal.read_msr() == 0
    steal.update(600)
    assert record(memory)[0] == 500
    steal.write_msr(GPA | 1)
    steal.update(600)
    assert record(memory)[0] == 600


def test_state_travels(memory, steal):
    steal.update(500)
    steal.report_preempted()
    other = StealTime(memory)
    other.restore(steal.save())
    assert other.save() == steal.save()
    other.update(900)
    assert record(memory) == (900, 4, 0, 0)
