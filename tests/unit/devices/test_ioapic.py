"""The I/O APIC (82093AA data sheet)."""

import pytest

from aiovm.devices.ioapic import IoApic
from aiovm.errors import ConfigError
from aiovm.lapic_message import DeliveryMode, IpiMessage, Shorthand


class Chip:
    def __init__(self, answer=1):
        self.sent = []
        self.answer = answer
        self.acked = []
        self.masks = []
        self.routes = 0
        self.chip = IoApic(
            self.deliver,
            on_acknowledge=self.acked.append,
            on_mask=lambda pin, masked: self.masks.append((pin, masked)),
            on_routes=self.scan,
        )

    def deliver(self, message):
        self.sent.append(message)
        return self.answer

    def scan(self):
        self.routes += 1

    def reg(self, index):
        self.chip.write(0x00, 4, index, 0)
        return self.chip.read(0x10, 4, 0)

    def set_reg(self, index, value):
        self.chip.write(0x00, 4, index, 0)
        self.chip.write(0x10, 4, value, 0)

    def route(self, pin, low, dest=0):
        self.set_reg(0x11 + 2 * pin, dest << 24)
        self.set_reg(0x10 + 2 * pin, low)


def test_reset_values():
    chip = Chip()
    assert chip.chip.read(0x00, 4, 0) == 0
    assert chip.reg(0) == 0
    assert chip.reg(1) == 0x0017_0011
    for pin in range(24):
        assert chip.reg(0x10 + 2 * pin) == 0x1_0000
        assert chip.reg(0x11 + 2 * pin) == 0
    assert chip.reg(0x40) == 0xFFFF_FFFF
    assert chip.reg(0x05) == 0xFFFF_FFFF


def test_id_and_read_only_registers():
    chip = Chip()
    chip.set_reg(0, 0xFF00_0000)
    chip.set_reg(1, 0)
    chip.set_reg(0x40, 0)
    assert chip.reg(0) == 0x0F00_0000
    assert chip.reg(2) == 0x0F00_0000
    assert chip.reg(1) == 0x0017_0011
    chip.chip.write(0x20, 4, 0x12, 0)
    assert chip.chip.read(0x20, 4, 0) == 0
    chip.chip.write(0, 4, 0x1_23, 0)
    assert chip.chip.read(0, 4, 0) == 0x23


def test_status_bits_are_read_only():
    chip = Chip()
    chip.route(3, 0xFFFF_FFFF, 0x5A)
    assert chip.reg(0x16) == 0xFFFF_AFFF
    assert chip.reg(0x17) == 0x5A00_0000


def test_edge_pin_sends_at_the_rise():
    chip = Chip()
    chip.route(4, 0x0931, 0x03)
    line = chip.chip.new_line(4)
    line.set(True)
    assert chip.sent == [
        IpiMessage(0x31, DeliveryMode.LOWEST_PRIORITY, True, True, False, Shorthand.NONE, 0x03),
    ]
    assert chip.chip.set_line(4, True, source=7) == 0, "merged"
    line.set(False)
    assert chip.chip.set_line(4, False, source=7) == 1
    line.set(True)
    assert len(chip.sent) == 2


def test_wires_to_one_pin_are_ored():
    chip = Chip()
    chip.route(9, 0x8041)
    first, second = chip.chip.new_line(9), chip.chip.new_line(9)
    first.set(True)
    second.set(True)
    first.set(False)
    chip.chip.eoi(0x41, True, 0)
    assert len(chip.sent) == 2, "the other wire is still high"
    second.set(False)
    chip.chip.eoi(0x41, True, 0)
    assert len(chip.sent) == 2


