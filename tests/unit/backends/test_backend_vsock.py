"""The guest's sockets as asyncio streams, in virtual time and on the wall clock."""

import asyncio
import struct

import pytest
from backend_bench import Bench, settle, until
from virtio_driver import Driver

from aiovm.backends.vsock import Vsock
from aiovm.errors import ConfigError, StateError
from aiovm.loop import run

RUNNERS = pytest.mark.parametrize("runner", [run, asyncio.run])
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE = range(1, 7)


class Guest(Driver):
    """A guest with one socket at a time; every receive buffer is offered again at once."""

    def __init__(self, bench, vsock):
        self.inbox = {}
        super().__init__(lambda memory, irq: vsock.attach(bench, irq), memory=bench.memory, size=64)
        for _ in range(32):
            self.offer()

    def offer(self):
        self.rings[0].buffers = 0x30_0000 + self.rings[0].free % 64 * 0x1000
        head, (address,) = self.send(0, 4096)
        self.inbox[head] = address

    def say(self, op, payload=b"", *, host=5000, guest=1024, flags=0, alloc=1 << 20, forwarded=0):
        header = struct.pack("<QQIIIHHIII", 3, 2, guest, host, len(payload), 1, op, flags, alloc, forwarded)
        self.rings[1].buffers = 0x38_0000
        self.send(1, header, payload)

    def got(self):
        packets = []
        for head, length in self.rings[0].take():
            data = self.memory.read(self.inbox[head], length)
            _, _, src, dst, _, _, op, flags, _, forwarded = struct.unpack_from("<QQIIIHHIII", data)
            packets.append((op, src, dst, flags, forwarded, data[44:]))
        return packets

    async def next(self):
        found = []
        await until(lambda: found.extend(self.got()) or found)
        return found

    async def ops(self):
        return [packet[0] for packet in await self.next()]


async def upper(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())


