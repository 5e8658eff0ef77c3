"""The virtio socket device (Virtio 1.2, 5.10): connections, credit, closing, and packets that are wrong."""

import struct

import pytest
from virtio_driver import Driver, ram

from aiovm.devices.virtio.vsock import EventKind, Key, LinkState, VirtioVsock
from aiovm.devices.virtio.vsock_packet import Packet, Shutdown
from aiovm.errors import ConfigError, StateError
from aiovm.irq import IrqLine

CID = 3
KEY = Key(80, 1024)
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
WINDOW = 0x4_0000


class Guest(Driver):
    """A driver with eight receive buffers of 4 KiB."""

    def __init__(self):
        self.news = 0
        self.inbox = {}
        super().__init__(lambda memory, irq: VirtioVsock(memory, irq, cid=CID, on_news=self.count))
        for _ in range(8):
            self.buffer()

    def count(self):
        self.news += 1

    def buffer(self, length=4096):
        head, (address,) = self.send(0, length)
        self.inbox[head] = address

    def got(self):
        """Packets from the host: (op, payload or flags)."""
        packets = []
        for head, length in self.rings[0].take():
            data = self.memory.read(self.inbox[head], length)
            src, dst, src_port, dst_port, size, kind, op, flags, alloc, forwarded = struct.unpack_from(
                "<QQIIIHHIII", data
            )
            assert dst == CID
            assert len(data) == 44 + size
            packets.append((op, src, src_port, dst_port, kind, flags, alloc, forwarded, data[44:]))
        return packets

    def ops(self):
        return [packet[0] for packet in self.got()]

    def say(self, op, payload=b"", *, key=KEY, flags=0, alloc=1 << 20, forwarded=0, src=CID, dst=2, kind=1):
        header = struct.pack(
            "<QQIIIHHIII", src, dst, key.guest_port, key.host_port, len(payload), kind, op, flags, alloc, forwarded
        )
        self.rings[1].buffers = 0x1C_0000
        self.send(1, header, payload)

    def events(self):
        found = []
        while (event := self.device.next_event()) is not None:
            found.append(event)
        return found

    def kinds(self):
        return [event.kind for event in self.events()]

    def opened(self, **credit):
        self.say(REQUEST, **credit)
        self.events()
        self.device.accept(KEY)
        self.got()
        return self


@pytest.fixture
def guest():
    return Guest()


def test_configuration(guest):
    assert guest.get(0x08) == 19
    assert guest.get(0x100) | guest.get(0x104) << 32 == 3


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 32])
def test_reserved_context_ids_are_refused(cid):
    with pytest.raises(ConfigError):
        VirtioVsock(ram(), IrqLine(), cid=cid, on_news=print)


def test_a_guest_connects_and_talks(guest):
    guest.say(REQUEST)
    assert guest.news > 0
    (event,) = guest.events()
    assert (event.kind, event.key) == (EventKind.REQUEST, Key(host_port=80, guest_port=1024))
    guest.device.accept(KEY)
    guest.device.accept(KEY)
    assert guest.got() == [(RESPONSE, 2, 80, 1024, 1, 0, WINDOW, 0, b"")]
    guest.say(RW, b"hello")
    (event,) = guest.events()
    assert (event.kind, event.data) == (EventKind.DATA, b"hello")
    assert guest.device.send(KEY, b"world") == 5
    assert guest.got() == [(RW, 2, 80, 1024, 1, 0, WINDOW, 0, b"world")]
    assert guest.device.send(Key(1, 1), b"x") == 0


def test_a_request_may_be_refused(guest):
    guest.say(REQUEST)
    guest.device.reset_link(KEY)
    guest.device.reset_link(KEY)
    assert guest.ops() == [RST]
    guest.device.accept(KEY)
    assert guest.ops() == []


def test_the_host_connects(guest):
    guest.device.connect(KEY)
    assert guest.ops() == [REQUEST]
    assert guest.device.send(KEY, b"early") == 0
    guest.say(RESPONSE)
    assert guest.kinds() == [EventKind.CONNECTED]
    assert guest.device.send(KEY, b"x") == 1
    with pytest.raises(StateError):
        guest.device.connect(KEY)


