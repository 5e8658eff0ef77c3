"""A hostile driver: whatever lies in the rings and registers, the device answers or breaks, and the host goes on."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import INDIRECT, NEXT, RAM, WRITE, Driver, ram

from aiovm.devices.virtio.block import BlockStatus, VirtioBlock
from aiovm.devices.virtio.console import VirtioConsole
from aiovm.devices.virtio.net import VirtioNet
from aiovm.devices.virtio.queue import BadRing, Queue
from aiovm.devices.virtio.rng import VirtioRng
from aiovm.devices.virtio.vsock import VirtioVsock
from aiovm.memory import NoMemory

MAC = bytes.fromhex("525400123456")


def block(memory, irq):
    asked = []
    device = VirtioBlock(memory, irq, asked.append, sectors=64)

    def host(value):
        while asked:
            request = asked.pop()
            device.complete(request.token, BlockStatus(value % 3), bytes(request.length))

    device.host = host
    return device


def console(memory, irq):
    taken = []

    def sink(data):
        taken.append(data)
        return len(data) if len(taken) % 3 else 1

    device = VirtioConsole(memory, irq, sink)

    def host(value):
        device.feed(b"x" * (value % 300))
        device.drain()

    device.host = host
    return device


def net(memory, irq):
    sent = []

    def transmit(frame):
        sent.append(frame)
        return len(sent) % 3 != 0

    device = VirtioNet(memory, irq, transmit, mac=MAC)

    def host(value):
        device.receive(b"f" * (value % 1514))
        device.drain()

    device.host = host
    return device


def rng(memory, irq):
    device = VirtioRng(memory, irq, bytes)
    device.host = lambda value: None
    return device


def vsock(memory, irq):
    device = VirtioVsock(memory, irq, cid=3, on_news=lambda: None)

    def host(value):
        while (event := device.next_event()) is not None:
            match (value + len(event.data)) % 4:
                case 0:
                    device.accept(event.key)
                case 1:
                    device.send(event.key, b"y" * (value % 5000))
                case 2:
                    device.consumed(event.key, len(event.data))
                case 3:
                    device.reset_link(event.key)

    device.host = host
    return device


MAKERS = {"block": block, "console": console, "net": net, "rng": rng, "vsock": vsock}

SPOTS = st.sampled_from([0, 1, 0x1000, 0x1010, 0x10_0000, 0x18_0000, RAM - 1, RAM - 16, RAM, 1 << 52, (1 << 64) - 1])
ADDRESSES = SPOTS | st.integers(0, RAM + 0x100)
LENGTHS = st.sampled_from([0, 1, 12, 15, 16, 32, 44, 512, 1526, 0x1000, RAM, 0xFFFF_FFFF]) | st.integers(0, 600)
FLAGS = st.sampled_from([0, NEXT, WRITE, WRITE | NEXT, INDIRECT, INDIRECT | NEXT, 0xFFFF])
INDEX = st.integers(0, 17) | st.just(0xFFFF)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("descriptor"), st.integers(0, 15), ADDRESSES, LENGTHS, FLAGS, INDEX),
        st.tuples(st.just("good"), st.binary(max_size=60), st.sampled_from([0, 1, 513, 1526])),
        st.tuples(st.just("offer"), INDEX),
        st.tuples(st.just("index"), st.integers(0, 0xFFFF)),
        st.tuples(st.just("event"), st.integers(0, 0xFFFF)),
        st.tuples(st.just("kick"), st.integers(0, 4) | st.just(0xFFFF)),
        st.tuples(st.just("host"), st.integers(0, 0x1_0000)),
        st.tuples(st.just("bytes"), ADDRESSES, st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("register"), st.integers(0, 0x1FF), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("status"), st.integers(0, 255)),
        st.tuples(
            st.just("start"),
        ),
    ),
    max_size=30,
)


def act(driver, ring, step):
    match step:
        case "descriptor", index, address, length, flags, following:
            ring.descriptor(index, address, length, flags, following)
        case "good", data, room:
            ring.buffers = 0x30_0000
            ring.add(data, room)
        case "offer", head:
            ring.offer(head)
        case "index", value:
            ring.offered = value
            driver.memory.write_u(ring.avail + 2, 2, value)
        case "event", value:
            driver.memory.write_u(ring.avail + 4 + 2 * ring.size, 2, value)
        case "kick", queue:
            driver.kick(queue)
        case "host", value:
            driver.device.host(value)
        case "bytes", address, data:
            if address + len(data) <= RAM:
                driver.memory.write(address, data)
        case "register", offset, size, value:
            offset -= offset % size
            driver.set(offset, value & (1 << 8 * size) - 1, size)
            assert 0 <= driver.get(offset, size) < 1 << 8 * size
        case "status", value:
            driver.set(0x70, value)
        case ("start",):
            driver.start(driver.features())


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(features=st.sampled_from([1 << 32, 1 << 32 | 1 << 28, 1 << 32 | 3 << 28]), queue=st.integers(0, 2), steps=STEPS)
def test_a_device_survives_any_driver(name, features, queue, steps):
    driver = Driver(MAKERS[name], features=features)
    for step in steps:
        ring = driver.rings[min(queue, len(driver.rings) - 1)]
        act(driver, ring, step)
        assert driver.irq.level is bool(driver.get(0x60))
    state = driver.device.save()
    other = MAKERS[name](driver.memory, driver.irq)
    other.restore(state)
    assert other.save() == state
    # Whatever happened, a driver that behaves can start over.
    driver.start()
    assert not driver.needs_reset
    assert driver.device.fault == ""


ENTRIES = st.lists(
    st.tuples(ADDRESSES, LENGTHS, st.sampled_from([0, NEXT, WRITE, WRITE | NEXT, INDIRECT]), st.integers(0, 8)),
    min_size=8,
    max_size=8,
)


def expected(memory, main, inner, limit):
    """The chain by the rules, written once more and naively; None when it breaks them."""
    table, index, steps, nested = main, 0, 0, False
    data, room, writable = b"", 0, []
    while True:
        if index >= len(table) or steps == len(table):
            return None
        steps += 1
        address, length, flags, following = table[index]
        if flags & INDIRECT:
            if nested or address != 0x8000 or length == 0 or length % 16 or length > 128:
                return None
            table, index, steps, nested = inner[: length // 16], 0, 0, True
            continue
        if flags & WRITE:
            room += length
            writable.append((address, length))
        else:
            if writable or len(data) + length > limit or (length and address + length > RAM):
                return None
            data += memory.read(address, length)
        if len(data) + room > 1 << 32:
            return None
        if not flags & NEXT:
            return data, tuple(writable)
        index = following


@settings(max_examples=150, deadline=None)
@given(main=ENTRIES, inner=ENTRIES, tables=st.lists(st.sampled_from([0, 16, 48, 50, 128]), max_size=2))
def test_chains_are_what_the_rules_say(main, inner, tables):
    memory = ram()
    for at, length in enumerate(tables):
        main[at * 3] = (0x8000, length, INDIRECT, 0)
    main = [e if not e[2] & INDIRECT else (0x8000, *e[1:]) for e in main]
    main = [e if not e[2] & INDIRECT or e[1] <= 128 else (e[0], 16, *e[2:]) for e in main]
    for base, table in ((0x1000, main), (0x8000, inner)):
        memory.write(base, b"".join(struct.pack("<QIHH", *entry) for entry in table))
    queue = Queue(memory, 8)
    queue.indirect = True
    queue.s.descriptors, queue.s.driver, queue.s.device = 0x1000, 0x2000, 0x3000
    memory.write_u(0x2002, 2, 1)
    try:
        chain = queue.pop(0x1000)
        found = chain.data, chain.writable
    except (BadRing, NoMemory):
        found = None
    assert found == expected(memory, main, inner, 0x1000)
