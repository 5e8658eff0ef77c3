"""The keyboard controller (IBM PC/AT technical reference)."""

import pytest

from aiovm.devices.i8042 import I8042
from aiovm.irq import IrqLine


class Controller:
    def __init__(self):
        self.events = []
        self.irq = IrqLine()
        self.chip = I8042(self.irq, lambda: self.events.append("reset"), self.events.append)

    def command(self, value, data=None):
        self.chip.control.write(0, 1, value, 0)
        if data is not None:
            self.chip.data.write(0, 1, data, 0)

    def status(self):
        return self.chip.control.read(0, 1, 0)

    def data(self):
        return self.chip.data.read(0, 1, 0)


def test_status_at_power_on():
    assert Controller().status() == 0x10


def test_self_test():
    chip = Controller()
    chip.command(0xAA)
    assert chip.status() == 0x1D
    assert chip.data() == 0x55
    assert chip.status() == 0x1C
    assert chip.data() == 0


@pytest.mark.parametrize(("command", "answer"), [(0xAB, 0x01), (0xA9, 0x01), (0xC0, 0x80), (0xD0, 0x03), (0x20, 0)])
def test_answers(command, answer):
    chip = Controller()
    chip.command(command)
    assert chip.status() & 1
    assert chip.data() == answer
    assert not chip.status() & 1


def test_command_byte_enables_the_interrupt():
    chip = Controller()
    chip.command(0x60, 0x45)
    assert chip.status() & 0x08 == 0
    chip.command(0x20)
    assert chip.irq.level
    assert chip.data() == 0x45
    assert not chip.irq.level
    chip.command(0xD2, 0x99)
    assert chip.data() == 0x99


def test_a20():
    chip = Controller()
    chip.command(0xD1, 0x01)
    chip.command(0xD1, 0x03)
    chip.command(0xDD)
    chip.command(0xDF)
    assert chip.events == [False, True, False, True]


@pytest.mark.parametrize(("command", "resets"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xF1, 0)])
def test_pulse(command, resets):
    chip = Controller()
    chip.command(command)
    assert len(chip.events) == resets


def test_reset_by_output_port():
    chip = Controller()
    chip.command(0xD1, 0x02)
    assert chip.events == ["reset"]


def test_bytes_for_the_keyboard_are_swallowed():
    chip = Controller()
    chip.chip.data.write(0, 1, 0xFF, 0)
    chip.command(0xD4, 0xF4)
    chip.command(0x77)
    assert chip.status() & 1 == 0


def test_save_restore_reset():
    chip = Controller()
    chip.command(0x60, 0x01)
    chip.command(0xDD)
    chip.command(0xAA)
    saved = chip.chip.save()
    chip.chip.reset()
    assert not chip.irq.level
    assert chip.events == [False, True]
    chip.chip.restore(saved)
    assert chip.irq.level
    assert chip.events == [False, True, False]
    assert chip.data() == 0x55
