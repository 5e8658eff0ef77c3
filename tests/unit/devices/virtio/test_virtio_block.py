"""The virtio block device (Virtio 1.2, 5.2): requests, refusals, and how much is under way."""

import struct

import pytest
from virtio_driver import Driver, ram

from aiovm.devices.virtio.block import BlockOp, BlockStatus, VirtioBlock
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def driver(asked):
    return Driver(lambda memory, irq: VirtioBlock(memory, irq, asked.append, sectors=100, serial="disk0"))


def status_of(driver, addresses):
    return driver.memory.read_u(addresses[-1], 1)


def test_configuration(driver):
    assert driver.get(0x08) == 2
    assert driver.features() & 0xFFFFFF == 1 << 1 | 1 << 2 | 1 << 9
    assert driver.get(0x100) | driver.get(0x104) << 32 == 100
    assert driver.get(0x108) == 0x1_0000
    assert driver.get(0x10C) == 126


@pytest.mark.parametrize("wrong", [{"sectors": -1}, {"sectors": 1 << 55}, {"sectors": 1, "serial": "x" * 21}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        VirtioBlock(ram(), IrqLine(), print, **wrong)


def test_a_read_is_answered_when_the_host_has_the_data(driver, asked):
    head, addresses = driver.send(0, header(0, 7), 512, 512, 1)
    (request,) = asked
    assert (request.op, request.sector, request.length, request.data) == (BlockOp.IN, 7, 1024, b"")
    assert driver.rings[0].take() == []
    driver.device.complete(request.token, BlockStatus.OK, b"a" * 512 + b"b" * 512)
    assert driver.rings[0].take() == [(head, 1025)]
    assert driver.memory.read(addresses[1], 512) == b"a" * 512
    assert driver.memory.read(addresses[2], 512) == b"b" * 512
    assert status_of(driver, addresses) == 0
    assert driver.acknowledge() == 1


def test_a_read_that_failed_says_so_and_claims_no_data(driver, asked):
    head, addresses = driver.send(0, header(0), 512, 1)
    driver.memory.write_u(addresses[-1], 1, 0xFF)
    driver.device.complete(asked[0].token, BlockStatus.IOERR)
    assert driver.rings[0].take() == [(head, 0)]
    assert status_of(driver, addresses) == 1


def test_a_write_carries_its_data_however_it_is_cut(driver, asked):
    head, addresses = driver.send(0, header(1, 3)[:5], header(1, 3)[5:] + b"w" * 100, b"x" * 412, 1)
    assert (asked[0].op, asked[0].sector, asked[0].data) == (BlockOp.OUT, 3, b"w" * 100 + b"x" * 412)
    driver.device.complete(asked[0].token, BlockStatus.OK)
    assert driver.rings[0].take() == [(head, 1)]
    assert status_of(driver, addresses) == 0


def test_requests_may_be_answered_in_any_order(driver, asked):
    first, _ = driver.send(0, header(0), 512, 1)
    second, _ = driver.send(0, header(4), 1)
    assert asked[1].op is BlockOp.FLUSH
    driver.device.complete(asked[1].token, BlockStatus.OK)
    driver.device.complete(asked[0].token, BlockStatus.OK, bytes(512))
    assert driver.rings[0].take() == [(second, 1), (first, 513)]


def test_the_id_is_padded_and_cut(driver):
    _, addresses = driver.send(0, header(8), 20, 1)
    assert driver.memory.read(addresses[1], 20) == b"disk0" + bytes(15)
    _, addresses = driver.send(0, header(8), 3, 1)
    assert driver.memory.read(addresses[1], 3) == b"dis"
    assert driver.rings[0].take() == [(0, 21), (3, 4)]


@pytest.mark.parametrize(
    ("request_", "pieces", "status"),
    [
        (header(0, 99), (1024, 1), 1),
        (header(0, (1 << 64) - 1), (512, 1), 1),
        (header(0, 0), (511, 1), 1),
        (header(1, 100) + bytes(512), (1,), 1),
        (header(1, 0) + bytes(100), (1,), 1),
        (header(2), (1,), 2),
        (header(11) + bytes(16), (1,), 2),
        (header(0xFFFF_FFFF), (1,), 2),
    ],
)
def test_refused_without_asking_the_storage(driver, asked, request_, pieces, status):
    _, addresses = driver.send(0, request_, *pieces)
    assert asked == []
    assert len(driver.rings[0].take()) == 1
    assert status_of(driver, addresses) == status


def test_a_read_larger_than_was_offered_is_refused(driver, asked):
    ring = driver.rings[0]
    driver.memory.write(0x1000, header(0))
    ring.descriptor(0, 0x1000, 16, 1, 1)
    ring.descriptor(1, 0x2000, 126 * 0x1_0000 + 512, 2 | 1, 2)
    ring.descriptor(2, 0x3000, 1, 2)
    ring.offer(0)
    driver.kick(0)
    assert asked == []
    assert driver.memory.read_u(0x3000, 1) == 1


def test_a_read_only_disk_refuses_writes(asked):
    driver = Driver(lambda memory, irq: VirtioBlock(memory, irq, asked.append, sectors=9, read_only=True))
    assert driver.features() >> 5 & 1
    _, addresses = driver.send(0, header(1) + bytes(512), 1)
    assert status_of(driver, addresses) == 1
    assert asked == []


@pytest.mark.parametrize("pieces", [(header(0)[:15], 513), (header(0),), (header(4),)])
def test_no_header_or_no_status_breaks_the_device(driver, pieces):
    driver.send(0, *pieces)
    assert driver.needs_reset


def test_no_more_than_16_mebibytes_are_under_way(asked):
    driver = Driver(lambda memory, irq: VirtioBlock(memory, irq, asked.append, sectors=1 << 20), size=64)
    ring = driver.rings[0]
    for head in range(0, 12, 3):
        driver.memory.write(0x1000, header(0))
        ring.descriptor(head, 0x1000, 16, 1, head + 1)
        ring.descriptor(head + 1, 0x2000, 8 << 20 >> 1, 2 | 1, head + 2)
        ring.descriptor(head + 2, 0x3000, 1, 2)
        for _ in range(3):
            ring.offer(head)
    driver.kick(0)
    assert len(asked) == 4
    driver.device.complete(asked[0].token, BlockStatus.IOERR)
    assert len(asked) == 5


def test_a_driver_that_offers_a_head_again_and_again_gets_128_requests(driver, asked):
    ring = driver.rings[0]
    driver.send(0, header(4), 1)
    for _ in range(20):
        for _ in range(16):
            ring.offer(0)
        driver.kick(0)
        if driver.needs_reset:
            break
    assert len(asked) == 128


def test_answers_after_a_reset_and_second_answers_are_ignored(driver, asked):
    driver.send(0, header(4), 1)
    old = asked[0].token
    driver.start()
    driver.device.complete(old, BlockStatus.OK)
    assert driver.rings[0].take() == []
    driver.send(0, header(4), 1)
    assert asked[1].token != old
    driver.device.complete(asked[1].token, BlockStatus.OK)
    driver.device.complete(asked[1].token, BlockStatus.OK)
    assert len(driver.rings[0].take()) == 1


def test_what_was_under_way_is_asked_again_after_a_restore(driver, asked):
    driver.send(0, header(1, 5) + b"q" * 512, 1)
    again = []
    other = VirtioBlock(driver.memory, driver.irq, again.append, sectors=100)
    other.restore(driver.device.save())
    assert other.save() == driver.device.save()
    assert (again[0].op, again[0].sector, again[0].data) == (BlockOp.OUT, 5, b"q" * 512)
    other.complete(again[0].token, BlockStatus.OK)
    assert driver.rings[0].take() == [(0, 1)]


def test_a_new_capacity_is_a_configuration_change(driver):
    driver.device.set_capacity(200)
    assert driver.get(0x100) == 200
    assert driver.acknowledge() == 2
