"""The virtio entropy device (Virtio 1.2, 5.4)."""

import random

from virtio_driver import Driver

from aiovm.devices.virtio.rng import VirtioRng


def seeded(memory, irq):
    return VirtioRng(memory, irq, random.Random(7).randbytes)


def test_buffers_are_filled_from_the_hosts_source():
    driver = Driver(seeded)
    assert driver.get(0x08) == 4
    _, (address,) = driver.send(0, 16)
    assert driver.rings[0].take() == [(0, 16)]
    assert driver.memory.read(address, 16) == random.Random(7).randbytes(16)
    assert driver.acknowledge() == 1


def test_no_more_than_a_page_at_a_time_and_an_empty_buffer_comes_back():
    driver = Driver(seeded)
    driver.send(0, 0x2000)
    driver.send(0, 0)
    assert driver.rings[0].take() == [(0, 4096), (1, 0)]


def test_a_readable_buffer_breaks_the_device():
    driver = Driver(seeded)
    driver.send(0, b"x", 4)
    assert driver.needs_reset


def test_save_restore_and_reset():
    driver = Driver(seeded)
    driver.send(0, 4)
    other = Driver(seeded, start=False).device
    other.restore(driver.device.save())
    assert other.save() == driver.device.save()
    other.reset()
    assert other.save() == Driver(seeded, start=False).device.save()
