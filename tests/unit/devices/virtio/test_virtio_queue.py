"""The split virtqueue (Virtio 1.2, 2.7): chains, indirect tables, both ways of suppressing interrupts."""

import struct

import pytest
from virtio_driver import INDIRECT, NEXT, WRITE, Ring, ram

from aiovm.devices.virtio.queue import BadRing, Queue
from aiovm.memory import NoMemory


@pytest.fixture
def pair():
    memory = ram()
    queue = Queue(memory, 8)
    ring = Ring(memory, 0x1000, 8)
    queue.s.descriptors, queue.s.driver, queue.s.device = ring.table, ring.avail, ring.used
    queue.s.ready = True
    return ring, queue


def test_an_empty_ring_has_no_chain(pair):
    _, queue = pair
    assert queue.pop(100) is None


def test_a_chain_gathers_what_is_readable_and_scatters_what_is_written(pair):
    ring, queue = pair
    head, addresses = ring.add(b"ab", b"cde", 3, 0, 4)
    chain = queue.pop(5)
    assert chain.head == head == 0
    assert chain.data == b"abcde"
    assert chain.room == 7
    assert queue.push(chain, b"12345")
    assert ring.memory.read(addresses[2], 3) == b"123"
    assert ring.memory.read(addresses[4], 4) == b"45\0\0"
    assert ring.take() == [(0, 5)]


def test_a_tail_goes_to_the_end_and_a_gap_is_not_counted_as_written(pair):
    ring, queue = pair
    _, addresses = ring.add(4, 2)
    queue.push(queue.pop(0), b"x", b"st")
    assert ring.memory.read(addresses[0], 4) == b"x\0\0\0"
    assert ring.memory.read(addresses[1], 2) == b"st"
    assert ring.take() == [(0, 1)]
    _, addresses = ring.add(3, 2)
    queue.push(queue.pop(0), b"abcd", b"e")
    assert ring.memory.read(addresses[0], 3) + ring.memory.read(addresses[1], 2) == b"abcde"
    assert ring.take() == [(2, 5)]


def test_an_answer_longer_than_its_room_is_refused(pair):
    ring, queue = pair
    ring.add(4)
    with pytest.raises(BadRing, match="5 bytes for a buffer of 4"):
        queue.push(queue.pop(0), b"abcd", b"e")


def test_indices_run_freely_and_rings_wrap(pair):
    ring, queue = pair
    for start in (0, 0xFFFD):
        ring.offered = ring.seen = queue.s.next_avail = queue.s.next_used = start
        ring.memory.write_u(ring.avail + 2, 2, start)
        ring.memory.write_u(ring.used + 2, 2, start)
        for _ in range(20):
            ring.buffers = 0x4000
            head, _ = ring.add(2)
            queue.push(queue.pop(0), b"z")
            assert ring.take() == [(head, 1)]
        assert queue.pop(0) is None


def test_chains_may_be_returned_in_any_order(pair):
    ring, queue = pair
    ring.add(1)
    ring.add(1)
    first, second = queue.pop(0), queue.pop(0)
    queue.push(second)
    queue.push(first)
    assert ring.take() == [(1, 0), (0, 0)]


def test_the_limit_is_on_what_is_readable(pair):
    ring, queue = pair
    ring.add(b"abc", b"de", 100)
    with pytest.raises(BadRing, match="longer than 4 bytes"):
        queue.pop(4)


def test_more_chains_than_descriptors_is_a_bad_ring(pair):
    ring, queue = pair
    ring.memory.write_u(ring.avail + 2, 2, 9)
    with pytest.raises(BadRing, match="available index 9 ahead"):
        queue.pop(0)
    ring.memory.write_u(ring.avail + 2, 2, 0xFFFF)
    with pytest.raises(BadRing):
        queue.pop(0)


def test_a_loop_ends_at_the_tables_size(pair):
    ring, queue = pair
    ring.descriptor(0, 0x4000, 1, WRITE | NEXT, 1)
    ring.descriptor(1, 0x4000, 1, WRITE | NEXT, 0)
    ring.offer(0)
    with pytest.raises(BadRing, match="longer than its table or a loop"):
        queue.pop(0)


@pytest.mark.parametrize(("head", "following"), [(8, 0), (0xFFFF, 0), (0, 8)])
def test_an_index_outside_the_table_is_a_bad_ring(pair, head, following):
    ring, queue = pair
    ring.descriptor(0, 0x4000, 1, WRITE | NEXT, following)
    ring.offer(head)
    with pytest.raises(BadRing, match="of a table of 8"):
        queue.pop(0)


