"""The 8254 and port 0x61 (Intel 8254 data sheet). The clock is 1 193 181 Hz."""

import pytest

from aiovm.devices.pit8254 import Pit8254
from aiovm.irq import IrqLine

HZ = 1_193_181


class Timer:
    def __init__(self, *, reinject=False):
        self.pulses = 0
        self.ticks = 0
        self.pit = Pit8254(IrqLine(self.edge), reinject=reinject, on_tick=self.tick)

    def edge(self, level):
        self.pulses += level

    def tick(self):
        self.ticks += 1

    def out(self, offset, value, now=0):
        self.pit.write(offset, 1, value, now)

    def inb(self, offset, now=0):
        return self.pit.read(offset, 1, now)

    def program(self, channel, mode, count, now=0):
        self.out(3, channel << 6 | 0x30 | mode << 1, now)
        self.out(channel, count & 0xFF, now)
        self.out(channel, count >> 8, now)

    def count(self, channel, now):
        return self.inb(channel, now) | self.inb(channel, now) << 8


def after(ticks):
    """The first nanosecond by which ``ticks`` clocks have passed."""
    return -(-ticks * 1_000_000_000 // HZ)


def test_mode_0_fires_once():
    timer = Timer()
    timer.program(0, 0, 11932, 1000)
    deadline = 1000 + 11932 * 1_000_000_000 // HZ
    assert timer.pit.next_deadline() == deadline
    timer.pit.advance(deadline - 1)
    assert timer.pulses == 0
    timer.pit.advance(deadline)
    assert (timer.pulses, timer.ticks) == (1, 1)
    assert timer.pit.next_deadline() is None


def test_periodic_modes_step_from_their_deadline():
    timer = Timer()
    timer.program(0, 2, 11932)
    period = 11932 * 1_000_000_000 // HZ
    timer.pit.advance(period + 5)
    assert timer.pit.next_deadline() == 2 * period
    timer.pit.advance(5 * period)
    assert timer.pulses == 2, "missed ticks merge"
    assert timer.pit.next_deadline() == 6 * period


def test_shortest_period():
    timer = Timer()
    timer.program(0, 3, 2)
    assert timer.pit.next_deadline() == 200_000


def test_count_zero_is_65536():
    timer = Timer()
    timer.program(0, 0, 0)
    assert timer.pit.next_deadline() == 65536 * 1_000_000_000 // HZ


def test_mode_5_stops_channel_0():
    timer = Timer()
    timer.program(0, 2, 1000)
    timer.program(0, 5, 1000)
    assert timer.pit.next_deadline() is None


def test_control_word_alone_lets_the_timer_run():
    timer = Timer()
    timer.program(0, 2, 11932)
    timer.out(3, 0x30)
    timer.pit.advance(100_000_000)
    assert timer.pit.next_deadline() is not None


def test_reinject_sends_every_tick():
    timer = Timer(reinject=True)
    timer.program(0, 2, 11932)
    timer.pit.advance(35_000_000)
    assert timer.pulses == 1
    for expected in (2, 3, 3):
        timer.pit.acknowledge()
        assert timer.pulses == expected
    timer.pit.advance(40_001_000)
    assert timer.pulses == 4
    timer.pit.acknowledge()
    assert timer.pulses == 4


def test_reinject_waits_for_the_acknowledge():
    timer = Timer(reinject=True)
    timer.program(0, 2, 11932)
    timer.pit.advance(10_001_000)
    timer.pit.advance(20_001_000)
    assert timer.pulses == 1
    timer.pit.acknowledge()
    assert timer.pulses == 2


def test_unmask_drops_the_backlog():
    timer = Timer(reinject=True)
    timer.program(0, 2, 11932)
    timer.pit.advance(35_000_000)
    timer.pit.unmasked()
    timer.pit.acknowledge()
    assert timer.pulses == 1
    timer.pit.advance(45_000_000)
    assert timer.pulses == 2


@pytest.mark.parametrize(
    ("mode", "ticks", "expected"),
    [
        (0, 100, 900),
        (0, 1001, 0xFFFF),
        (1, 100, 900),
        (4, 100, 900),
        (5, 1000, 0),
        (2, 100, 900),
        (2, 1100, 900),
        (3, 100, 800),
        (3, 600, 800),
    ],
)
def test_counter_value(mode, ticks, expected):
    timer = Timer()
    timer.program(2, mode, 1000)
    assert timer.count(2, after(ticks)) == expected


def test_channel_0_counts_within_its_period():
    timer = Timer()
    timer.program(0, 2, 11932)
    timer.pit.advance(timer.pit.next_deadline())
    now = timer.pit.next_deadline() - 1_000_000
    assert timer.count(0, now) == 11932 - (11932 - 1194)


@pytest.mark.parametrize(
    ("mode", "ticks", "level"),
    [
        (0, 999, False),
        (0, 1000, True),
        (1, 999, True),
        (1, 1000, False),
        (2, 0, False),
        (2, 999, False),
        (2, 2000, True),
        (3, 499, True),
        (3, 500, False),
        (3, 1000, True),
        (4, 999, False),
        (4, 1000, True),
        (5, 1001, False),
    ],
)
def test_output(mode, ticks, level):
    timer = Timer()
    timer.pit.speaker.write(0, 1, 0x01, 0)
    timer.program(2, mode, 1000)
    assert bool(timer.pit.speaker.read(0, 1, after(ticks)) & 0x20) is level


@pytest.mark.parametrize(("access", "expected"), [(1, [0x34, 0x34]), (2, [0x12, 0x12]), (3, [0x34, 0x12])])
def test_access_modes(access, expected):
    timer = Timer()
    timer.out(3, 0x80 | access << 4)
    for byte in {1: [0x34], 2: [0x12], 3: [0x34, 0x12]}[access]:
        timer.out(2, byte)
    assert timer.pit.save().channels[2].count == {1: 0x34, 2: 0x1200, 3: 0x1234}[access]
    channel = timer.pit.save()
    channel.channels[2].count = 0x1234
    timer.pit.restore(channel)
    assert [timer.inb(2), timer.inb(2)] == expected


@pytest.mark.parametrize(("access", "expected"), [(1, [0x84]), (2, [0x03]), (3, [0x84, 0x03])])
def test_latched_count_stands_still(access, expected):
    timer = Timer()
    timer.program(2, 0, 1000)
    timer.out(3, 0x80 | access << 4)
    timer.out(3, 0x80, after(100))
    timer.out(3, 0x80, after(300))
    assert [timer.inb(2, after(500)) for _ in expected] == expected
    assert timer.pit.save().channels[2].latched == 0


def test_read_back():
    timer = Timer()
    timer.program(0, 2, 1000)
    timer.program(2, 3, 1000)
    timer.out(3, 0xC0 | 0x0A, after(100))
    assert timer.inb(2, after(700)) == 0xB6, "status first: output high, word access, mode 3"
    assert timer.count(2, after(700)) == 800
    assert timer.inb(0, after(700)) == 0x34
    assert timer.count(0, after(700)) == 900
    assert timer.pit.save().channels[1].status is None


def test_read_back_status_only_is_latched_once():
    timer = Timer()
    timer.program(2, 0, 1000)
    timer.out(3, 0xE8, after(100))
    timer.out(3, 0xE8, after(2000))
    assert timer.inb(2, after(2000)) == 0x30
    assert timer.pit.save().channels[2].latched == 0


def test_modes_6_and_7_are_2_and_3():
    timer = Timer()
    timer.program(2, 6, 1000)
    assert timer.pit.save().channels[2].mode == 2
    timer.program(2, 7, 1000)
    assert timer.pit.save().channels[2].mode == 3


def test_control_register_reads_0():
    assert Timer().inb(3) == 0


def test_gate_2_restarts_the_counter():
    timer = Timer()
    timer.program(2, 1, 1000)
    timer.pit.speaker.write(0, 1, 0x03, after(500))
    assert timer.count(2, after(600)) == 900
    assert timer.pit.speaker.read(0, 1, 0) & 0x03 == 0x03
    timer.pit.speaker.write(0, 1, 0x00, after(500))
    assert timer.pit.speaker.read(0, 1, 0) & 0x03 == 0


def test_gate_does_not_restart_mode_0():
    timer = Timer()
    timer.program(2, 0, 1000)
    timer.pit.speaker.write(0, 1, 0x01, after(500))
    assert timer.count(2, after(600)) == 400


def test_refresh_toggles_every_16384_ns():
    speaker = Timer().pit.speaker
    assert [speaker.read(0, 1, 16384 * i) >> 4 & 1 for i in range(4)] == [0, 1, 0, 1]


def test_save_restore_reset():
    timer = Timer()
    timer.program(0, 2, 11932)
    saved = timer.pit.save()
    timer.pit.reset()
    assert timer.pit.next_deadline() is None
    assert timer.pit.save().channels[2].gate is False
    timer.pit.restore(saved)
    assert timer.pit.next_deadline() == 11932 * 1_000_000_000 // HZ
