"""The two 8259A (Intel 8259A data sheet)."""

import pytest

from aiovm.devices.pic8259 import Pic8259
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine


class Pair:
    def __init__(self, *, icw4=0x01, ready=True):
        self.acked = []
        self.masks = []
        self.intr = IrqLine()
        self.pic = Pic8259(
            self.intr, on_acknowledge=self.acked.append, on_mask=lambda irq, masked: self.masks.append((irq, masked))
        )
        if ready:
            for which, base in enumerate((0x20, 0x28)):
                self.init(which, base, icw4)

    def init(self, which, base, icw4=0x01):
        self.out(which, 0, 0x11)
        self.out(which, 1, base)
        self.out(which, 1, 0x04)
        self.out(which, 1, icw4)

    def out(self, which, offset, value):
        self.pic.ports[which].write(offset, 1, value, 0)

    def inb(self, which, offset=0):
        return self.pic.ports[which].read(offset, 1, 0)


def test_edge_request_goes_into_service():
    pair = Pair()
    assert pair.pic.set_line(4, True) == 1
    assert pair.pic.output
    assert pair.inb(0) == 0x10
    assert pair.pic.acknowledge() == 0x24
    assert not pair.pic.output
    assert pair.inb(0) == 0
    pair.out(0, 0, 0x0B)
    assert pair.inb(0) == 0x10, "OCW3 selects ISR"
    pair.out(0, 0, 0x20)
    assert pair.inb(0) == 0
    assert pair.acked == [4]


def test_edge_request_survives_the_fall_and_needs_a_new_rise():
    pair = Pair()
    pair.pic.set_line(4, True)
    pair.pic.set_line(4, False)
    assert pair.pic.acknowledge() == 0x24
    pair.out(0, 0, 0x20)
    assert not pair.pic.output
    assert pair.pic.set_line(4, True) == 1
    assert pair.pic.set_line(4, True, source=1) == 1
    assert pair.pic.output


def test_level_pin_follows_the_line():
    pair = Pair()
    pair.pic.elcr.write(1, 1, 0x04, 0)
    assert pair.pic.set_line(10, True) == 1
    assert pair.pic.set_line(10, True) == 0
    assert pair.pic.acknowledge() == 0x2A
    pair.out(1, 0, 0x20)
    pair.out(0, 0, 0x20)
    assert pair.pic.output, "still high"
    pair.pic.set_line(10, False)
    assert pair.pic.acknowledge() == 0x2F, "the master was told already: spurious from the slave"


@pytest.mark.parametrize(("offset", "kept"), [(0, 0xF8), (1, 0xDE)])
def test_elcr_masks(offset, kept):
    pair = Pair()
    pair.pic.elcr.write(offset, 1, 0xFF, 0)
    assert pair.pic.elcr.read(offset, 1, 0) == kept


def test_priority_nests():
    pair = Pair()
    pair.pic.set_line(5, True)
    assert pair.pic.acknowledge() == 0x25
    pair.pic.set_line(6, True)
    assert not pair.pic.output
    pair.pic.set_line(1, True)
    assert pair.pic.acknowledge() == 0x21
    pair.out(0, 0, 0x20)
    assert pair.acked == [1], "a plain EOI retires the highest"
    assert not pair.pic.output
    pair.out(0, 0, 0x65)
    assert pair.acked == [1, 5], "specific EOI"
    assert pair.pic.acknowledge() == 0x26


def test_slave_goes_through_pin_2():
    pair = Pair()
    pair.pic.set_line(12, True)
    assert pair.pic.output
    assert pair.pic.acknowledge() == 0x2C
    pair.pic.set_line(9, True)
    assert not pair.pic.output, "pin 2 is in service"
    pair.out(1, 0, 0x20)
    pair.out(0, 0, 0x20)
    assert pair.acked == [12, 2]
    assert pair.pic.acknowledge() == 0x29


def test_special_fully_nested_lets_the_slave_interrupt_itself():
    pair = Pair(icw4=0x11)
    pair.pic.set_line(12, True)
    pair.pic.acknowledge()
    pair.pic.set_line(9, True)
    assert pair.pic.acknowledge() == 0x29


def test_spurious():
    pair = Pair()
    assert pair.pic.acknowledge() == 0x27
    assert pair.inb(0) == 0
    pair.out(0, 0, 0x0B)
    assert pair.inb(0) == 0


