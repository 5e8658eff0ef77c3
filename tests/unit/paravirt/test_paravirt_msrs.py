"""KVM's MSRs (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import pytest

from aiovm.kvmclock import KvmClock
from aiovm.memory import GuestMemory
from aiovm.paravirt import KvmFeature, Paravirt
from aiovm.requests import Request

EVERY = [0x11, 0x12, *range(0x4B564D00, 0x4B564D08)]


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def kvmclock():
    return KvmClock(host_khz=2_000_000, now=0)


@pytest.fixture
def pv(memory, kvmclock):
    return Paravirt(memory, kvmclock, vcpu_id=0)


@pytest.mark.parametrize("index", [0x10, 0x13, 0x4B564CFF, 0x4B564D08, 0x4B564D09, 0xFFFFFFFF])
def test_unknown_msrs_fault(pv, index):
    assert pv.read_msr(index) is None
    assert pv.write_msr(index, 0) is None


def test_reset_values(pv):
    assert [pv.read_msr(i) for i in EVERY] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("index", [0x12, 0x4B564D01])
def test_system_time(pv, index):
    assert pv.write_msr(index, 0x2041).requests[-1] is Request.GLOBAL_CLOCK_UPDATE
    assert pv.clock.enabled
    assert pv.read_msr(0x12) == pv.read_msr(0x4B564D01) == 0x2041


def test_system_time_without_memory_does_not_fault(pv):
    assert pv.write_msr(0x4B564D01, 0x5000_0001) is not None
    assert not pv.clock.enabled
    assert pv.read_msr(0x4B564D01) == 0x5000_0001


def test_the_old_msr_on_vcpu_0_asks_for_the_master_clock(pv, kvmclock):
    assert pv.write_msr(0x12, 0x2041).requests == (Request.MASTERCLOCK_UPDATE, Request.GLOBAL_CLOCK_UPDATE)
    assert pv.write_msr(0x12, 0x2041).requests == (Request.GLOBAL_CLOCK_UPDATE,)
    kvmclock.update_masterclock(10)
    assert not kvmclock.snapshot(10).stable  # for every vCPU of the machine
    assert pv.write_msr(0x4B564D01, 0x2041).requests == (Request.MASTERCLOCK_UPDATE, Request.GLOBAL_CLOCK_UPDATE)
    kvmclock.update_masterclock(10)
    assert kvmclock.snapshot(10).stable


def test_other_vcpus_and_the_host_do_not_decide(memory, kvmclock, pv):
    other = Paravirt(memory, kvmclock, vcpu_id=1)
    assert other.write_msr(0x12, 0x2041).requests == (Request.GLOBAL_CLOCK_UPDATE,)
    assert pv.write_msr(0x12, 0x2041, host_initiated=True).requests == (Request.GLOBAL_CLOCK_UPDATE,)


@pytest.mark.parametrize("index", [0x11, 0x4B564D00])
def test_wall_clock(memory, pv, kvmclock, index):
    effect = pv.write_msr(index, 0x100)
    assert (effect.requests, effect.wall_clock) == ((), 0x100)
    kvmclock.write_wall_clock(memory, effect.wall_clock, 0, 5)
    assert pv.read_msr(0x11) == pv.read_msr(0x4B564D00) == 0x100


def test_steal_time(pv):
    assert pv.write_msr(0x4B564D03, 0x1041).requests == (Request.STEAL_UPDATE,)
    assert pv.read_msr(0x4B564D03) == 0x1041
    assert pv.write_msr(0x4B564D03, 0x1040).requests == ()
    assert pv.write_msr(0x4B564D03, 0x1043) is None


def test_pv_eoi(pv):
    assert pv.write_msr(0x4B564D04, 0x3005) == ((), None)
    assert pv.read_msr(0x4B564D04) == 0x3005
    assert pv.write_msr(0x4B564D04, 0x3006) is None


def test_poll_control(pv):
    assert pv.halt_poll_allowed
    assert pv.write_msr(0x4B564D05, 0) == ((), None)
    assert not pv.halt_poll_allowed
    assert pv.write_msr(0x4B564D05, 2) is None
    assert pv.read_msr(0x4B564D05) == 0


def test_async_page_faults(pv):
    assert pv.write_msr(0x4B564D06, 0xF3) == ((), None)
    assert pv.write_msr(0x4B564D06, 0x1F3) is None
    assert pv.write_msr(0x4B564D02, 0x4049).requests == (Request.APF_READY,)
    assert pv.write_msr(0x4B564D02, 0x4050) is None
    assert (pv.read_msr(0x4B564D02), pv.read_msr(0x4B564D06)) == (0x4049, 0xF3)
    assert pv.write_msr(0x4B564D07, 1).requests == (Request.APF_READY,)
    assert pv.write_msr(0x4B564D07, 2).requests == ()
    assert pv.read_msr(0x4B564D07) == 0
    assert pv.write_msr(0x4B564D02, 0).requests == ()


@pytest.mark.parametrize(
    ("bit", "indices"),
    [
        (0, [0x11, 0x12]),
        (3, [0x4B564D00, 0x4B564D01]),
        (4, [0x4B564D02]),
        (5, [0x4B564D03]),
        (6, [0x4B564D04]),
        (12, [0x4B564D05]),
        (14, [0x4B564D06, 0x4B564D07]),
    ],
)
def test_enforced_features_gate_their_msrs(memory, kvmclock, bit, indices):
    pv = Paravirt(memory, kvmclock, vcpu_id=0, enforced=KvmFeature(1 << bit))
    assert [i for i in EVERY if pv.read_msr(i) is not None] == indices
    assert [i for i in EVERY if pv.write_msr(i, 0) is not None] == indices


def test_reset_turns_everything_off_but_poll_control(pv):
    for index, value in ((0x12, 0x2041), (0x4B564D03, 0x1041), (0x4B564D04, 0x3005), (0x4B564D02, 0x4049)):
        assert pv.write_msr(index, value) is not None
    pv.write_msr(0x4B564D05, 0)
    pv.reset()
    assert [pv.read_msr(i) for i in EVERY] == [0] * 10


def test_state_travels(memory, kvmclock, pv):
    for index, value in ((0x12, 0x2041), (0x4B564D03, 0x1041), (0x4B564D04, 0x3005), (0x4B564D02, 0x4049)):
        pv.write_msr(index, value)
    pv.write_msr(0x4B564D05, 0)
    other = Paravirt(memory, kvmclock, vcpu_id=0)
    other.restore(pv.save())
    assert other.save() == pv.save()
    assert [other.read_msr(i) for i in EVERY] == [pv.read_msr(i) for i in EVERY]
    assert other.steal.enabled
