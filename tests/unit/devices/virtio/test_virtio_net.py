"""The virtio network card (Virtio 1.2, 5.1)."""

import pytest
from virtio_driver import Driver

from aiovm.devices.virtio.net import VirtioNet
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine

MAC = bytes.fromhex("525400123456")
HEADER = bytes(12)


class Wire:
    def __init__(self):
        self.frames = []
        self.busy = False
        self.rooms = 0

    def put(self, frame):
        if self.busy:
            return False
        self.frames.append(frame)
        return True

    def room(self):
        self.rooms += 1


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def driver(wire):
    return Driver(lambda memory, irq: VirtioNet(memory, irq, wire.put, mac=MAC, on_room=wire.room))


def test_configuration(driver):
    assert driver.get(0x08) == 1
    assert driver.features() & 0xFFFFFF == 1 << 3 | 1 << 5 | 1 << 16
    assert bytes(driver.get(0x100 + i, 1) for i in range(6)) == MAC
    assert driver.get(0x106, 2) == 1
    assert driver.get(0x108, 2) == 1
    assert driver.get(0x10A, 2) == 1500
    driver.set(0x100, 0)
    assert driver.get(0x100, 1) == 0x52


@pytest.mark.parametrize(("mac", "mtu"), [(b"\x01\0\0\0\0\0", 1500), (b"\0" * 5, 1500), (MAC, 67), (MAC, 0x1_0000)])
def test_wrong_settings_are_refused(wire, mac, mtu):
    with pytest.raises(ConfigError):
        VirtioNet(Driver, IrqLine(), wire.put, mac=mac, mtu=mtu)


def test_a_frame_goes_out_without_its_header(driver, wire):
    frame = bytes(range(60))
    driver.send(1, HEADER + frame[:10], frame[10:])
    assert wire.frames == [frame]
    assert driver.rings[1].take() == [(0, 0)]


def test_frames_wait_while_the_wire_is_busy(driver, wire):
    wire.busy = True
    driver.send(1, HEADER + b"a" * 60)
    driver.send(1, HEADER + b"b" * 60)
    assert driver.rings[1].take() == []
    wire.busy = False
    driver.device.drain()
    assert wire.frames == [b"a" * 60, b"b" * 60]
    assert driver.rings[1].take() == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("length", "sent"), [(0, 0), (13, 0), (14, 1), (1518, 1), (1519, 0)])
def test_frames_that_are_too_short_or_too_long_are_dropped(driver, wire, length, sent):
    driver.send(1, HEADER + bytes(length))
    assert len(wire.frames) == sent
    assert driver.rings[1].take() == [(0, 0)]
    assert not driver.needs_reset


def test_a_received_frame_has_a_plain_header_of_one_buffer(driver, wire):
    assert driver.device.receive(b"x" * 60) is False
    before = wire.rooms
    _, (address,) = driver.send(0, 1526)
    assert wire.rooms == before + 1
    assert driver.device.receive(b"x" * 60) is True
    assert driver.rings[0].take() == [(0, 72)]
    assert driver.memory.read(address, 72) == bytes(10) + b"\x01\x00" + b"x" * 60


def test_a_receive_buffer_that_is_too_small_breaks_the_device(driver):
    driver.send(0, 71)
    driver.device.receive(b"x" * 60)
    assert driver.needs_reset


def test_link_state_is_configuration(driver):
    driver.device.set_link(False)
    assert driver.get(0x106, 2) == 0
    assert driver.acknowledge() == 2
    driver.start()
    assert driver.get(0x106, 2) == 0


def test_a_frame_that_waits_moves_with_the_state(driver, wire):
    wire.busy = True
    driver.send(1, HEADER + b"a" * 60)
    other_wire = Wire()
    other = VirtioNet(driver.memory, driver.irq, other_wire.put, mac=MAC)
    other.restore(driver.device.save())
    assert other.save() == driver.device.save()
    other.drain()
    assert other_wire.frames == [b"a" * 60]
    wire.busy = False
    driver.device.reset()
    driver.device.drain()
    assert wire.frames == []
