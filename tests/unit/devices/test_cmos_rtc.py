"""The clock chip (MC146818A data sheet)."""

from datetime import UTC, datetime

import pytest

from aiovm.devices.cmos_rtc import CmosRtc
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine

SECOND = 1_000_000_000


class Clock:
    def __init__(self, *when, nvram=None):
        wall = datetime(*(when or (2024, 2, 29, 13, 59, 58)), tzinfo=UTC)
        self.irq = IrqLine()
        self.rtc = CmosRtc(self.irq, boot_wall_ns=int(wall.timestamp()) * SECOND, nvram=nvram)

    def get(self, index, now=0):
        self.rtc.write(0, 1, index, now)
        return self.rtc.read(1, 1, now)

    def set(self, index, value, now=0):
        self.rtc.write(0, 1, index, now)
        self.rtc.write(1, 1, value, now)

    def clock(self, now=0):
        return [self.get(i, now) for i in (0x32, 9, 8, 7, 6, 4, 2, 0)]


def test_bcd_24_hours():
    clock = Clock()
    assert clock.clock() == [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x59, 0x58]
    assert clock.clock(2 * SECOND) == [0x20, 0x24, 0x02, 0x29, 5, 0x14, 0x00, 0x00]
    assert clock.clock(86_400 * SECOND) == [0x20, 0x24, 0x03, 0x01, 6, 0x13, 0x59, 0x58]


def test_registers_at_power_on():
    clock = Clock()
    assert [clock.get(i) for i in (0xA, 0xB, 0xC, 0xD)] == [0x26, 0x02, 0x00, 0x80]
    assert clock.rtc.read(0, 1, 0) == 0xFF


@pytest.mark.parametrize(
    ("hour", "b", "expected"),
    [
        (0, 0x00, 0x12),
        (11, 0x00, 0x11),
        (12, 0x00, 0x92),
        (23, 0x00, 0x91),
        (0, 0x04, 12),
        (23, 0x04, 0x8B),
        (23, 6, 23),
    ],
)
def test_hour_formats(hour, b, expected):
    clock = Clock(2024, 1, 1, hour)
    clock.set(0xB, b)
    assert clock.get(4) == expected
    clock.set(4, expected)
    assert clock.rtc.save().offset_ns % (86_400 * SECOND) == hour * 3600 * SECOND


def test_setting_the_clock():
    clock = Clock()
    clock.set(0xB, 0x82)
    for index, value in {0x32: 0x19, 9: 0x99, 8: 0x12, 7: 0x31, 4: 0x23, 2: 0x59, 0: 0x59}.items():
        clock.set(index, value, 10 * SECOND)
    assert clock.clock(15 * SECOND)[0] == 0x19, "stands still while SET"
    clock.set(0xB, 0x02, 20 * SECOND)
    assert clock.clock(20 * SECOND) == [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]
    assert clock.clock(21 * SECOND) == [0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00]


