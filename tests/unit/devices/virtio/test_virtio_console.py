"""The virtio console (Virtio 1.2, 5.3): bytes both ways, and who waits for whom."""

import pytest
from virtio_driver import Driver

from aiovm.devices.virtio.console import VirtioConsole


class Terminal:
    def __init__(self):
        self.shown = bytearray()
        self.most = 1 << 30
        self.rooms = 0

    def show(self, data):
        taken = data[: self.most]
        self.most -= len(taken)
        self.shown += taken
        return len(taken)

    def room(self):
        self.rooms += 1


@pytest.fixture
def terminal():
    return Terminal()


@pytest.fixture
def driver(terminal):
    return Driver(lambda memory, irq: VirtioConsole(memory, irq, terminal.show, on_room=terminal.room, columns=132))


def test_configuration(driver):
    assert driver.get(0x08) == 3
    assert driver.features() & 0xFFFFFF == 0b101
    assert driver.get(0x100, 2) == 132
    assert driver.get(0x102, 2) == 25
    assert driver.get(0x104) == 1


def test_output_reaches_the_sink_and_the_buffer_comes_back(driver, terminal):
    driver.send(1, b"hello ", b"world")
    driver.send(1, b"")
    assert terminal.shown == b"hello world"
    assert driver.rings[1].take() == [(0, 0), (2, 0)]
    assert driver.acknowledge() == 1


def test_a_sink_that_is_full_holds_the_buffer_back(driver, terminal):
    terminal.most = 3
    driver.send(1, b"abcdef")
    driver.send(1, b"gh")
    assert terminal.shown == b"abc"
    assert driver.rings[1].take() == []
    terminal.most = 4
    driver.device.drain()
    assert terminal.shown == b"abcdefg"
    assert driver.rings[1].take() == [(0, 0)]
    terminal.most = 9
    driver.device.drain()
    assert terminal.shown == b"abcdefgh"
    assert driver.rings[1].take() == [(1, 0)]


def test_input_fills_the_buffers_that_the_guest_offered(driver, terminal):
    assert driver.device.feed(b"abc") == 0
    _, (first,) = driver.send(0, 2)
    _, (second,) = driver.send(0, 8)
    assert terminal.rooms == 2 + 1
    assert driver.device.feed(b"abc") == 3
    assert driver.rings[0].take() == [(0, 2), (1, 1)]
    assert driver.memory.read(first, 2) + driver.memory.read(second, 2) == b"abc\0"
    driver.send(0, 1)
    assert driver.device.feed(b"xyz") == 1


def test_nothing_is_fed_before_the_driver_runs(terminal):
    driver = Driver(lambda memory, irq: VirtioConsole(memory, irq, terminal.show), start=False)
    assert driver.device.feed(b"abc") == 0
    driver.start()
    driver.send(0, 2)
    assert driver.device.feed(b"a") == 1


def test_resize_changes_the_generation_and_interrupts(driver):
    before = driver.get(0xFC)
    driver.device.resize(100, 40)
    assert driver.get(0xFC) != before
    assert driver.get(0x100) == 40 << 16 | 100
    assert driver.acknowledge() == 2


def test_emergency_writes_work_without_a_driver(terminal):
    driver = Driver(lambda memory, irq: VirtioConsole(memory, irq, terminal.show), start=False)
    driver.set(0x108, 0x141)
    driver.set(0x104, 0x42)
    assert terminal.shown == b"A"
    driver.device.resize(1, 1)
    assert driver.irq.level is False


def test_the_buffer_under_way_moves_with_the_state(driver, terminal):
    terminal.most = 2
    driver.send(1, b"abcd")
    state = driver.device.save()
    assert state.sent == 2
    other_terminal = Terminal()
    other = VirtioConsole(driver.memory, driver.irq, other_terminal.show)
    other.restore(state)
    assert other.save() == state
    other.drain()
    assert other_terminal.shown == b"cd"
    assert driver.rings[1].take() == [(0, 0)]


def test_reset_forgets_the_buffer_and_keeps_the_window(driver, terminal):
    terminal.most = 2
    driver.send(1, b"abcd")
    driver.start()
    terminal.most = 9
    driver.device.drain()
    assert terminal.shown == b"ab"
    assert driver.get(0x100, 2) == 132


def test_a_message_beyond_a_mebibyte_breaks_the_device(driver):
    driver.rings[1].descriptor(0, 0, 0x10_0001)
    driver.rings[1].offer(0)
    driver.kick(1)
    assert driver.needs_reset
