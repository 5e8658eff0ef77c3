"""ACPI fixed hardware (ACPI 6.5, 4.8.3). The timer runs at 3.579545 MHz."""

import pytest

from aiovm.devices.acpi_pm import AcpiPm
from aiovm.irq import IrqLine

HZ = 3_579_545
SECOND = 1_000_000_000


class Block:
    def __init__(self, **kw):
        self.sci = IrqLine()
        self.offs = 0
        self.pm = AcpiPm(self.sci, self.off, **kw)

    def off(self):
        self.offs += 1


def test_timer_counts():
    pm = Block().pm
    assert pm.read(8, 4, 0) == 0
    assert pm.read(8, 4, SECOND) == 3_579_545
    pm.write(8, 4, 0x1234, SECOND)
    assert pm.read(8, 4, SECOND) == 3_579_545
    assert pm.read(8, 4, 2000 * SECOND) == 2000 * HZ % (1 << 32)


def test_narrow_timer_wraps_at_24_bits():
    pm = Block(wide_timer=False).pm
    assert pm.read(8, 4, 5 * SECOND) == 5 * HZ - (1 << 24)


def test_timer_interrupt_at_each_change_of_the_top_bit():
    block = Block(wide_timer=False)
    assert block.pm.next_deadline() is None
    block.pm.write(2, 2, 0x0001, 0)
    half = -(-(1 << 23) * SECOND // HZ)
    assert block.pm.next_deadline() == half
    block.pm.advance(half - 1)
    assert not block.sci.level
    block.pm.advance(half)
    assert block.sci.level
    assert block.pm.read(0, 2, half) == 1
    assert block.pm.next_deadline() is None
    block.pm.write(0, 2, 0x0001, half)
    assert not block.sci.level
    assert block.pm.read(0, 2, half) == 0
    assert block.pm.next_deadline() == -(-(1 << 24) * SECOND // HZ)


def test_status_is_found_without_the_interrupt():
    assert Block(wide_timer=False).pm.read(0, 2, 3 * SECOND) == 1


def test_power_button():
    block = Block()
    block.pm.press_power_button()
    assert not block.sci.level
    block.pm.write(2, 2, 0xFFFF, 0)
    assert block.pm.read(0, 4, 0) == 0x0521_0100  # the clock's enable bit (10) is kept too
    assert block.sci.level
    block.pm.write(1, 1, 0x01, 0)
    assert not block.sci.level


@pytest.mark.parametrize(("value", "s5", "off"), [(0x2000, 0, 1), (0x3400, 5, 1), (0x2400, 0, 0), (0x0000, 0, 0)])
def test_s5(value, s5, off):
    block = Block(s5_type=s5)
    block.pm.write(4, 2, value, 0)
    assert block.offs == off
    assert block.pm.read(4, 2, 0) == value & 0x1C00 | 1


def test_control_by_bytes():
    block = Block(s5_type=5)
    block.pm.write(4, 1, 0xFF, 0)
    assert block.pm.read(4, 2, 0) == 1
    block.pm.write(5, 1, 0x34, 0)
    assert block.offs == 1


def test_save_restore_reset():
    block = Block()
    block.pm.write(2, 2, 0x0100, 0)
    block.pm.press_power_button()
    saved = block.pm.save()
    block.pm.reset()
    assert not block.sci.level
    assert block.pm.read(0, 4, 0) == 0
    block.pm.restore(saved)
    assert block.sci.level