def test_setting_one_register_while_running():
    clock = Clock()
    clock.set(2, 0x30, SECOND // 2)
    assert clock.clock(SECOND) == [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x30, 0x59]


def test_nonsense_counts_on():
    clock = Clock(2023, 1, 1)
    clock.set(8, 0x00)
    clock.set(7, 0x32)
    assert clock.clock()[:4] == [0x20, 0x23, 0x02, 0x01]
    clock.set(0xB, 0x06)
    clock.set(0x32, 0xFF)
    clock.set(8, 0xFF)
    clock.set(0, 0xFF)
    assert clock.clock()[2] in range(1, 13)


def test_update_in_progress():
    clock = Clock()
    assert clock.get(0xA, SECOND - 244_141) == 0x26
    assert clock.get(0xA, SECOND - 244_140) == 0xA6
    assert clock.get(0xA, SECOND) == 0x26
    clock.set(0xB, 0x82, SECOND)
    assert clock.get(0xA, 2 * SECOND - 1) == 0x26
    clock.set(0xA, 0xFF)
    assert clock.get(0xA) == 0x7F


def test_update_interrupt():
    clock = Clock()
    clock.set(0xB, 0x12, SECOND // 2)
    assert clock.rtc.next_deadline() == SECOND
    clock.rtc.advance(SECOND - 1)
    assert not clock.irq.level
    clock.rtc.advance(SECOND)
    assert clock.irq.level
    assert clock.rtc.next_deadline() is None
    assert clock.get(0xC, SECOND) & 0x90 == 0x90
    assert not clock.irq.level
    assert clock.rtc.next_deadline() == 2 * SECOND
    clock.set(0xB, 0x92, SECOND)
    assert clock.get(0xB, SECOND) == 0x82, "SET clears the update enable"


@pytest.mark.parametrize(
    ("rate", "period"),
    [(1, 3_906_250), (2, 7_812_500), (3, 122_070), (6, 976_562), (10, 15_625_000), (15, 500_000_000)],
)
def test_periodic_rates(rate, period):
    clock = Clock()
    clock.set(0xA, 0x20 | rate)
    clock.set(0xB, 0x42)
    assert clock.rtc.next_deadline() - period in (0, 1)
    clock.rtc.advance(period + 1)
    assert clock.irq.level
    assert clock.get(0xC, period + 1) & 0xC0 == 0xC0


def test_periodic_off():
    clock = Clock()
    clock.set(0xA, 0x20)
    clock.set(0xB, 0x42)
    assert clock.rtc.next_deadline() is None
    clock.rtc.advance(10 * SECOND)
    assert clock.get(0xC, 10 * SECOND) & 0x40 == 0


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x13, 0x59, 0x59), 1),
        ((0x14, 0x00, 0x00), 2),
        ((0x13, 0x59, 0x58), 86_400),
        ((0xFF, 0xFF, 0x05), 7),
        ((0xFF, 0x01, 0xC0), 62),
        ((0xC0, 0xFF, 0xFF), 1),
        ((0x15, 0xFF, 0xFF), 3602),
    ],
)
def test_alarm(alarm, seconds):
    clock = Clock()
    for index, value in zip((5, 3, 1), alarm, strict=True):
        clock.set(index, value)
    clock.set(0xB, 0x22)
    assert clock.rtc.next_deadline() == seconds * SECOND
    clock.rtc.advance(seconds * SECOND - 1)
    assert not clock.irq.level
    clock.rtc.advance(seconds * SECOND)
    assert clock.irq.level
    assert clock.get(0xC, seconds * SECOND) & 0xA0 == 0xA0


def test_alarm_that_never_matches():
    clock = Clock()
    clock.set(1, 0x77)
    clock.set(0xB, 0x22)
    assert clock.rtc.next_deadline() is None
    clock.rtc.advance(200_000 * SECOND)
    assert clock.get(0xC, 200_000 * SECOND) & 0x20 == 0


def test_flags_without_enables_are_found_late():
    clock = Clock()
    assert clock.get(0xC, 5 * SECOND) == 0x50
    assert clock.get(0xC, 5 * SECOND) == 0x00
    assert clock.rtc.next_deadline() is None


def test_memory():
    clock = Clock(nvram={0x34: 0x12})
    assert clock.get(0x34) == 0x12
    clock.set(0x7F, 0xA5)
    assert clock.get(0xFF) == 0xA5, "bit 7 of the index is the NMI gate"
    clock.set(0xD, 0)
    clock.set(0xC, 0xFF)
    assert clock.get(0xD) == 0x80
    for index, value in ((0x32, 1), (0xB, 1), (0x80, 1), (0x40, 256)):
        with pytest.raises(ConfigError):
            Clock(nvram={index: value})


def test_save_restore_reset():
    clock = Clock()
    clock.set(0xB, 0x12)
    clock.set(0x40, 7)
    clock.rtc.advance(SECOND)
    saved = clock.rtc.save()
    clock.rtc.reset()
    assert not clock.irq.level
    assert clock.get(0xB, SECOND) == 0x02
    assert clock.get(0x40, SECOND) == 7, "the battery keeps it"
    clock.rtc.restore(saved)
    assert clock.irq.level
    saved.memory[0x40] = 0
    assert clock.get(0x40, SECOND) == 7