@RUNNERS
def test_a_guest_connects_to_a_handler(runner):
    async def main():
        vsock = Vsock()
        seen = []

        async def handler(reader, writer):
            seen.append((writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
            await upper(reader, writer)

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        assert await guest.ops() == [RESPONSE]
        guest.say(RW, b"hello\n")
        assert [(p[0], p[5]) for p in await guest.next()] == [(RW, b"HELLO\n")]
        assert seen == [((3, 1024), (2, 5000))]
        guest.say(SHUTDOWN, flags=2)
        assert [(p[0], p[3]) for p in await guest.next()] == [(SHUTDOWN, 3)]
        guest.say(RST)
        await settle()
        assert guest.got() == []
        await vsock.aclose()

    runner(main())


@RUNNERS
def test_nobody_listens(runner):
    async def main():
        vsock = Vsock()
        vsock.listen(5000, upper)
        vsock.unlisten(5000)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        assert await guest.ops() == [RST]
        await vsock.aclose()

    runner(main())


@RUNNERS
def test_the_host_connects(runner):
    async def main():
        vsock = Vsock()
        guest = Guest(Bench(), vsock)
        connecting = asyncio.ensure_future(vsock.connect(22))
        ((op, host, port, *_),) = await guest.next()
        assert (op, port) == (REQUEST, 22)
        guest.say(RESPONSE, host=host, guest=22)
        reader, writer = await connecting
        guest.say(RW, b"SSH-2.0", host=host, guest=22)
        assert await reader.readexactly(7) == b"SSH-2.0"
        guest.say(SHUTDOWN, host=host, guest=22, flags=3)
        assert await reader.read() == b""
        await writer.wait_closed()
        await vsock.aclose()

    runner(main())


def test_nobody_listens_in_the_guest():
    async def main():
        vsock = Vsock()
        with pytest.raises(StateError):
            await vsock.connect(22)
        guest = Guest(Bench(), vsock)
        connecting = asyncio.ensure_future(vsock.connect(22))
        ((_, host, *_),) = await guest.next()
        guest.say(RST, host=host, guest=22)
        with pytest.raises(ConnectionRefusedError, match="0x16"):
            await connecting
        await vsock.aclose()

    run(main())


def test_a_caller_that_gives_up_resets():
    async def main():
        vsock = Vsock()
        guest = Guest(Bench(), vsock)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await vsock.connect(22)
        await settle()
        packets = guest.got()
        assert [p[0] for p in packets] == [REQUEST, RST]
        guest.say(RESPONSE, host=packets[0][1], guest=22)
        assert await guest.ops() == [RST]
        await vsock.aclose()

    run(main())


def test_much_data_flows_both_ways_within_the_credit():
    async def main():
        vsock = Vsock()
        sent = bytes(range(256)) * 2000
        taken = asyncio.Event()

        async def handler(reader, writer):
            writer.write(sent)
            await writer.drain()
            assert await reader.readexactly(400_000) == b"g" * 400_000
            taken.set()
            await reader.read()

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST, alloc=0x1_0000)
        got = bytearray()
        left = 400_000
        while len(got) < len(sent) or left:
            for op, _, _, _, count, data in await guest.next():
                assert op in (RESPONSE, RW, CREDIT_UPDATE)
                guest.offer()
                got += data
                forwarded = count
            while left and (room := 0x4_0000 - (400_000 - left - forwarded)):
                take = min(left, room, 0x1000)
                left -= take
                guest.say(RW, b"g" * take, alloc=0x1_0000, forwarded=len(got))
            guest.say(CREDIT_UPDATE, alloc=0x1_0000, forwarded=len(got))
        assert got == sent
        await asyncio.wait_for(taken.wait(), 5)
        await vsock.aclose()

    run(main())


def test_a_handler_that_does_not_read_holds_the_guest_back():
    async def main():
        vsock = Vsock()
        go = asyncio.Event()

        async def handler(reader, writer):
            await go.wait()
            await reader.readexactly(0x5_0000)

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        await settle()
        for _ in range(5):
            guest.say(RW, b"x" * 0x1_0000)
            await settle()
        packets = guest.got()
        # asyncio's reader took 192 KiB, so one more window of 256 KiB is free up to 448 KiB.
        assert packets[-1][4] == 0x3_0000
        assert [p[0] for p in packets if p[0] == RST] == []
        go.set()
        await settle()
        await vsock.aclose()

    run(main())


def test_a_guest_that_does_not_finish_is_reset_after_eight_seconds():
    async def main():
        vsock = Vsock()
        bench = Bench()

        async def handler(reader, writer):
            pass

        vsock.listen(5000, handler)
        guest = Guest(bench, vsock)
        guest.say(REQUEST)
        await settle()
        assert [p[0] for p in guest.got()] == [RESPONSE, SHUTDOWN]
        await asyncio.sleep(7.9)
        assert guest.got() == []
        await asyncio.sleep(0.2)
        assert [p[0] for p in guest.got()] == [RST]
        await vsock.aclose()

    run(main())


def test_a_reset_by_the_guest_reaches_the_handler():
    async def main():
        vsock = Vsock()
        seen = []

        async def handler(reader, writer):
            try:
                await reader.read()
            except ConnectionResetError as error:
                seen.append(str(error))

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        await settle()
        guest.say(RST)
        await settle()
        assert seen == ["the guest reset the connection"]
        await vsock.aclose()

    run(main())


def test_half_close_by_the_handler():
    async def main():
        vsock = Vsock()

        async def handler(reader, writer):
            writer.write(b"question")
            writer.write_eof()
            assert await reader.read() == b"answer"

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        await settle()
        assert [(p[0], p[3]) for p in guest.got()] == [(RESPONSE, 0), (RW, 0), (SHUTDOWN, 2)]
        guest.say(RW, b"answer")
        guest.say(SHUTDOWN, flags=2)
        await settle()
        assert [(p[0], p[3]) for p in guest.got()] == [(SHUTDOWN, 3)]
        await vsock.aclose()

    run(main())


def test_a_reset_of_the_device_ends_connections():
    async def main():
        vsock = Vsock()
        seen = []

        async def handler(reader, writer):
            with pytest.raises(ConnectionResetError):
                await reader.read()
            seen.append(True)

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        await settle()
        guest.start()
        await settle()
        assert seen == [True]
        await vsock.aclose()

    run(main())


def test_the_end_of_the_machine_ends_handlers_and_callers():
    async def main():
        vsock = Vsock()
        ended = []

        async def handler(reader, writer):
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(True)

        vsock.listen(5000, handler)
        guest = Guest(Bench(), vsock)
        guest.say(REQUEST)
        connecting = asyncio.ensure_future(vsock.connect(22))
        await settle()
        await vsock.aclose()
        assert ended == [True]
        with pytest.raises(ConnectionResetError):
            await connecting

    run(main())


def test_ports_are_given_once():
    async def main():
        vsock = Vsock()
        vsock.listen(1, upper)
        for port in (1, -1, 1 << 32):
            with pytest.raises(ConfigError):
                vsock.listen(port, upper)
        with pytest.raises(ConfigError):
            vsock.unlisten(2)
        bench = Bench()
        Guest(bench, vsock)
        with pytest.raises(StateError):
            Guest(bench, vsock)
        await vsock.aclose()

    run(main())
