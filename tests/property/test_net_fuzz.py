"""Whatever frames a guest sends, the network goes on: no error, and a good guest is served afterwards."""

import asyncio
import struct
from ipaddress import IPv4Address

from backend_bench import Bench, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.backends.net.stack import UserNet
from aiovm.backends.net.wire import Arp, Datagram, Frame, Packet, Segment, TcpFlag, parse_arp, parse_frame
from aiovm.loop import run

MAC = bytes.fromhex("525400123456")
GATEWAY_MAC = bytes.fromhex("52550a000202")
GUEST, GATEWAY, DNS = IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2"), IPv4Address("10.0.2.3")

HOSTS = st.sampled_from([GUEST, GATEWAY, DNS, IPv4Address("255.255.255.255"), IPv4Address("8.8.8.8"), IPv4Address(0)])
PORTS = st.sampled_from([0, 7, 22, 53, 67, 68, 40000])
NUMBERS = st.sampled_from([0, 1, 2, 5, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]) | st.integers(0, 0xFFFF_FFFF)
DNS_HEAD = struct.pack(">HHHHHH", 1, 0x100, 1, 0, 0, 0)
DHCP_HEAD = struct.pack(">BBBBIHH", 1, 1, 6, 0, 7, 0, 0) + bytes(16) + MAC + bytes(202)
BODIES = st.binary(max_size=60) | st.binary(max_size=30).map(DNS_HEAD.__add__)

SEGMENTS = st.builds(
    lambda src, dst, ports, seq, ack, flags, window, payload, mss: Segment(
        *ports, seq, ack, TcpFlag(flags), window, payload, mss
    ).packet(src, dst),
    HOSTS, HOSTS, st.tuples(PORTS, PORTS), NUMBERS, NUMBERS, st.integers(0, 31), st.integers(0, 0xFFFF), BODIES,
    st.integers(0, 0xFFFF),
)  # fmt: skip
DATAGRAMS = st.builds(
    lambda src, dst, ports, payload: Datagram(*ports, payload).packet(src, dst),
    HOSTS, HOSTS, st.tuples(PORTS, PORTS), BODIES,
)  # fmt: skip
DHCP = st.builds(
    lambda kind, options: Datagram(
        68, 67, DHCP_HEAD + b"\x63\x82\x53\x63\x35\x01" + bytes((kind,)) + options
    ).packet(IPv4Address(0), IPv4Address("255.255.255.255")),
    st.integers(0, 9), st.binary(max_size=20),
)  # fmt: skip
PACKETS = st.one_of(SEGMENTS, DATAGRAMS, DHCP, st.builds(Packet, HOSTS, HOSTS, st.integers(0, 255), BODIES))


def mangle(data, at, value):
    """A byte of ``data`` is another one."""
    data = bytearray(data)
    data[at % len(data)] ^= value
    return bytes(data)


FRAMES = st.one_of(
    st.binary(max_size=80),
    PACKETS.map(lambda packet: Frame(GATEWAY_MAC, MAC, 0x0800, packet.pack()).pack()),
    st.builds(
        lambda packet, at, value: mangle(Frame(GATEWAY_MAC, MAC, 0x0800, packet.pack()).pack(), at, value),
        PACKETS, st.integers(0, 100), st.integers(1, 255),
    ),
    st.builds(
        lambda op, to: Frame(b"\xff" * 6, MAC, 0x0806, Arp(op, MAC, GUEST, bytes(6), to).pack()).pack(),
        st.integers(0, 3), HOSTS,
    ),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(frames=st.lists(FRAMES, max_size=25), buffers=st.integers(0, 8), waits=st.lists(st.integers(0, 3), max_size=25))
def test_a_network_survives_any_guest(frames, buffers, waits):
    async def main():
        net = UserNet(names={"a": "10.0.2.9"})

        async def echo(reader, writer):
            while data := await reader.read(10):
                writer.write(data * 3)
                await writer.drain()

        net.listen(7, echo)
        driver = Bench().driver(net, size=64)
        inbox = {}

        def offer(count):
            for _ in range(count):
                driver.rings[0].buffers = 0x30_0000 + driver.rings[0].free % 64 * 0x1000
                head, (inbox[head],) = driver.rings[0].add(2048)
            driver.kick(0)

        def answers():
            taken = driver.rings[0].take()
            return [parse_frame(driver.memory.read(inbox[head], length)[12:]) for head, length in taken]

        offer(buffers)
        calling = asyncio.ensure_future(net.connect(22))
        for at, frame in enumerate(frames):
            driver.rings[1].buffers = 0x38_0000 + at * 0x1000
            driver.send(1, bytes(12) + frame)
            if at < len(waits) and waits[at]:
                await asyncio.sleep(waits[at] - 0.999)
        await settle()
        assert not driver.needs_reset
        assert len(driver.rings[1].take()) == len(frames)
        calling.cancel()
        # A guest that behaves is answered behind all that.
        driver.rings[1].buffers = 0x38_0000
        asked = IPv4Address("10.0.2.77")
        driver.send(1, bytes(12) + Frame(b"\xff" * 6, MAC, 0x0806, Arp(1, MAC, GUEST, bytes(6), asked).pack()).pack())
        offer(32 - buffers)
        frames_back = []
        for _ in range(6):
            await settle()
            new = answers()
            frames_back += new
            offer(len(new))
        found = [parse_arp(frame.payload) for frame in frames_back if frame.kind == 0x0806]
        assert asked in [arp.sender for arp in found]
        await asyncio.gather(calling, return_exceptions=True)
        await net.aclose()

    run(main())
