"""The 16550A (PC16550D data sheet, tables II–IV)."""

import pytest

from aiovm.devices.uart16550 import Msr, Uart16550
from aiovm.irq import IrqLine


class Port:
    def __init__(self, *, willing=True):
        self.sent = []
        self.willing = willing
        self.rooms = 0
        self.irq = IrqLine()
        self.uart = Uart16550(self.irq, self.take, on_room=self.room)

    def take(self, byte):
        if self.willing:
            self.sent.append(byte)
        return self.willing

    def room(self):
        self.rooms += 1

    def inb(self, offset, now=0):
        return self.uart.read(offset, 1, now)

    def outb(self, offset, value, now=0):
        self.uart.write(offset, 1, value, now)


def test_reset_values():
    port = Port()
    assert [port.inb(i) for i in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert not port.irq.level


def test_bytes_go_out_at_once():
    port = Port()
    for byte in b"ok":
        port.outb(0, byte)
        assert port.inb(5) == 0x60
    assert bytes(port.sent) == b"ok"


def test_divisor_latch():
    port = Port()
    port.outb(3, 0x83)
    port.outb(0, 0x34)
    port.outb(1, 0x12)
    assert (port.inb(0), port.inb(1)) == (0x34, 0x12)
    port.outb(3, 0x03)
    assert (port.inb(0), port.inb(1)) == (0, 0)
    assert port.sent == []


def test_scratch_and_read_only_registers():
    port = Port()
    port.outb(7, 0xA5)
    port.outb(5, 0xFF)
    port.outb(6, 0xFF)
    assert port.inb(7) == 0xA5
    assert port.inb(5) == 0x60
    assert port.inb(6) == 0xB0
    assert port.inb(8) == 0xFF


def test_wide_accesses_are_bytes_in_a_row():
    port = Port()
    port.uart.write(3, 2, 0x0B_03, 0)
    assert port.uart.read(3, 2, 0) == 0x0B_03
    assert port.uart.read(6, 2, 0) == 0x00B0


def test_transmitter_empty_interrupt_goes_when_iir_shows_it():
    port = Port()
    port.outb(1, 0x02)
    assert port.irq.level
    assert port.inb(2) == 0x02
    assert not port.irq.level
    assert port.inb(2) == 0x01
    port.outb(0, 0x41)
    assert port.irq.level, "sent, empty again"
    port.outb(1, 0x00)
    assert not port.irq.level
    port.inb(2)
    port.outb(1, 0x02)
    assert port.irq.level, "the enable bit's rise raises it again"
    port.inb(2)
    port.outb(1, 0x02)
    assert not port.irq.level, "no rise, no event"


def test_back_pressure():
    port = Port(willing=False)
    port.outb(2, 0x01)
    port.outb(1, 0x02)
    port.inb(2)
    for byte in range(17):
        port.outb(0, byte)
    assert port.inb(5) == 0x00
    assert not port.irq.level
    port.willing = True
    port.uart.drain()
    assert port.sent == [*range(15), 16], "the full transmitter's last byte was overwritten"
    assert port.inb(5) == 0x60
    assert port.irq.level


def test_clearing_the_transmitter_drops_what_waits():
    port = Port(willing=False)
    port.outb(2, 0x01)
    port.outb(0, 0x41)
    port.outb(2, 0x05)
    assert port.inb(5) == 0x60
    port.willing = True
    port.uart.drain()
    assert port.sent == []


def test_receive_without_fifo_takes_one_byte():
    port = Port()
    port.outb(1, 0x01)
    assert port.uart.feed(b"ab", 0) == 1
    assert port.irq.level
    assert port.inb(2) == 0x04
    assert port.inb(5) == 0x61
    assert port.uart.feed(b"b", 0) == 0
    assert port.inb(0) == 0x61
    assert port.rooms == 1
    assert not port.irq.level
    assert port.uart.room == 1


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(fcr, trigger):
    port = Port()
    port.outb(2, fcr)
    port.outb(1, 0x01)
    assert port.uart.feed(bytes(trigger - 1), 0) == trigger - 1
    assert not port.irq.level
    assert port.uart.feed(bytes(20), 0) == 17 - trigger
    assert port.irq.level
    assert port.inb(2) == 0xC4
    for _ in range(17 - trigger):
        port.inb(0)
    assert not port.irq.level


def test_character_timeout_after_four_characters():
    port = Port()
    port.outb(3, 0x83)
    port.outb(0, 1)
    port.outb(1, 0)
    port.outb(3, 0x03)
    port.outb(2, 0xC1)
    port.outb(1, 0x01)
    port.uart.feed(b"xy", 1000)
    deadline = 1000 + 4 * 10 * 1_000_000_000 // 115_200
    assert port.uart.next_deadline() == deadline
    port.uart.advance(deadline - 1)
    assert not port.irq.level
    port.uart.advance(deadline)
    assert port.irq.level
    assert port.inb(2) == 0xCC
    assert port.uart.next_deadline() is None
    port.inb(0, deadline)
    assert not port.irq.level, "a read restarts the wait"
    assert port.uart.next_deadline() is not None
    port.inb(0, deadline)
    assert port.uart.next_deadline() is None


def test_changing_fifo_mode_clears_both():
    port = Port()
    port.outb(2, 0x01)
    port.uart.feed(b"abc", 0)
    port.outb(2, 0x00)
    assert port.inb(5) == 0x60
    assert port.inb(2) == 0x01
    port.outb(2, 0xC0)
    port.outb(2, 0x01)
    assert port.uart.read(2, 1, 0) == 0xC1
    port.uart.feed(b"abc", 0)
    port.outb(2, 0x03)
    assert port.inb(5) == 0x60


def test_break_has_the_highest_priority():
    port = Port()
    port.outb(2, 0x01)
    port.outb(1, 0x0F)
    port.uart.feed(b"a", 0)
    assert port.uart.feed_break(0)
    assert port.inb(5) == 0xE1, "an error waits behind the first character"
    assert port.inb(2) == 0xC4
    assert port.inb(0) == 0x61
    assert port.inb(2) == 0xC6
    assert port.inb(5) == 0xF1
    assert port.inb(5) == 0x61
    assert port.inb(2) == 0xC4
    assert port.inb(0) == 0


def test_no_room_for_a_break():
    port = Port()
    port.uart.feed(b"a", 0)
    assert not port.uart.feed_break(0)


def test_the_line_is_told_when_loopback_ends():
    port = Port()
    port.outb(4, 0x10)
    assert (port.uart.room, port.uart.empty, port.rooms) == (0, True, 0)
    port.outb(4, 0x0B)
    assert (port.uart.room, port.uart.empty, port.rooms) == (1, True, 1)
    port.uart.feed(b"a", 0)
    assert not port.uart.empty


def test_loopback_data_and_overrun():
    port = Port()
    port.outb(4, 0x10)
    assert port.uart.room == 0
    port.outb(1, 0x04)
    port.outb(0, 0x55)
    port.outb(0, 0x66)
    assert port.sent == []
    assert port.inb(2) == 0x06
    assert port.inb(5) == 0x63
    assert port.inb(5) == 0x61
    assert port.inb(0) == 0x55


@pytest.mark.parametrize(("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)])
def test_loopback_modem_lines(mcr, msr):
    port = Port()
    port.outb(4, 0x10)
    port.inb(6)
    port.outb(4, mcr)
    assert port.inb(6) & 0xF0 == msr
    assert port.inb(4) == mcr


def test_modem_changes():
    port = Port()
    port.outb(1, 0x08)
    port.uart.set_modem(Msr.CTS | Msr.RI)
    assert port.irq.level
    assert port.inb(2) == 0x00
    assert port.inb(6) == 0x5A, "DSR and DCD changed; RI's rise is no event"
    assert not port.irq.level
    port.uart.set_modem(Msr.CTS)
    assert port.inb(6) == 0x14
    assert port.inb(6) == 0x10


def test_save_and_restore():
    port = Port()
    port.outb(2, 0x01)
    port.outb(1, 0x01)
    port.uart.feed(b"abc", 0)
    saved = port.uart.save()
    port.uart.reset()
    assert not port.irq.level
    assert port.inb(5) == 0x60
    other = Port()
    other.uart.restore(saved)
    assert other.irq.level
    assert other.inb(0) == 0x61
    assert saved.received == [0x61, 0x62, 0x63]
