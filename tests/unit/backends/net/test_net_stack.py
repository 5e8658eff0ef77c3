"""The user-mode network: a guest that sends frames, in virtual time and on the wall clock."""

import asyncio
import struct
from ipaddress import IPv4Address

import pytest
from backend_bench import Bench, settle, until
from virtio_driver import Driver

from aiovm.backends.net.stack import UserNet
from aiovm.backends.net.tcp import Close, Phase, TcpEndpoint
from aiovm.backends.net.wire import (
    Arp,
    Datagram,
    Frame,
    Packet,
    Segment,
    TcpFlag,
    checksum,
    parse_arp,
    parse_datagram,
    parse_frame,
    parse_packet,
    parse_segment,
)
from aiovm.errors import ConfigError, StateError
from aiovm.loop import run

RUNNERS = pytest.mark.parametrize("runner", [run, asyncio.run])
MAC = bytes.fromhex("525400123456")
GATEWAY_MAC = bytes.fromhex("52550a000202")
GUEST, GATEWAY, DNS = IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2"), IPv4Address("10.0.2.3")
EVERYWHERE = IPv4Address("255.255.255.255")


class Guest(Driver):
    """A guest with a driver, and TCP from the endpoint under test's own module."""

    def __init__(self, bench, net, buffers=32):
        self.bench = bench
        self.inbox = {}
        super().__init__(lambda memory, irq: net.attach(bench, irq), memory=bench.memory, size=64)
        for _ in range(buffers):
            self.offer()

    def offer(self):
        self.rings[0].buffers = 0x30_0000 + self.rings[0].free % 64 * 0x1000
        head, (address,) = self.send(0, 2048)
        self.inbox[head] = address

    def put(self, kind, payload, dst=GATEWAY_MAC):
        self.rings[1].buffers = 0x38_0000 + self.rings[1].free % 64 * 0x1000
        self.send(1, bytes(12) + Frame(dst, MAC, kind, payload).pack())

    def got(self):
        frames = []
        for head, length in self.rings[0].take():
            frames.append(parse_frame(self.memory.read(self.inbox[head], length)[12:]))
            self.offer()
        return frames

    async def next(self):
        found = []
        await until(lambda: found.extend(self.got()) or found)
        return found

    def segments(self):
        return [parse_segment(parse_packet(frame.payload)) for frame in self.got()]

    def say(self, segment, dst=GATEWAY, src=GUEST):
        self.put(0x0800, segment.packet(src, dst).pack())


class Tcp:
    """The guest's end of one connection."""

    def __init__(self, guest, port, *, dst=GATEWAY, guest_port=40000):
        self.guest = guest
        self.dst = dst
        self.end = TcpEndpoint(guest_port, port, 9000, 1460)
        self.got = bytearray()

    @property
    def now(self):
        return self.guest.bench.clock.now()

    def step(self, *, read=True):
        for segment in self.guest.segments():
            if self.end.remote_port == 0 or segment.dst_port == self.end.local_port:
                if self.end.phase is Phase.SYN_SENT and not self.end.deadline:
                    self.end.remote_port = segment.src_port
                    self.end.accept(segment, self.now)
                else:
                    self.end.segment(segment, self.now)
        for piece in self.end.received if read else ():
            self.got += piece
            self.end.consumed(len(piece))
        if read:
            self.end.received.clear()
        self.end.flush()
        sent, self.end.outgoing = self.end.outgoing, []
        for segment in sent:
            self.guest.say(segment, self.dst)

    async def until(self, condition):
        def stepped():
            self.step()
            return condition()

        await until(stepped)

    async def connect(self):
        self.end.connect(self.now)
        await self.until(lambda: self.end.phase is not Phase.SYN_SENT)

    async def close(self):
        self.end.close(self.now)
        await self.until(lambda: self.end.phase is Phase.CLOSED)


async def upper(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())
        await writer.drain()


