"""The machine's clock: offset, master clock, GET/SET_CLOCK, wall clock, clock pairing (``x86.c``)."""

import struct

import pytest

from aiovm.errors import ConfigError
from aiovm.kvmclock import ClockData, ClockFlag, KvmClock, clock_pairing, write_wall_clock
from aiovm.memory import GuestMemory

SEC = 1_000_000_000


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def clock():
    return KvmClock(host_khz=2_000_000, now=SEC)


def test_a_machines_clock_starts_at_0(clock):
    assert clock.read(SEC) == 0
    assert clock.read(SEC + 12_345) == 12_345


def test_master_clock_gives_everybody_the_same_pair(clock):
    assert clock.use_master_clock
    assert clock.snapshot(SEC) == clock.snapshot(5 * SEC) == (0, 2 * SEC, True)
    clock.update_masterclock(5 * SEC)
    assert clock.snapshot(6 * SEC) == (4 * SEC, 10 * SEC, True)


def test_tscs_that_differ_end_the_master_clock(clock):
    clock.update_masterclock(2 * SEC, tscs_match=False)
    assert clock.snapshot(3 * SEC) == (2 * SEC, 6 * SEC, False)


def test_the_old_msr_on_the_boot_vcpu_ends_the_master_clock(clock):
    assert not clock.register(old_msr=False)
    assert clock.register(old_msr=True)
    assert not clock.register(old_msr=True)
    clock.update_masterclock(2 * SEC)
    assert not clock.snapshot(2 * SEC).stable
    assert clock.register(old_msr=False)
    clock.update_masterclock(2 * SEC)
    assert clock.snapshot(2 * SEC).stable


def test_get_clock(clock):
    assert clock.get_clock(3 * SEC, 77) == (2 * SEC, 2 | 4 | 8, 77, 6 * SEC)
    clock.update_masterclock(3 * SEC, tscs_match=False)
    assert clock.get_clock(3 * SEC, 77) == (2 * SEC, 0, 0, 0)


def test_set_clock(clock):
    clock.set_clock(ClockData(500), 3 * SEC, 0)
    assert clock.read(3 * SEC) == 500
    assert clock.read(4 * SEC) == SEC + 500
    clock.update_masterclock(4 * SEC, tscs_match=False)
    clock.register(old_msr=True)
    clock.set_clock(ClockData(700), 5 * SEC, 0)
    assert clock.read(5 * SEC) == 700


def test_set_clock_can_add_the_time_that_passed_but_not_go_back(clock):
    clock.set_clock(ClockData(500, ClockFlag.REALTIME, realtime=100), SEC, 130)
    assert clock.read(SEC) == 530
    clock.set_clock(ClockData(500, ClockFlag.REALTIME, realtime=100), SEC, 30)
    assert clock.read(SEC) == 500
    clock.set_clock(ClockData(500, ClockFlag.TSC_STABLE, realtime=100), SEC, 130)
    assert clock.read(SEC) == 500


@pytest.mark.parametrize("flags", [1, 16, -1])
def test_set_clock_refuses_unknown_flags(clock, flags):
    with pytest.raises(ConfigError, match="EINVAL"):
        clock.set_clock(ClockData(0, flags), SEC, 0)


def test_wall_clock_is_the_wall_time_of_the_clocks_zero(memory, clock):
    wall = 1_700_000_000 * SEC + 123
    clock.write_wall_clock(memory, 0x100, 3 * SEC, wall)
    assert struct.unpack("<III", memory.read(0x100, 12)) == (2, 1_699_999_998, 123)
    assert clock.wall_clock == 0x100


@pytest.mark.parametrize(("before", "after"), [(0, 2), (7, 10), (8, 10), (0xFFFFFFFF, 2)])
def test_wall_clock_version(memory, before, after):
    memory.write_u(0x100, 4, before)
    seen = []
    memory.on_write(lambda gpa, length: seen.append((length, memory.read_u(0x100, 4))))
    write_wall_clock(memory, 0x100, 0)
    assert seen == [(4, (after - 1) & 0xFFFFFFFF), (12, (after - 1) & 0xFFFFFFFF), (4, after)]


def test_wall_clock_at_0_or_without_memory_is_ignored(memory, clock):
    clock.write_wall_clock(memory, 0, SEC, SEC)
    assert memory.read(0, 12) == bytes(12)
    clock.write_wall_clock(memory, 0x5000_0000, SEC, SEC)
    assert clock.wall_clock == 0x5000_0000


def test_wall_seconds_overflow_in_2106(memory):
    write_wall_clock(memory, 0x100, (1 << 32) * SEC + 5)
    assert struct.unpack("<III", memory.read(0x100, 12)) == (2, 0, 5)


def test_clock_pairing(memory):
    assert clock_pairing(memory, 0x200, 0, 7 * SEC + 9, 1234) == 0
    assert memory.read(0x200, 64) == struct.pack("<qqQI", 7, 9, 1234, 0) + bytes(36)
    assert clock_pairing(memory, 0x200, 1, 0, 0) == -95
    assert clock_pairing(memory, 0x5000_0000, 0, 0, 0) == -14


def test_state_travels(clock):
    clock.register(old_msr=True)
    clock.set_clock(ClockData(500), 3 * SEC, 0)
    other = KvmClock(host_khz=2_000_000, now=0)
    other.restore(clock.save())
    assert other.save() == clock.save()
    assert other.read(9 * SEC) == clock.read(9 * SEC)
