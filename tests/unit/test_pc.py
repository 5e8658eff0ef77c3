"""The PC's wiring: which wire ends where, whose deadline is armed, who ends the machine."""

import pytest

from aiovm.bus import Bus
from aiovm.clock import VirtualClock
from aiovm.lapic import Lapic
from aiovm.memory import GuestMemory
from aiovm.pc import Pc

REDIRECTION = 0x10


class Cpu:
    def __init__(self, index):
        self.apic = Lapic(index, bsp=index == 0)
        self.seen = []

    def notice_extint(self):
        self.seen.append("extint")

    def inject_nmi(self):
        self.seen.append("nmi")


class Board:
    ram_size = 64 << 20

    def __init__(self, cpus=2):
        self.memory = GuestMemory()
        self.ports = Bus("port", 16)
        self.mmio = Bus("MMIO", 52)
        self.clock = VirtualClock()
        self.vcpus = [Cpu(i) for i in range(cpus)]
        self.messages = []
        self.ended = []
        self.sent = bytearray()
        self.pc = Pc(self, sink=lambda byte: self.sent.append(byte) or True, on_room=lambda: None)

    def call_at(self, deadline, callback):
        return self.clock.call_at(deadline, callback)

    def post(self, deadline, callback):
        self.clock.call_at(deadline, callback)

    def deliver_message(self, message):
        self.messages.append(message.vector)
        return 1

    def end(self, reason, status):
        self.ended.append((reason, status))

    def out(self, port, value, size=1):
        assert self.ports.write(port, size, value, self.clock.now())

    def inb(self, port, size=1):
        return self.ports.read(port, size, self.clock.now())

    def route(self, pin, vector, flags=0):
        for half, value in ((0, vector | flags), (1, 0)):
            self.mmio.write(0xFEC0_0000, 4, REDIRECTION + 2 * pin + half, 0)
            self.mmio.write(0xFEC0_0010, 4, value, 0)

    def pic(self, mask=0):
        for port, words in ((0x20, (0x11,)), (0x21, (0x20, 4, 1, mask)), (0xA0, (0x11,)), (0xA1, (0x28, 2, 1, 0))):
            for word in words:
                self.out(port, word)

    def run_until(self, now):
        while self.clock.horizon() - self.clock.lookahead <= now:
            self.clock.step()


@pytest.fixture
def board():
    return Board()


@pytest.mark.parametrize(("gsi", "pin", "irq"), [(0, 2, 0), (1, 1, 1), (4, 4, 4), (9, 9, 9), (15, 15, 15)])
def test_isa_interrupts_reach_both_controllers(board, gsi, pin, irq):
    board.route(pin, 0x50)
    line = board.pc.new_line(gsi)
    line.set(True)
    assert board.messages == [0x50]
    board.out(0x20 if irq < 8 else 0xA0, 0x0A)  # read IRR
    assert board.inb(0x20 if irq < 8 else 0xA0) == 1 << (irq & 7)


@pytest.mark.parametrize("gsi", [2, 16, 23])
def test_the_others_reach_the_io_apic_alone(board, gsi):
    board.route(gsi, 0x51)
    board.pc.new_line(gsi).set(True)
    assert board.messages == [0x51]
    board.out(0x20, 0x0A)
    assert board.inb(0x20) == 0


def test_wires_to_one_input_are_ored(board):
    board.route(10, 0x52, flags=0x8000)
    first, second = board.pc.new_line(10), board.pc.new_line(10)
    first.set(True)
    second.set(True)
    first.set(False)
    board.pc.broadcast_eoi(0x52, level=True)
    assert board.messages == [0x52, 0x52]  # the second still holds it
    second.set(False)
    board.pc.broadcast_eoi(0x52, level=True)
    assert board.messages == [0x52, 0x52]