@RUNNERS
def test_arp_answers_for_everybody_but_the_guest(runner):
    async def main():
        net = UserNet()
        guest = Guest(Bench(), net)
        for target in ("10.0.2.2", "10.0.2.99", "10.0.2.15", "10.0.3.1"):
            guest.put(0x0806, Arp(1, MAC, GUEST, bytes(6), IPv4Address(target)).pack(), b"\xff" * 6)
        guest.put(0x0806, Arp(2, MAC, GUEST, bytes(6), GATEWAY).pack(), b"\xff" * 6)
        guest.put(0x0806, b"short", b"\xff" * 6)
        await asyncio.sleep(0.02)
        answers = [(frame.dst, parse_arp(frame.payload)) for frame in guest.got()]
        assert answers == [
            (MAC, Arp(2, GATEWAY_MAC, GATEWAY, MAC, GUEST)),
            (MAC, Arp(2, GATEWAY_MAC, IPv4Address("10.0.2.99"), MAC, GUEST)),
        ]
        await net.aclose()

    runner(main())


def dhcp(kind, options=b""):
    head = struct.pack(">BBBBIHH", 1, 1, 6, 0, 7, 0, 0) + bytes(16) + MAC + bytes(202)
    return head + b"\x63\x82\x53\x63\x35\x01" + bytes((kind,)) + options + b"\xff"


@RUNNERS
def test_a_dhcp_exchange(runner):
    async def main():
        net = UserNet(mtu=1400)
        guest = Guest(Bench(), net)
        assert guest.get(0x10A, 2) == 1400

        async def ask(message):
            packet = Datagram(68, 67, message).packet(IPv4Address(0), EVERYWHERE)
            guest.put(0x0800, packet.pack(), b"\xff" * 6)
            (frame,) = await guest.next()
            assert frame.dst == b"\xff" * 6
            packet = parse_packet(frame.payload)
            assert (packet.src, packet.dst) == (GATEWAY, EVERYWHERE)
            datagram = parse_datagram(packet)
            assert (datagram.src_port, datagram.dst_port) == (67, 68)
            return datagram.payload

        offer = await ask(dhcp(1))
        assert offer[16:20] == GUEST.packed
        assert offer[240:243] == b"\x35\x01\x02"
        ack = await ask(dhcp(3, b"\x32\x04" + offer[16:20] + b"\x36\x04" + GATEWAY.packed))
        assert ack[240:243] == b"\x35\x01\x05"
        await net.aclose()

    runner(main())