def test_level_pin_is_sent_again_at_eoi_while_high():
    chip = Chip()
    chip.route(9, 0x8041)
    assert chip.chip.set_line(9, True) == 1
    assert chip.reg(0x22) == 0xC041
    assert chip.chip.set_line(9, True, source=1) == 0
    chip.chip.eoi(0x41, True, 0)
    assert len(chip.sent) == 2
    assert chip.acked == [9]
    assert chip.reg(0x22) == 0xC041
    chip.chip.set_line(9, False)
    chip.chip.set_line(9, False, source=1)
    chip.chip.eoi(0x41, True, 0)
    assert chip.reg(0x22) == 0x8041
    assert len(chip.sent) == 2


def test_eoi_of_an_edge_vector_only_tells():
    chip = Chip()
    chip.route(4, 0x31)
    chip.chip.eoi(0x31, False, 0)
    chip.chip.eoi(0x32, False, 0)
    assert chip.acked == [4]


def test_masked_edge_is_not_sent_by_the_unmask():
    chip = Chip()
    assert chip.chip.set_line(4, True) == -1
    chip.chip.set_line(4, False)
    chip.route(4, 0x31)
    assert chip.sent == []
    assert chip.masks == [(4, False)]


def test_masked_level_is_sent_by_the_unmask():
    chip = Chip()
    chip.route(9, 0x1_8041)
    chip.chip.set_line(9, True)
    assert chip.sent == []
    chip.set_reg(0x22, 0x8041)
    assert len(chip.sent) == 1
    chip.set_reg(0x22, 0x8041)
    assert len(chip.sent) == 1, "remote IRR survives the store"


def test_flip_to_edge_clears_remote_irr():
    chip = Chip()
    chip.route(9, 0x8041)
    chip.chip.set_line(9, True)
    chip.set_reg(0x22, 0x1_0041)
    assert chip.reg(0x22) == 0x1_0041
    chip.set_reg(0x22, 0x8041)
    assert len(chip.sent) == 2


@pytest.mark.parametrize(("answer", "entry"), [(1, 0xC041), (0, 0x8041), (-1, 0xC041)])
def test_remote_irr_follows_the_answer(answer, entry):
    chip = Chip(answer)
    chip.route(9, 0x8041)
    assert chip.chip.set_line(9, True) == answer
    assert chip.reg(0x22) == entry


def test_routes_are_announced():
    chip = Chip()
    before = chip.routes
    chip.route(4, 0x31)
    assert chip.routes == before + 2
    assert chip.chip.vector_of(4) == 0x31


def test_storm_is_put_off_by_10_ms():
    chip = Chip()
    chip.route(9, 0x8041)
    chip.chip.set_line(9, True)
    for _ in range(9999):
        chip.chip.eoi(0x41, True, 500)
    assert len(chip.sent) == 10_000
    chip.chip.eoi(0x41, True, 500)
    assert len(chip.sent) == 10_000
    assert chip.chip.next_deadline() == 10_000_500
    chip.chip.advance(10_000_499)
    assert len(chip.sent) == 10_000
    chip.chip.advance(10_000_500)
    assert len(chip.sent) == 10_001
    assert chip.chip.next_deadline() is None


def test_quiet_eoi_ends_the_count():
    chip = Chip()
    chip.route(9, 0x8041)
    for _ in range(3):
        chip.chip.set_line(9, True)
        chip.chip.eoi(0x41, True, 0)
        chip.chip.set_line(9, False)
        chip.chip.eoi(0x41, True, 0)
    assert chip.chip.save().repeats[9] == 0


def test_save_restore_reset():
    chip = Chip()
    chip.route(9, 0x8041)
    chip.chip.set_line(9, True)
    saved = chip.chip.save()
    chip.chip.reset()
    assert chip.reg(0x22) == 0x1_0000
    assert chip.chip.save().sources[9] == 1, "the wire is still high"
    chip.chip.restore(saved)
    assert chip.reg(0x22) == 0xC041
    saved.table[9] = 0
    assert chip.reg(0x22) == 0xC041


def test_no_such_pin():
    with pytest.raises(ConfigError):
        Chip().chip.new_line(24)
