"""virtio-mmio registers (Virtio 1.2, 4.2.2), status, negotiation and the interrupt."""

import pytest
from virtio_driver import Driver

from aiovm.devices.virtio.rng import VirtioRng
from aiovm.irq import IrqLine
from aiovm.memory import GuestMemory

VERSION_1 = 1 << 32


def rng(memory, irq):
    return VirtioRng(memory, irq, lambda n: b"\xa5" * n)


def test_identification():
    driver = Driver(rng, start=False)
    assert driver.get(0x000) == 0x7472_6976
    assert driver.get(0x004) == 2
    assert driver.get(0x008) == 4
    assert driver.get(0x00C) == int.from_bytes(b"aiov", "little")
    assert driver.features() == VERSION_1 | 1 << 29 | 1 << 28
    driver.set(0x14, 2)
    assert driver.get(0x10) == 0


@pytest.mark.parametrize("offset", [0x0B0, 0x0B4, 0x0B8, 0x0BC])
def test_no_shared_memory_region_exists(offset):
    assert Driver(rng, start=False).get(offset) == 0xFFFF_FFFF


def test_only_aligned_words_reach_the_registers():
    driver = Driver(rng, start=False)
    assert driver.get(0x000, 1) == 0
    assert driver.get(0x002, 4) == 0
    assert driver.get(0x000, 8) == 0
    driver.set(0x70, 1, size=1)
    driver.set(0x71, 1)
    assert driver.get(0x70) == 0


def test_write_only_and_unknown_registers_read_as_zero():
    driver = Driver(rng)
    for offset in (0x014, 0x020, 0x024, 0x030, 0x038, 0x050, 0x064, 0x080, 0x090, 0x0A4, 0x0C0, 0x0F0, 0x100, 0x1FC):
        assert driver.get(offset) == 0
    driver.set(0x000, 5)
    driver.set(0x100, 5)
    assert driver.get(0x000) == 0x7472_6976


@pytest.mark.parametrize(
    ("features", "ok"),
    [
        (VERSION_1, True),
        (VERSION_1 | 1 << 28 | 1 << 29, True),
        (0, False),
        (1 << 28, False),
        (VERSION_1 | 1 << 0, False),
        (VERSION_1 | 1 << 33, False),
    ],
)
def test_features_ok_stays_only_for_a_subset_with_version_1(features, ok):
    driver = Driver(rng, start=False)
    driver.set(0x70, 3)
    driver.set(0x24, 0)
    driver.set(0x20, features & 0xFFFF_FFFF)
    driver.set(0x24, 1)
    driver.set(0x20, features >> 32)
    driver.set(0x70, 0xB)
    assert driver.get(0x70) == (0xB if ok else 3)


def test_a_feature_beyond_bit_63_is_refused():
    driver = Driver(rng, start=False)
    driver.set(0x24, 1)
    driver.set(0x20, 1)
    driver.set(0x24, 2)
    driver.set(0x20, 0)
    driver.set(0x70, 0xB)
    assert driver.get(0x70) == 0xB
    driver.set(0x70, 0)
    driver.set(0x24, 1)
    driver.set(0x20, 1)
    driver.set(0x24, 2)
    driver.set(0x20, 4)
    driver.set(0x70, 0xB)
    assert driver.get(0x70) == 3


def test_features_are_fixed_after_features_ok():
    driver = Driver(rng, features=VERSION_1)
    driver.set(0x24, 0)
    driver.set(0x20, 1 << 28)
    assert driver.device.save().transport.driver_features == VERSION_1


def test_no_buffer_is_used_before_driver_ok():
    driver = Driver(rng)
    driver.set(0x70, 0)
    driver.start()
    ring = driver.rings[0]
    driver.set(0x70, 0)
    driver.set(0x24, 1)
    driver.set(0x20, 1)
    driver.set(0x70, 0xB)
    for at, address in ((0x80, ring.table), (0x90, ring.avail), (0xA0, ring.used)):
        driver.set(at, address)
    driver.set(0x38, 16)
    driver.set(0x44, 1)
    driver.send(0, 8)
    assert ring.take() == []
    driver.set(0x70, 0xF)
    assert ring.take() == [(0, 8)]


def test_the_line_follows_interrupt_status():
    driver = Driver(rng)
    driver.send(0, 8)
    assert driver.get(0x60) == 1
    assert driver.levels == [True]
    driver.set(0x64, 2)
    assert driver.get(0x60) == 1
    driver.set(0x64, 1)
    assert driver.get(0x60) == 0
    assert driver.levels == [True, False]