def test_nobody_listens_in_the_guest(guest):
    guest.device.connect(KEY)
    guest.say(RST)
    assert guest.kinds() == [EventKind.CLOSED]
    assert guest.ops() == [REQUEST]


def test_the_host_sends_no_more_than_the_guest_has_room_for(guest):
    guest.opened(alloc=100)
    assert guest.device.send(KEY, b"x" * 150) == 100
    assert guest.device.send(KEY, b"x") == 0
    before = guest.news
    guest.say(CREDIT_UPDATE, alloc=100, forwarded=60)
    assert guest.news > before
    assert guest.device.send(KEY, b"y" * 150) == 60
    guest.say(CREDIT_UPDATE, alloc=10, forwarded=100)
    assert guest.device.send(KEY, b"z") == 0


def test_the_host_sends_no_more_than_the_guest_has_buffers_for(guest):
    guest.opened()
    data = bytes(range(256)) * 200
    done = guest.device.send(KEY, data)
    assert done == 7 * (4096 - 44)
    assert b"".join(packet[-1] for packet in guest.got()) == data[:done]
    before = guest.news
    guest.buffer()
    assert guest.news > before
    assert guest.device.send(KEY, data[done:]) == 4096 - 44


def test_credit_comes_back_when_the_host_has_done_with_the_data(guest):
    guest.opened()
    guest.say(RW, b"x" * 0x1_0000)
    guest.device.consumed(KEY, 0xFFFF)
    assert guest.ops() == []
    guest.device.consumed(KEY, 1)
    assert [(p[0], p[6], p[7]) for p in guest.got()] == [(CREDIT_UPDATE, WINDOW, 0x1_0000)]
    guest.device.consumed(Key(1, 1), 5)


def test_a_guest_that_sends_more_than_the_window_is_reset(guest):
    guest.opened()
    for _ in range(4):
        guest.say(RW, b"x" * 0x1_0000)
    assert guest.ops() == []
    guest.say(RW, b"x")
    assert guest.ops() == [RST]
    assert guest.kinds() == [EventKind.DATA] * 4 + [EventKind.CLOSED]


def test_credit_may_be_asked_for(guest):
    guest.opened()
    guest.say(CREDIT_REQUEST)
    assert guest.ops() == [CREDIT_UPDATE]


def test_half_close_and_close_by_the_guest(guest):
    guest.opened()
    guest.say(SHUTDOWN, flags=2)
    (event,) = guest.events()
    assert (event.kind, event.flags) == (EventKind.SHUTDOWN, Shutdown.SEND)
    assert guest.device.send(KEY, b"still") == 5
    guest.say(SHUTDOWN, flags=1)
    assert guest.kinds() == [EventKind.SHUTDOWN, EventKind.CLOSED]
    assert guest.ops() == [RW, RST]


def test_a_guest_that_will_not_receive_gets_nothing(guest):
    guest.opened()
    guest.say(SHUTDOWN, flags=1)
    assert guest.device.send(KEY, b"x") == 0


def test_a_guest_that_has_shut_its_side_must_not_send(guest):
    guest.opened()
    guest.say(SHUTDOWN, flags=2)
    guest.say(RW, b"x")
    assert guest.ops() == [RST]


def test_close_by_the_host(guest):
    guest.opened()
    guest.device.shutdown(KEY, Shutdown.SEND)
    guest.device.shutdown(KEY, Shutdown.RECEIVE)
    guest.device.shutdown(Key(1, 1), Shutdown.BOTH)
    assert [(p[0], p[5]) for p in guest.got()] == [(SHUTDOWN, 2), (SHUTDOWN, 3)]
    guest.say(RST)
    assert guest.kinds() == [EventKind.CLOSED]


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8])
def test_packets_for_no_connection_are_answered_with_rst(guest, op):
    guest.say(op)
    assert [(p[0], p[2], p[3]) for p in guest.got()] == [(RST, 80, 1024)]
    guest.say(RST)
    assert guest.ops() == []


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8])
def test_packets_out_of_place_break_the_connection(guest, op):
    guest.opened()
    guest.say(op)
    assert guest.ops() == [RST]
    assert guest.kinds() == [EventKind.CLOSED]


