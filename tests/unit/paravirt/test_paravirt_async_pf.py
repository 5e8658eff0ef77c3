"""Asynchronous page faults in the 6.16 form (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import pytest

from aiovm.memory import GuestMemory
from aiovm.paravirt import ApfAction, AsyncPf

AREA = 0x4040
ON = AREA | 0b1001


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def apf(memory):
    """Switched on by vCPU 5, the wake-up of everybody already acknowledged."""
    a = AsyncPf(memory, 5)
    assert a.write_en(ON)
    assert a.write_int(0xF3)
    assert a.check_completion(lapic_enabled=True) == (0xF3, True)
    ack(memory, a)
    return a


def ack(memory, apf):
    memory.write_u(AREA + 4, 4, 0)
    apf.write_ack(1)


def fault(apf, gfn, *, can_halt=True, cpl=3, paging=True):
    return apf.start(gfn, can_halt=can_halt, cpl=cpl, paging=paging)


@pytest.mark.parametrize("bit", [4, 5])
def test_reserved_bits_fault(memory, bit):
    a = AsyncPf(memory, 0)
    assert not a.write_en(ON | 1 << bit)
    assert a.read_en() == 0


def test_enabling_needs_memory(memory):
    a = AsyncPf(memory, 0)
    assert not a.write_en(0x5000_0009)
    assert a.write_en(0x5000_0008)  # not enabled: nothing is looked at
    assert a.read_en() == 0x5000_0008


def test_vector_msr(memory):
    a = AsyncPf(memory, 0)
    assert a.write_int(0xFF)
    assert not a.write_int(0x100)
    assert a.read_int() == 0xFF


def test_switching_on_wakes_everybody_once(memory):
    a = AsyncPf(memory, 0)
    a.write_int(0xF3)
    a.write_en(ON)
    a.write_en(ON)
    assert a.completions
    assert a.check_completion(lapic_enabled=True) == (0xF3, True)
    assert memory.read_u(AREA + 4, 4) == 0xFFFF_FFFF
    assert not a.completions


@pytest.mark.parametrize("flags", [0b0001, 0b1000, 0b0000])
def test_enabled_means_bits_0_and_3(memory, flags):
    a = AsyncPf(memory, 0)
    assert a.write_en(AREA | flags)
    assert not a.completions
    assert fault(a, 7).action is ApfAction.HALT


def test_a_fault_is_announced_and_its_page_reported(memory, apf):
    first = fault(apf, 7)
    assert first == (ApfAction.INJECT, 1 << 12 | 5)
    assert memory.read_u(AREA, 4) == 1
    assert apf.done(7)
    assert apf.check_completion(lapic_enabled=True) == (0xF3, True)
    assert memory.read_u(AREA + 4, 4) == 1 << 12 | 5


def test_tokens_count_and_skip_a_zero_counter(apf):
    assert fault(apf, 7).token == 0x1005
    assert fault(apf, 8).token == 0x2005
    state = apf.save()
    state.id = 1 << 20  # shifted by 12 it is 0 in 32 bits
    apf.restore(state)
    assert fault(apf, 9).token == 0x1005


@pytest.mark.parametrize(("cpl", "paging"), [(0, True), (3, False)])
def test_what_cannot_be_announced_halts(memory, apf, cpl, paging):
    assert fault(apf, 7, cpl=cpl, paging=paging).action is ApfAction.HALT
    assert memory.read_u(AREA, 4) == 0
    apf.halt()
    assert apf.halted
    apf.done(7)
    assert apf.check_completion(lapic_enabled=True) == (-1, True)  # not announced, so not reported
    assert not apf.halted


def test_bit_1_announces_in_the_kernel_too(memory):
    a = AsyncPf(memory, 0)
    a.write_en(ON | 2)
    assert fault(a, 7, cpl=0).action is ApfAction.INJECT


def test_the_same_page_again_halts_until_it_is_reported(apf):
    fault(apf, 7)
    assert fault(apf, 7).action is ApfAction.HALT
    apf.done(7)
    assert fault(apf, 7).action is ApfAction.HALT
    apf.check_completion(lapic_enabled=True)
    assert fault(apf, 7).action is ApfAction.INJECT


def test_a_vcpu_that_must_not_sleep_waits_in_place(apf):
    assert fault(apf, 7, can_halt=False).action is ApfAction.WAIT


def test_64_at_most(apf):
    for gfn in range(64):
        assert fault(apf, gfn).action is ApfAction.INJECT
    assert fault(apf, 64).action is ApfAction.WAIT
    apf.done(0)
    assert fault(apf, 64).action is ApfAction.WAIT
    apf.check_completion(lapic_enabled=True)
    assert fault(apf, 64).action is ApfAction.INJECT


def test_the_next_report_waits_for_the_word_to_be_cleared(memory, apf):
    for gfn in (7, 8):
        fault(apf, gfn)
    assert apf.done(7)
    assert apf.check_completion(lapic_enabled=True).vector == 0xF3
    assert not apf.done(8)  # one is unacknowledged: no kick
    assert apf.check_completion(lapic_enabled=True) == (-1, False)
    ack(memory, apf)
    assert apf.check_completion(lapic_enabled=True) == (0xF3, True)
    assert memory.read_u(AREA + 4, 4) == 0x2005


def test_ack_needs_bit_0(memory, apf):
    fault(apf, 7)
    fault(apf, 8)
    apf.done(7)
    apf.check_completion(lapic_enabled=True)
    apf.write_ack(2)
    assert not apf.done(8)


def test_no_report_through_a_disabled_lapic(apf):
    fault(apf, 7)
    apf.done(7)
    assert apf.check_completion(lapic_enabled=False) == (-1, False)
    assert apf.completions


def test_area_without_memory(memory, apf):
    fault(apf, 7)
    apf.done(7)
    memory.set_region(0, 0, 0)
    assert apf.check_completion(lapic_enabled=True) == (-1, False)
    assert fault(apf, 8).action is ApfAction.HALT


def test_switching_off_and_paging_changes_drop_everything(apf):
    fault(apf, 7)
    apf.cancel()
    assert not apf.done(7)
    fault(apf, 8)
    apf.done(8)
    assert apf.write_en(AREA)
    assert not apf.completions


def test_other_wakeups_end_the_artificial_halt(apf):
    apf.halt()
    apf.wake()
    assert not apf.halted


def test_completions_of_a_mechanism_that_is_off_are_dequeued_silently(memory):
    a = AsyncPf(memory, 0)
    fault(a, 7)
    a.halt()
    a.done(7)
    assert a.check_completion(lapic_enabled=False) == (-1, True)
    assert not a.halted


def test_reset_and_state(memory, apf):
    fault(apf, 7)
    apf.done(7)
    fault(apf, 8)
    other = AsyncPf(memory, 5)
    other.restore(apf.save())
    assert other.save() == apf.save()
    assert other.check_completion(lapic_enabled=True).vector == 0xF3
    apf.halt()
    apf.reset()
    assert (apf.read_en(), apf.read_int(), apf.halted, apf.completions) == (0, 0, False, False)
    assert fault(apf, 7).action is ApfAction.HALT
    assert apf.save().queued[0].token == 0x3005  # the counter went on
