"""PV EOI (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import pytest

from aiovm.memory import GuestMemory, SlotFlags
from aiovm.paravirt import PvEoi

GPA = 0x3004


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def eoi(memory):
    e = PvEoi(memory)
    assert e.write_msr(GPA | 1)
    return e


def arm(eoi, *, irr_pending=False, isr_vector=0x31, ioapic_handles=False):
    eoi.arm(irr_pending=irr_pending, isr_vector=isr_vector, ioapic_handles=ioapic_handles)


@pytest.mark.parametrize("value", [GPA | 2, GPA | 3, 0x5000_0001, (1 << 64) - 3])
def test_refused_values(memory, value):
    e = PvEoi(memory)
    assert not e.write_msr(value)
    assert e.read_msr() == 0


def test_disabling_needs_no_memory(memory, eoi):
    assert eoi.write_msr(0x5000_0000)
    assert eoi.read_msr() == 0x5000_0000
    arm(eoi)
    assert not eoi.pending


def test_guest_ends_its_interrupt_in_memory(memory, eoi):
    arm(eoi)
    assert eoi.pending
    assert memory.read_u(GPA, 4) == 1
    memory.write_u(GPA, 4, 0)
    assert eoi.harvest()
    assert not eoi.pending


def test_guest_has_not_ended_it_yet(memory, eoi):
    memory.write_u(GPA, 4, 0xAABBCC00)
    arm(eoi)
    assert memory.read_u(GPA, 4) == 0xAABBCC01
    assert not eoi.harvest()
    assert memory.read_u(GPA, 4) == 0xAABBCC00
    assert not eoi.pending


@pytest.mark.parametrize("reason", [{"irr_pending": True}, {"isr_vector": -1}, {"ioapic_handles": True}])
def test_not_armed_when_somebody_must_hear_the_eoi(memory, eoi, reason):
    arm(eoi, **reason)
    assert not eoi.pending
    assert memory.read_u(GPA, 4) == 0


def test_memory_that_goes_away(memory, eoi):
    arm(eoi)
    memory.set_region(0, 0, 0)
    assert eoi.harvest()
    arm(eoi)
    assert not eoi.pending


def test_a_bit_that_cannot_be_taken_back_counts_as_an_eoi(memory, eoi):
    arm(eoi)
    memory.set_region(0, 0, 0)
    rom = bytearray(0x10000)
    rom[GPA] = 1
    memory.set_region(0, 0, 0x10000, flags=SlotFlags.READONLY, backing=rom)
    assert eoi.harvest()


def test_reset_and_state(memory, eoi):
    arm(eoi)
    other = PvEoi(memory)
    other.restore(eoi.save())
    assert other.save() == eoi.save()
    assert not other.harvest()
    eoi.reset()
    assert (eoi.read_msr(), eoi.pending) == (0, False)
    arm(eoi)
    assert not eoi.pending
