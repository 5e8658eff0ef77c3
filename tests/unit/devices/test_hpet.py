"""The HPET (Intel IA-PC HPET specification 1.0a). A tick is 10 ns."""

import pytest

from aiovm.devices.hpet import Hpet
from aiovm.irq import IrqLine


class Chip:
    def __init__(self):
        self.pulses = [0] * 24
        self.lines = [IrqLine(self.sink(i)) for i in range(24)]
        self.legacy = []
        self.hpet = Hpet(self.lines, on_legacy=self.legacy.append)

    def sink(self, index):
        def count(level):
            self.pulses[index] += level

        return count

    def get(self, offset, now=0, size=8):
        return self.hpet.read(offset, size, now)

    def set(self, offset, value, now=0, size=8):
        self.hpet.write(offset, size, value, now)


def test_capabilities():
    chip = Chip()
    assert chip.get(0) == 10_000_000 << 32 | 0x8086_A201
    assert chip.get(4, size=4) == 10_000_000
    assert chip.get(0x100) == 0x00FF_FFFF_0000_0030
    assert chip.get(0x108) == 0xFFFF_FFFF_FFFF_FFFF
    assert [chip.get(o) for o in (0x10, 0x20, 0xF0, 0x110, 0x160, 0x30)] == [0] * 6


def test_counter_runs_while_enabled():
    chip = Chip()
    chip.set(0xF0, 1000)
    assert chip.get(0xF0, 500) == 1000
    chip.set(0x10, 1, 1000)
    assert chip.get(0xF0, 3000) == 1200
    chip.set(0xF0, 0, 3000)
    assert chip.get(0xF0, 3000) == 1200, "a running counter is not written"
    chip.set(0x10, 0, 3000)
    assert chip.get(0xF0, 9000) == 1200


def test_counter_halves_and_wrap():
    chip = Chip()
    chip.set(0xF4, 0xFFFF_FFFF, size=4)
    chip.set(0xF0, 0xFFFF_FFFF, size=4)
    chip.set(0x10, 1)
    assert chip.get(0xF0, 20) == 1
    chip.set(0x10, 0, 20)
    assert chip.get(0xF4, 20, size=4) == 0


def test_one_shot_edge():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x108, 100)
    assert chip.hpet.next_deadline() is None
    chip.set(0x100, 0x4 | 5 << 9)
    assert chip.hpet.next_deadline() == 1000
    chip.hpet.advance(999)
    assert chip.pulses[5] == 0
    chip.hpet.advance(1000)
    chip.hpet.advance(5000)
    assert chip.pulses[5] == 1
    assert chip.get(0x108, 5000) == 100
    assert chip.hpet.next_deadline() is None, "a whole turn of 64 bits ahead"


def test_32_bit_timer_matches_once_a_turn():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x100, 0x104 | 5 << 9)
    chip.set(0x108, 0x1_0000_0064)
    assert chip.get(0x108) == 100
    chip.hpet.advance(1000)
    assert chip.hpet.next_deadline() == 1000 + 10 * (1 << 32)


def test_periodic_as_an_operating_system_sets_it():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x120, 0x14C | 6 << 9, size=4)
    chip.set(0x128, 300, size=4)
    chip.set(0x128, 1000, size=4)
    assert chip.get(0x120) & 0x40 == 0
    assert chip.hpet.next_deadline() == 3000
    chip.hpet.advance(3000)
    assert chip.hpet.next_deadline() == 13_000
    assert chip.get(0x128, 3000) == 1300
    chip.hpet.advance(45_000)
    assert chip.hpet.next_deadline() == 53_000
    assert chip.pulses[6] == 2


def test_level_holds_until_the_status_is_cleared():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x148, 10)
    chip.set(0x140, 0x6 | 7 << 9)
    chip.hpet.advance(100)
    assert chip.lines[7].level
    assert chip.get(0x20, 100) == 4
    chip.set(0x20, 4, 100)
    assert not chip.lines[7].level
    chip.set(0x148, 20, 100)
    chip.hpet.advance(200)
    assert chip.lines[7].level
    chip.set(0x140, 0x4 | 7 << 9, 200)
    assert not chip.lines[7].level, "edge mode has no status"
    assert chip.get(0x20, 200) == 0


def test_legacy_replacement():
    chip = Chip()
    chip.set(0x10, 3)
    assert chip.legacy == [True]
    for timer, offset in ((0, 0x100), (1, 0x120), (2, 0x140)):
        chip.set(offset + 8, 10 + timer)
        chip.set(offset, 0x4 | 5 << 9)
    chip.hpet.advance(1000)
    assert (chip.pulses[0], chip.pulses[8], chip.pulses[5]) == (1, 1, 1)
    chip.set(0x10, 1, 1000)
    assert chip.legacy == [True, False]


def test_interrupts_off_and_no_such_route():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x108, 10)
    chip.set(0x100, 5 << 9)
    chip.hpet.advance(1000)
    chip.set(0x108, 200, 1000)
    chip.set(0x100, 0x4 | 31 << 9, 1000)
    chip.hpet.advance(3000)
    assert sum(chip.pulses) == 0


def test_disabled_chip_has_no_deadline():
    chip = Chip()
    chip.set(0x108, 10)
    chip.set(0x100, 0x4)
    assert chip.hpet.next_deadline() is None
    chip.hpet.advance(1000)
    assert sum(chip.pulses) == 0


def test_comparator_at_the_present_count_is_a_turn_ahead():
    chip = Chip()
    chip.set(0x10, 1)
    chip.set(0x100, 0x104)
    chip.set(0x108, 100, 1000)
    assert chip.hpet.next_deadline() == 1000 + 10 * (1 << 32)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8)])
def test_odd_accesses(offset, size):
    chip = Chip()
    assert chip.get(offset, size=size) == 0
    chip.set(0x10 + offset, 0xFF, size=size)
    assert chip.get(0x10) == 0


def test_save_restore_reset():
    chip = Chip()
    chip.set(0x10, 3)
    chip.set(0x140, 0x6 | 7 << 9)
    chip.set(0x148, 10)
    chip.hpet.advance(100)
    saved = chip.hpet.save()
    chip.hpet.reset()
    assert not chip.lines[7].level
    assert chip.legacy == [True, False]
    chip.hpet.restore(saved)
    assert chip.lines[7].level
    assert chip.legacy == [True, False, True]
    saved.timers[2].config = 0
    assert chip.get(0x140, 100) & 0x6 == 0x6