def test_readable_behind_writable_is_a_bad_ring(pair):
    ring, queue = pair
    ring.descriptor(0, 0x4000, 1, WRITE | NEXT, 1)
    ring.descriptor(1, 0x4000, 1)
    ring.offer(0)
    with pytest.raises(BadRing, match="readable behind a writable"):
        queue.pop(10)


def test_four_gigabytes_is_the_longest_chain(pair):
    ring, queue = pair
    ring.descriptor(0, 0, 0x8000_0000, WRITE | NEXT, 1)
    ring.descriptor(1, 0, 0x8000_0000, WRITE)
    ring.offer(0)
    assert queue.pop(0).room == 1 << 32
    ring.descriptor(1, 0, 0x8000_0001, WRITE)
    ring.offer(0)
    with pytest.raises(BadRing, match="2\\^32"):
        queue.pop(0)


@pytest.mark.parametrize("address", [0x40_0000, 0x3F_FFFF, (1 << 64) - 1])
def test_buffers_outside_ram(pair, address):
    ring, queue = pair
    ring.descriptor(0, address, 2)
    ring.offer(0)
    with pytest.raises(NoMemory):
        queue.pop(10)
    ring.descriptor(0, address, 2, WRITE)
    chain = queue.pop(10)
    with pytest.raises(NoMemory):
        queue.push(chain, b"ab")


def table(ring, at, *entries):
    ring.memory.write(at, b"".join(struct.pack("<QIHH", *entry) for entry in entries))


def test_an_indirect_table_may_follow_plain_descriptors_and_be_longer_than_the_queue(pair):
    ring, queue = pair
    queue.indirect = True
    ring.memory.write(0x4000, bytes(range(20)))
    entries = [(0x4000 + i, 1, NEXT, i + 1) for i in range(20)]
    table(ring, 0x5000, *entries, (0x6000, 7, WRITE, 0))
    ring.descriptor(0, 0x4000, 1, NEXT, 3)
    ring.descriptor(3, 0x5000, 21 * 16, INDIRECT | WRITE)
    ring.offer(0)
    chain = queue.pop(21)
    assert chain.data == b"\0" + bytes(range(20))
    assert chain.writable == ((0x6000, 7),)


@pytest.mark.parametrize(
    ("length", "flags", "inner", "allowed"),
    [
        (16, INDIRECT, WRITE, False),
        (16, INDIRECT | NEXT, WRITE, True),
        (0, INDIRECT, WRITE, True),
        (24, INDIRECT, WRITE, True),
        (16, INDIRECT, INDIRECT, True),
        (16, INDIRECT, WRITE | NEXT, True),
    ],
)
def test_bad_indirect_descriptors(pair, length, flags, inner, allowed):
    ring, queue = pair
    queue.indirect = allowed
    table(ring, 0x5000, (0x6000, 16, inner, 1))
    ring.descriptor(0, 0x5000, length, flags)
    ring.offer(0)
    with pytest.raises(BadRing):
        queue.pop(10)


def test_a_loop_in_a_long_indirect_table_ends_at_1024(pair):
    ring, queue = pair
    queue.indirect = True
    table(ring, 0x8000, *[(0x6000, 1, WRITE | NEXT, (i + 1) % 2048) for i in range(2048)])
    ring.descriptor(0, 0x8000, 2048 * 16, INDIRECT)
    ring.offer(0)
    with pytest.raises(BadRing, match="loop"):
        queue.pop(10)


def test_avail_flags_suppress_the_interrupt(pair):
    ring, queue = pair
    for flags, wanted in ((0, True), (1, False)):
        ring.memory.write_u(ring.avail, 2, flags)
        ring.add(1)
        assert queue.push(queue.pop(0)) is wanted


def test_used_event_names_the_entry_that_interrupts(pair):
    ring, queue = pair
    queue.event_index = True
    ring.memory.write_u(ring.avail, 2, 1)
    ring.memory.write_u(ring.avail + 4 + 2 * 8, 2, 1)
    answers = []
    for _ in range(4):
        ring.add(1)
        answers.append(queue.push(queue.pop(0)))
    assert answers == [False, True, False, False]


def test_avail_event_asks_for_the_next_notification_when_the_ring_is_drained(pair):
    ring, queue = pair
    queue.event_index = True
    ring.add(1)
    ring.add(1)
    queue.pop(0)
    assert ring.memory.read_u(ring.used + 4 + 8 * 8, 2) == 0
    queue.pop(0)
    assert queue.pop(0) is None
    assert ring.memory.read_u(ring.used + 4 + 8 * 8, 2) == 2