def test_masking():
    pair = Pair()
    pair.out(0, 1, 0xFB)
    assert pair.inb(0, 1) == 0xFB
    assert pair.masks == [(i, True) for i in (0, 1, 3, 4, 5, 6, 7)]
    assert pair.pic.set_line(4, True) == -1
    assert not pair.pic.output
    pair.out(0, 1, 0xEB)
    assert pair.pic.output
    assert pair.masks[-1] == (4, False)


def test_automatic_eoi_and_rotation():
    pair = Pair(icw4=0x03)
    pair.out(0, 0, 0x80)
    pair.pic.set_line(3, True)
    pair.pic.set_line(4, True)
    assert pair.pic.acknowledge() == 0x23
    assert pair.acked == [3]
    pair.pic.set_line(3, False)
    pair.pic.set_line(3, True)
    assert pair.pic.acknowledge() == 0x24, "3 went to the bottom"
    pair.out(0, 0, 0x00)
    assert pair.pic.acknowledge() == 0x23
    pair.pic.set_line(4, False)
    pair.pic.set_line(4, True)
    assert pair.pic.acknowledge() == 0x24


def test_rotate_commands():
    pair = Pair()
    pair.out(0, 0, 0xC4)
    pair.pic.set_line(4, True)
    pair.pic.set_line(5, True)
    assert pair.pic.acknowledge() == 0x25, "after setting 4 lowest, 5 is highest"
    pair.out(0, 0, 0xA0)
    pair.pic.set_line(6, True)
    assert pair.pic.acknowledge() == 0x26, "rotate on EOI put 5 lowest"
    pair.out(0, 0, 0xE6)
    assert pair.acked == [5, 6]
    assert pair.pic.acknowledge() == 0x24
    pair.out(0, 0, 0x20)
    pair.out(0, 0, 0x20)
    assert pair.acked == [5, 6, 4], "an EOI with nothing in service is nothing"


def test_poll():
    pair = Pair()
    pair.out(0, 0, 0x0C)
    assert pair.inb(0) == 0x07
    pair.pic.set_line(3, True)
    pair.out(0, 0, 0x0C)
    assert pair.inb(0) == 0x83
    assert not pair.pic.output
    assert pair.acked == [3]
    pair.pic.set_line(14, True)
    pair.out(1, 0, 0x0C)
    assert pair.inb(1) == 0x86
    assert not pair.pic.output
    assert pair.inb(1) == 0


def test_icw1_keeps_level_requests():
    pair = Pair()
    pair.pic.elcr.write(0, 1, 0x20, 0)
    pair.out(0, 1, 0xFF)
    pair.pic.set_line(4, True)
    pair.pic.set_line(5, True)
    pair.init(0, 0x50)
    assert pair.inb(0, 1) == 0
    assert pair.pic.acknowledge() == 0x55


def test_icw1_without_icw4():
    pair = Pair(icw4=0x13)
    pair.out(0, 0, 0x10)
    pair.out(0, 1, 0x47)
    pair.out(0, 1, 0x04)
    pair.out(0, 1, 0xFE)
    assert pair.inb(0, 1) == 0xFE
    pair.pic.set_line(0, True)
    assert pair.pic.acknowledge() == 0x40, "ICW2 keeps its five high bits"
    assert pair.acked == [], "automatic EOI was turned off"


def test_special_mask_is_stored_only():
    pair = Pair()
    pair.out(0, 0, 0x68)
    assert pair.pic.save().chips[0].special_mask
    pair.out(0, 0, 0x48)
    assert not pair.pic.save().chips[0].special_mask


def test_only_bytes():
    pair = Pair()
    pair.pic.ports[0].write(1, 2, 0xFF, 0)
    assert pair.inb(0, 1) == 0
    assert pair.pic.ports[0].read(0, 2, 0) == 0


def test_wires_are_ored():
    pair = Pair()
    pair.pic.elcr.write(1, 1, 0x08, 0)
    first, second = pair.pic.new_line(11), pair.pic.new_line(11)
    first.set(True)
    second.set(True)
    first.set(False)
    assert pair.pic.output
    assert pair.inb(1) == 0x08
    second.set(False)
    assert pair.inb(1) == 0
    for irq in (2, 16, -1):
        with pytest.raises(ConfigError):
            pair.pic.new_line(irq)


def test_save_restore_reset():
    pair = Pair()
    pair.pic.set_line(4, True)
    saved = pair.pic.save()
    pair.pic.reset()
    assert not pair.pic.output
    pair.pic.restore(saved)
    assert pair.pic.output
    assert pair.pic.acknowledge() == 0x24
    assert saved.chips[0].irr == 0x10