def test_a_queue_that_is_not_there_has_size_zero():
    driver = Driver(rng)
    driver.set(0x30, 1)
    assert driver.get(0x34) == 0
    assert driver.get(0x44) == 0
    driver.set(0x44, 1)
    driver.set(0x38, 4)
    driver.set(0x50, 1)
    driver.set(0x50, 0xFFFF)
    assert driver.get(0x44) == 0
    driver.set(0x30, 0)
    assert driver.get(0x34) == 64


@pytest.mark.parametrize("size", [0, 3, 128, 0xFFFF_FFFF])
def test_a_size_that_is_no_power_of_two_or_too_large_is_not_taken(size):
    driver = Driver(rng, size=16)
    driver.set(0x44, 0)
    driver.set(0x38, size)
    assert driver.device.save().transport.queues[0].size == 16


def test_a_ready_queue_keeps_its_place():
    driver = Driver(rng)
    before = driver.device.save().transport.queues[0]
    for offset in (0x38, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4):
        driver.set(offset, 8)
    assert driver.device.save().transport.queues[0] == before
    driver.set(0x44, 0)
    for offset, value in ((0x84, 1), (0x94, 2), (0xA4, 3)):
        driver.set(offset, value)
    after = driver.device.save().transport.queues[0]
    assert after.descriptors == 0x1_0000_0000 | before.descriptors
    assert after.driver == 0x2_0000_0000 | before.driver
    assert after.device == 0x3_0000_0000 | before.device


def test_a_queue_that_is_set_up_again_begins_at_its_start():
    driver = Driver(rng)
    ring = driver.rings[0]
    driver.send(0, 8)
    driver.set(0x44, 0)
    for area in (ring.avail, ring.used):
        driver.memory.write_u(area + 2, 2, 0)
    ring.offered = ring.seen = 0
    driver.set(0x44, 1)
    driver.set(0x44, 1)
    driver.send(0, 8)
    assert ring.take() == [(1, 8)]
    assert not driver.needs_reset


def test_a_stopped_queue_is_not_served():
    driver = Driver(rng)
    driver.set(0x44, 0)
    assert driver.get(0x44) == 0
    driver.send(0, 8)
    assert driver.rings[0].take() == []
    assert not driver.needs_reset


def test_status_zero_is_a_reset():
    driver = Driver(rng)
    driver.send(0, 8)
    driver.set(0x70, 0)
    assert driver.get(0x70) == 0
    assert driver.get(0x60) == 0
    assert driver.get(0x44) == 0
    assert driver.irq.level is False
    fresh = rng(GuestMemory(), IrqLine())
    assert driver.device.save() == fresh.save()


def test_the_driver_cannot_set_or_clear_needs_reset():
    driver = Driver(rng)
    driver.set(0x70, 0x4F)
    assert driver.get(0x70) == 0x0F
    driver.rings[0].offer(16)
    driver.kick(0)
    assert driver.get(0x70) == 0x4F
    driver.set(0x70, 0x0F)
    assert driver.get(0x70) == 0x4F


def test_a_bad_ring_breaks_the_device_until_a_reset():
    driver = Driver(rng)
    driver.rings[0].offer(16)
    driver.kick(0)
    assert driver.needs_reset
    assert driver.get(0x60) == 2
    assert driver.irq.level is True
    assert driver.device.fault == "queue 0: descriptor 16 of a table of 16"
    driver.rings[0].offered = 0
    driver.send(0, 8)
    assert driver.rings[0].take() == []
    driver.start()
    assert driver.device.fault == ""
    driver.send(0, 8)
    assert driver.rings[0].take() == [(0, 8)]


def test_rings_outside_ram_break_the_device():
    driver = Driver(rng)
    driver.set(0x44, 0)
    driver.set(0x94, 0xFFFF_FFFF)
    driver.set(0x44, 1)
    driver.kick(0)
    assert driver.needs_reset
    assert "no memory at 0xffffffff" in driver.device.fault


def test_save_and_restore_carry_rings_line_and_negotiation():
    driver = Driver(rng, features=VERSION_1 | 1 << 28 | 1 << 29)
    driver.send(0, 8)
    state = driver.device.save()
    line = IrqLine()
    other = rng(driver.memory, line)
    other.restore(state)
    assert other.save() == state
    assert line.level is True
    driver.device = other
    driver.memory.write_u(driver.rings[0].avail + 4 + 2 * 16, 2, 1)
    driver.set(0x64, 1)
    driver.send(0, 4)
    assert driver.rings[0].take() == [(0, 8), (1, 4)]
    assert line.level is True