def test_the_8259s_interrupt_whoever_takes_extint(board):
    board.pic()
    board.pc.new_line(5).set(True)
    board.clock.step()
    assert board.vcpus[0].seen == ["extint"]
    assert board.pc.pending(board.vcpus[0])
    assert not board.pc.pending(board.vcpus[1])  # its LVT0 is masked
    assert board.pc.pic.acknowledge() == 0x25
    assert not board.pc.pending(board.vcpus[0])


def test_the_pit_ticks_and_waits_for_the_acknowledge(board):
    board.route(2, 0x30)
    assert [cpu.apic.watched_vectors for cpu in board.vcpus] == [1 << 0x30, 1 << 0x30]
    for value in (0x34,):
        board.out(0x43, value)
    for value in (0xA9, 0x04):  # 1193 ticks: 1 ms
        board.out(0x40, value)
    board.run_until(3_500_000)
    assert board.messages == [0x30]  # the rest is counted
    board.pc.broadcast_eoi(0x30, level=False)
    board.pc.broadcast_eoi(0x30, level=False)
    assert board.messages == [0x30, 0x30, 0x30]


def test_lint0_as_nmi_gets_every_tick(board):
    apic = board.vcpus[1].apic
    apic.mmio_write(0x0F0, 4, 0x1FF, 0)
    apic.mmio_write(0x350, 4, 0x400, 0)
    board.out(0x43, 0x30)
    board.out(0x40, 0x10)
    board.out(0x40, 0x00)
    board.run_until(100_000)
    assert board.vcpus[1].seen == ["nmi"]


def test_the_hpet_replaces_pit_and_clock(board):
    board.route(2, 0x31)
    board.mmio.write(0xFED0_0010, 8, 0b11, 0)  # enable, legacy replacement
    board.out(0x43, 0x30)
    board.out(0x40, 0x10)
    board.out(0x40, 0x00)
    board.run_until(1_000_000)
    assert board.messages == []
    board.mmio.write(0xFED0_0108, 8, 200_000, board.clock.now())  # timer 0 at 2 ms
    board.mmio.write(0xFED0_0100, 8, 0x4, board.clock.now())
    board.run_until(3_000_000)
    assert board.messages == [0x31]


def test_serial_port(board):
    board.route(4, 0x34)
    board.out(0x3F8, ord("a"))
    assert board.sent == b"a"
    board.out(0x3F9, 1)
    assert board.pc.serial.feed(b"x", 0) == 1
    board.pc.rearm(board.pc.serial)
    assert board.messages == [0x34]
    assert board.inb(0x3F8) == ord("x")


@pytest.mark.parametrize(
    ("port", "value", "size", "ended"),
    [
        (0x604, 0x2000, 2, ("power-off", 0)),
        (0xCF9, 0x06, 1, ("reset", 0)),
        (0x92, 0x03, 1, ("reset", 0)),
        (0x64, 0xFE, 1, ("reset", 0)),
    ],
)
def test_ways_to_end(board, port, value, size, ended):
    board.out(port, value, size)
    assert board.ended == [ended]


def test_cmos_tells_memory_and_cpus(board):
    def cmos(index):
        board.out(0x70, index)
        return board.inb(0x71)

    assert cmos(0x15) | cmos(0x16) << 8 == 640
    assert cmos(0x17) | cmos(0x18) << 8 == 63 << 10
    assert cmos(0x34) | cmos(0x35) << 8 == 48 << 4  # 64 KiB blocks above 16 MiB
    assert cmos(0x5F) == 1
    assert (cmos(9), cmos(8), cmos(7)) == (0x26, 1, 1)  # the virtual clock begins with 2026


def test_fw_cfg_and_testdev_are_there(board):
    board.out(0x510, 0, 2)
    assert bytes(board.inb(0x511) for _ in range(4)) == b"QEMU"
    board.route(20, 0x60)
    board.out(0x2014, 1)
    assert board.messages == [0x60]
    board.mmio.write(0xFF00_0000, 4, 0x1234_5678, 0)
    assert board.mmio.read(0xFF00_0002, 2, 0) == 0x1234