def test_dns_knows_the_names_it_was_given():
    async def main():
        net = UserNet(names={"DB.internal.": "10.0.2.77"})
        guest = Guest(Bench(), net)

        async def ask(name):
            labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
            query = struct.pack(">HHHHHH", 1, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
            guest.put(0x0800, Datagram(5353, 53, query).packet(GUEST, DNS).pack())
            (frame,) = await guest.next()
            return parse_datagram(parse_packet(frame.payload)).payload

        assert (await ask("db.internal"))[-4:] == IPv4Address("10.0.2.77").packed
        assert (await ask("gateway"))[-4:] == GATEWAY.packed
        assert (await ask("example.org"))[3] & 0xF == 3
        guest.put(0x0800, Datagram(5353, 53, b"short").packet(GUEST, DNS).pack())
        guest.put(0x0800, Datagram(5353, 67, b"short").packet(GUEST, GATEWAY).pack())
        guest.put(0x0800, Datagram(5353, 9, b"discard").packet(GUEST, GATEWAY).pack())
        await settle()
        assert guest.got() == []
        await net.aclose()

    run(main())


def test_ping():
    async def main():
        net = UserNet()
        guest = Guest(Bench(), net)
        echo = b"\x08\0\0\0\x12\x34\0\x01ping"
        echo = echo[:2] + checksum(echo).to_bytes(2, "big") + echo[4:]
        guest.put(0x0800, Packet(GUEST, GATEWAY, 1, echo).pack())
        guest.put(0x0800, Packet(GUEST, IPv4Address("8.8.8.8"), 1, echo).pack())
        guest.put(0x0800, Packet(GUEST, GATEWAY, 1, echo[:-1] + b"!").pack())
        guest.put(0x0800, Packet(GUEST, GATEWAY, 1, b"\0" + echo[1:]).pack())
        guest.put(0x0800, Packet(GUEST, GATEWAY, 1, b"\x08").pack())
        await settle()
        (frame,) = guest.got()
        packet = parse_packet(frame.payload)
        assert (packet.src, packet.dst) == (GATEWAY, GUEST)
        assert packet.payload[:2] == b"\0\0"
        assert packet.payload[4:] == b"\x12\x34\0\x01ping"
        assert checksum(packet.payload) == 0
        await net.aclose()

    run(main())


@RUNNERS
def test_a_guest_connects_to_a_handler(runner):
    async def main():
        net = UserNet()
        seen = []

        async def handler(reader, writer):
            seen.append((writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
            await upper(reader, writer)

        net.listen(7, handler)
        tcp = Tcp(Guest(Bench(), net), 7, dst=IPv4Address("93.184.216.34"))
        await tcp.connect()
        tcp.end.send(b"hello\n", tcp.now)
        await tcp.until(lambda: tcp.got == b"HELLO\n")
        assert seen == [(("10.0.2.15", 40000), ("93.184.216.34", 7))]
        await tcp.close()
        assert tcp.end.close_reason is Close.ORDERLY
        await net.aclose()

    runner(main())


@RUNNERS
def test_much_data_both_ways(runner):
    async def main():
        net = UserNet()
        sent = bytes(range(256)) * 2000

        async def handler(reader, writer):
            writer.write(sent)
            assert await reader.readexactly(len(sent)) == sent
            writer.write(b"end")

        net.listen(7, handler)
        tcp = Tcp(Guest(Bench(), net), 7)
        await tcp.connect()
        left = sent

        def moved():
            nonlocal left
            left = left[tcp.end.send(left[:20_000], tcp.now) :]
            return tcp.got == sent + b"end"

        await tcp.until(moved)
        await tcp.close()
        await net.aclose()

    runner(main())


def test_a_handler_for_one_address():
    async def main():
        net = UserNet()
        net.listen(7, upper, host="10.0.2.50")
        for port in (7, 0, 1 << 16):
            with pytest.raises(ConfigError):
                net.listen(port, upper, host="10.0.2.50")
        guest = Guest(Bench(), net)
        tcp = Tcp(guest, 7, dst=IPv4Address("10.0.2.51"))
        await tcp.connect()
        assert tcp.end.close_reason is Close.RESET
        tcp = Tcp(guest, 7, dst=IPv4Address("10.0.2.50"), guest_port=40001)
        await tcp.connect()
        assert tcp.end.phase is Phase.OPEN
        await net.aclose()

    run(main())


def test_strays_are_reset_and_forgeries_dropped():
    async def main():
        net = UserNet()
        net.listen(7, upper)
        guest = Guest(Bench(), net)
        guest.say(Segment(1, 7, 5, 9, TcpFlag.ACK, 0))
        guest.say(Segment(1, 7, 5, 9, TcpFlag.RST, 0))
        guest.say(Segment(1, 7, 5, 0, TcpFlag.SYN, 0), src=IPv4Address("10.0.2.16"))
        guest.put(0x0800, Packet(GUEST, GATEWAY, 6, b"short").pack())
        guest.put(0x0800, b"no packet")
        guest.put(0x86DD, bytes(40))
        guest.put(0x0800, Segment(1, 7, 5, 0, TcpFlag.SYN, 0).packet(GUEST, GATEWAY).pack(), b"\1" * 6)
        await settle()
        (answer,) = guest.segments()
        assert answer == Segment(7, 1, 9, 0, TcpFlag.RST, 0)
        await net.aclose()

    run(main())


@RUNNERS
def test_the_host_connects(runner):
    async def main():
        net = UserNet()
        tcp = Tcp(Guest(Bench(), net), 0, guest_port=22)
        connecting = asyncio.ensure_future(net.connect(22))
        await tcp.until(connecting.done)
        reader, writer = await connecting
        tcp.end.send(b"SSH-2.0\n", tcp.now)
        tcp.step()
        assert await reader.readline() == b"SSH-2.0\n"
        writer.write(b"bye")
        writer.write_eof()
        await tcp.until(lambda: tcp.got == b"bye" and tcp.end.ended)
        await tcp.close()
        await writer.wait_closed()
        assert await reader.read() == b""
        await net.aclose()

    runner(main())


def test_a_guest_that_refuses_or_is_silent():
    async def main():
        net = UserNet()
        with pytest.raises(StateError):
            await net.connect(22)
        guest = Guest(Bench(), net)
        with pytest.raises(ConfigError):
            await net.connect(0)
        connecting = asyncio.ensure_future(net.connect(22))
        await settle()
        (syn,) = guest.segments()
        guest.say(Segment(22, syn.src_port, 0, syn.seq + 1, TcpFlag.RST | TcpFlag.ACK, 0))
        with pytest.raises(ConnectionRefusedError):
            await connecting
        with pytest.raises(ConnectionRefusedError):
            await net.connect(22)
        assert guest.bench.clock.now() > 500 * 1_000_000_000
        guest.got()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await net.connect(22)
        await settle()
        assert [s.flags for s in guest.segments()] == [TcpFlag.SYN, TcpFlag.RST | TcpFlag.ACK]
        await net.aclose()

    run(main())


def test_a_reset_by_the_guest_reaches_the_handler():
    async def main():
        net = UserNet()
        seen = []

        async def handler(reader, writer):
            try:
                await reader.read()
            except ConnectionResetError as error:
                seen.append(str(error))

        net.listen(7, handler)
        tcp = Tcp(Guest(Bench(), net), 7)
        await tcp.connect()
        await settle()
        tcp.end.reset()
        tcp.step()
        await settle()
        assert seen == ["the guest reset the connection"]
        await net.aclose()

    run(main())


def test_a_handler_that_does_not_read_closes_the_window():
    async def main():
        net = UserNet()
        go = asyncio.Event()

        async def handler(reader, writer):
            await go.wait()
            assert len(await reader.readexactly(400_000)) == 400_000
            writer.write(b"done")

        net.listen(7, handler)
        tcp = Tcp(Guest(Bench(), net), 7)
        await tcp.connect()
        left = 400_000
        for _ in range(200):
            left -= tcp.end.send(bytes(min(left, 20_000)), tcp.now)
            tcp.step()
            await settle()
        # 64 KiB of window, and what asyncio's reader holds before it pauses.
        assert 400_000 - left <= 0x1_0000 * 4
        go.set()

        def moved():
            nonlocal left
            left -= tcp.end.send(bytes(min(left, 20_000)), tcp.now)
            return tcp.got == b"done"

        await tcp.until(moved)
        await net.aclose()

    run(main())


def test_a_guest_without_buffers_holds_everything_back():
    async def main():
        net = UserNet()
        guest = Guest(Bench(), net, buffers=0)
        waiting = 0
        for _ in range(700):
            guest.put(0x0806, Arp(1, MAC, GUEST, bytes(6), GATEWAY).pack(), b"\xff" * 6)
            await asyncio.sleep(0.000_001)
            waiting += 1 - len(guest.rings[1].take())
            if waiting == 64:
                break
        # 256 answers wait for buffers, 256 questions behind them, the rest in the ring.
        assert waiting == 64
        assert not guest.needs_reset
        answered = 0
        while guest.rings[1].take() or answered < 256 + 256 + 64:
            for _ in range(32):
                guest.offer()
            await settle()
            answered += len(guest.rings[0].take())
        await net.aclose()

    run(main())


def test_at_most_1024_connections():
    async def main():
        net = UserNet()
        net.listen(7, upper)
        guest = Guest(Bench(), net)
        kinds = []
        for port in range(1, 1026):
            guest.say(Segment(port, 7, 5, 0, TcpFlag.SYN, 100))
            await asyncio.sleep(0.000_001)
            guest.rings[1].take()
            kinds += [segment.flags for segment in guest.segments()]
        await settle()
        kinds += [segment.flags for segment in guest.segments()]
        assert kinds == [TcpFlag.SYN | TcpFlag.ACK] * 1024 + [TcpFlag.RST | TcpFlag.ACK]
        await net.aclose()

    run(main())


def test_the_end_of_the_machine_ends_handlers_and_callers():
    async def main():
        net = UserNet()
        ended = []

        async def handler(reader, writer):
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(True)

        net.listen(7, handler)
        tcp = Tcp(Guest(Bench(), net), 7)
        await tcp.connect()
        await settle()
        connecting = asyncio.ensure_future(net.connect(22))
        await settle()
        await net.aclose()
        assert ended == [True]
        with pytest.raises(ConnectionRefusedError):
            await connecting

    run(main())


@pytest.mark.parametrize("wrong", [{"network": "10.0.2.0/28"}, {"network": "nonsense"}, {"names": {"x": "999.1.1.1"}}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        UserNet(**wrong)


def test_a_network_serves_one_machine():
    async def main():
        net = UserNet(network="192.168.7.0/24")
        assert str(net.guest) == "192.168.7.15"
        bench = Bench()
        Guest(bench, net)
        with pytest.raises(StateError):
            Guest(bench, net)
        await net.aclose()

    run(main())