def test_data_before_the_answer_breaks_the_connection(guest):
    guest.say(REQUEST)
    guest.say(RW, b"x")
    assert guest.ops() == [RST]
    assert guest.kinds() == [EventKind.REQUEST, EventKind.CLOSED]


@pytest.mark.parametrize("wrong", [{"dst": 5}, {"kind": 2}])
def test_other_peers_and_types_are_answered_with_rst(guest, wrong):
    guest.say(REQUEST, **wrong)
    assert [(p[0], p[1], p[4]) for p in guest.got()] == [(RST, wrong.get("dst", 2), wrong.get("kind", 1))]
    guest.say(RST, **wrong)
    assert guest.ops() == []
    assert guest.events() == []


def test_a_forged_sender_is_ignored(guest):
    guest.say(REQUEST, src=4)
    assert guest.ops() == []
    assert guest.events() == []


@pytest.mark.parametrize("data", [bytes(43), struct.pack("<QQIIIHHIII", 3, 2, 1, 1, 1, 1, 5, 0, 0, 0)])
def test_a_packet_that_is_shorter_than_it_says_breaks_the_device(guest, data):
    guest.send(1, data)
    assert guest.needs_reset


def test_a_receive_buffer_without_room_for_a_header_breaks_the_device():
    guest = Guest()
    guest.start()
    guest.buffer(43)
    guest.say(RW, b"x")
    assert guest.needs_reset


def test_answers_wait_for_buffers_and_many_stop_the_transmit_queue():
    guest = Guest()
    guest.start()
    for _ in range(260):
        guest.say(RW, b"")
    assert len(guest.device.save().waiting) == 256
    assert len(guest.rings[1].take()) == 256
    for _ in range(8):
        guest.buffer()
    assert guest.ops() == [RST] * 8
    assert len(guest.rings[1].take()) == 4


def test_many_events_stop_the_transmit_queue_until_the_host_takes_them(guest):
    for port in range(300):
        guest.say(REQUEST, key=Key(80, port))
        if len(guest.device.save().events) == 256:
            break
    guest.say(REQUEST, key=Key(80, 5000))
    assert len(guest.device.save().events) == 256
    found = guest.events()
    assert len(found) == 257
    assert found[-1].key == Key(80, 5000)


def test_there_are_at_most_1024_connections(guest):
    for port in range(1025):
        guest.say(REQUEST, key=Key(80, port))
        guest.events()
    assert guest.ops() == [RST]
    assert len(guest.device.save().links) == 1024


def test_state_moves_and_a_reset_closes_what_was_open(guest):
    guest.opened()
    guest.say(RW, b"left")
    state = guest.device.save()
    other = VirtioVsock(guest.memory, guest.irq, cid=CID, on_news=guest.count)
    other.restore(state)
    assert other.save() == state
    assert other.next_event().data == b"left"
    assert state.links[KEY].state is LinkState.OPEN
    assert len(state.events) == 1
    guest.device.reset()
    assert guest.kinds() == [EventKind.CLOSED]
    guest.device.reset()
    assert guest.kinds() == []


def test_reset_all_is_an_event_for_the_guest(guest):
    guest.opened()
    _, (address,) = guest.send(2, 4)
    guest.memory.write(address, b"\xff" * 4)
    guest.device.reset_all()
    assert guest.rings[2].take() == [(0, 4)]
    assert guest.memory.read(address, 4) == bytes(4)
    guest.say(RW, b"x")
    assert guest.ops() == [RST]
    guest.device.reset_all()


def test_packets_pack_as_the_standard_lays_them_out():
    packet = Packet(3, 2, 0x11, 0x22, 1, 5, 6, 7, 8, b"pay")
    data = packet.pack()
    assert data == struct.pack("<QQIIIHHIII", 3, 2, 0x11, 0x22, 3, 1, 5, 6, 7, 8) + b"pay"
    assert Packet.unpack(data + b"rest") == packet
