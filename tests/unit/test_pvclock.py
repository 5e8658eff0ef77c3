"""The paravirtual clock's scale, record, version protocol and MSR (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

import struct

import pytest

from aiovm.errors import ConfigError, StateError
from aiovm.memory import GuestMemory, GuestPtr, SlotFlags
from aiovm.pvclock import ClockSnapshot, PvClock, PvclockFlag, PvclockRecord, TimeScale, clock_scale, time_scale

GPA = 0x2040
STABLE = ClockSnapshot(5_000, 1_000, True)


@pytest.fixture
def memory():
    m = GuestMemory()
    m.set_region(0, 0, 0x10000)
    return m


@pytest.fixture
def clock(memory):
    c = PvClock(memory)
    c.write_msr(GPA | 1)
    return c


def fields(memory, gpa=GPA):
    """version, pad, timestamp, system time, mul, shift, flags, pad, pad."""
    return struct.unpack("<IIQQIbBBB", memory.read(gpa, 32))


def flags(memory):
    return memory.read_u(GPA + 29, 1)


# ---- scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("khz", "shift", "mul", "error"),
    [
        (500_000, 2, 0x80000000, 0),
        (1_000_000, 1, 0x80000000, 0),
        (2_000_000, 0, 0x80000000, 0),
        (2_400_000, -1, 0xD5555555, -1),
        (2_893_202, -1, 0xB0F7705B, -1),
        (3_000_000, -1, 0xAAAAAAAA, -3),
        (4_000_000, -1, 0x80000000, 0),
        (4_500_000, -2, 0xE38E38E3, -2),
    ],
)
def test_scale_table(khz, shift, mul, error):
    scale = clock_scale(khz)
    assert scale == (shift, mul)
    assert scale.scale(khz * 10_000) - 10 * 10**9 == error


def test_ns_to_cycles():
    assert time_scale(2_400_000_000, 10**9) == (2, 2_576_980_377)


def test_scaled_frequencies_above_32_bits():
    assert time_scale(10**10, 10**9) == TimeScale(4, 2_684_354_560)
    assert time_scale(10**9, 10**10).scale(10**10) == 999_999_999


@pytest.mark.parametrize(("scaled", "base"), [(0, 1), (1, 0), (10**9, -1)])
def test_a_clock_needs_a_speed(scaled, base):
    with pytest.raises(ConfigError, match="Hz"):
        time_scale(scaled, base)


def test_scale_keeps_64_bits_of_the_shifted_delta():
    assert TimeScale(1, 0x80000000).scale((1 << 63) + 5) == 5
    assert TimeScale(0, 0x80000000).scale(-2) == (1 << 63) - 1


def test_reading_a_record():
    record = PvclockRecord(2, 1_000, 5_000, clock_scale(2_400_000), PvclockFlag.NONE)
    assert record.read(1_000) == 5_000
    assert record.read(1_000 + 2_400_000) == 1_004_999
    assert PvclockRecord(2, 7, 0, clock_scale(1_000_000), PvclockFlag.NONE).read(8) == 1
    assert record.read(999) > 1 << 60  # a timestamp in the future makes the clock leap


def test_record_layout():
    record = PvclockRecord(2, 3, 4, TimeScale(-1, 6), PvclockFlag(3))
    data = record.pack()
    assert data == bytes.fromhex("02000000 00000000 0300000000000000 0400000000000000 06000000 ff 03 0000")
    assert PvclockRecord.unpack(data) == record


# ---- the version protocol and the flags --------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "during", "after"), [(0, 1, 2), (7, 9, 10), (10, 11, 12), (0xFFFFFFFF, 1, 2)])
def test_version(memory, clock, monkeypatch, before, during, after):
    memory.write_u(GPA, 4, before)
    seen = []
    write = GuestPtr.write

    def watched(self, offset, data):
        done = write(self, offset, data)
        seen.append((len(data), memory.read_u(GPA, 4)))
        return done

    monkeypatch.setattr(GuestPtr, "write", watched)
    assert clock.update(STABLE, 1_000, 2_400_000)
    assert seen == [(4, during), (32, during), (4, after)]


def test_update_fills_the_record(memory, clock):
    clock.update(STABLE, 777, 2_400_000)
    assert fields(memory) == (2, 0, 777, 5_000, 0xD5555555, -1, 1, 0, 0)


def test_stable_follows_the_snapshot(memory, clock):
    clock.update(ClockSnapshot(1, 1, False), 1, 2_400_000)
    assert flags(memory) == 0


def test_scale_is_computed_again_when_the_speed_changes(memory, clock):
    clock.update(STABLE, 1, 2_400_000)
    clock.update(STABLE, 1, 2_400_000)
    assert fields(memory)[4:6] == (0xD5555555, -1)
    clock.update(STABLE, 1, 1_000_000)
    assert fields(memory)[4:6] == (0x80000000, 1)


def test_guest_stopped_is_one_shot_and_stays_until_the_guest_clears_it(memory, clock):
    clock.update(STABLE, 1, 2_400_000)
    clock.ctrl()
    clock.update(STABLE, 1, 2_400_000)
    assert flags(memory) == 3
    clock.update(STABLE, 1, 2_400_000)
    assert flags(memory) == 3
    memory.write_u(GPA + 29, 1, 1)
    clock.update(STABLE, 1, 2_400_000)
    assert flags(memory) == 1


def test_junk_flags_of_the_guest_do_not_survive(memory, clock):
    memory.write_u(GPA + 29, 1, 0xFD)
    clock.update(ClockSnapshot(1, 1, False), 1, 2_400_000)
    assert flags(memory) == 0


def test_ctrl_needs_a_record(memory):
    with pytest.raises(StateError, match="EINVAL"):
        PvClock(memory).ctrl()


# ---- the MSR -----------------------------------------------------------------------------------------------------


def test_bit_0_clear_leaves_memory_alone(memory):
    clock = PvClock(memory)
    clock.write_msr(GPA)
    assert clock.read_msr() == GPA
    assert not clock.enabled
    assert not clock.update(STABLE, 1, 2_400_000)
    assert memory.read(GPA, 32) == bytes(32)


def test_switching_off(memory, clock):
    clock.write_msr(GPA)
    assert not clock.update(STABLE, 1, 2_400_000)
    assert memory.read(GPA, 32) == bytes(32)


@pytest.mark.parametrize("value", [0x5000_0001, (1 << 64) - 1, 0x2FF0 | 1, 0x2FE2 | 1])
def test_an_address_that_cannot_hold_a_record(memory, value):
    """No memory there, or the record would cross a page: no fault, but no clock."""
    clock = PvClock(memory)
    clock.write_msr(value)
    assert clock.read_msr() == value
    assert not clock.enabled
    assert not clock.update(STABLE, 1, 2_400_000)


@pytest.mark.parametrize("gpa", [0x2FE0, 0x2004, 0x2002])
def test_alignment_does_not_matter_within_a_page(memory, gpa):
    clock = PvClock(memory)
    clock.write_msr(gpa | 1)
    assert clock.update(STABLE, 1, 2_400_000)
    assert fields(memory, gpa)[3] == 5_000


def test_reset_unregisters(memory, clock):
    clock.reset()
    assert clock.read_msr() == 0
    assert not clock.update(STABLE, 1, 2_400_000)
    assert memory.read(GPA, 32) == bytes(32)
    clock.write_msr(GPA | 1)
    assert clock.update(STABLE, 1, 2_400_000)
    assert fields(memory)[4] == 0xD5555555


def test_memory_that_went_away_or_turned_read_only(memory, clock):
    memory.set_region(0, 0, 0)
    assert not clock.update(STABLE, 1, 2_400_000)
    memory.set_region(0, 0, 0x10000, flags=SlotFlags.READONLY)
    assert not clock.update(STABLE, 1, 2_400_000)
    memory.set_region(0, 0, 0)
    memory.set_region(0, 0, 0x10000)
    assert clock.update(STABLE, 1, 2_400_000)


def test_state_travels(memory, clock):
    clock.update(STABLE, 1, 2_400_000)
    clock.ctrl()
    other = PvClock(memory)
    other.restore(clock.save())
    assert other.save() == clock.save()
    assert other.update(STABLE, 1, 2_400_000)
    assert flags(memory) == 3
    off = PvClock(memory)
    off.restore(PvClock(memory).save())
    assert not off.enabled
