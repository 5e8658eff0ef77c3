"""The transport behind a guest's stream: asyncio's rules on one side, a link with limited room on the other."""

import asyncio

import pytest

from aiovm.backends.stream import open_stream, start_handler
from aiovm.errors import StateError
from aiovm.loop import run


class FakeLink:
    def __init__(self, room=1 << 30):
        self.room = room
        self.got = bytearray()
        self.log = []
        self.freed = 0

    def send(self, data):
        taken = data[: self.room]
        self.room -= len(taken)
        self.got += taken
        return len(taken)

    def finish(self):
        self.log.append("finish")

    def close(self):
        self.log.append("close")

    def reset(self):
        self.log.append("reset")

    def consumed(self, count):
        self.freed += count


#: What the running test has opened.
STREAMS = []


class Stream:
    def __init__(self, room=1 << 30):
        self.link = FakeLink(room)
        self.changes = 0
        STREAMS.append(self)
        self.reader, self.writer, self.transport = open_stream(self.changed, {"peername": "guest"})

    def changed(self):
        self.changes += 1

    def pump(self):
        self.transport.pump(self.link)


def virtual(coroutine):
    """Run the test in virtual time, and close what it leaves open."""

    async def closing():
        try:
            await coroutine()
        finally:
            while STREAMS:
                STREAMS.pop().transport.lost(None)

    def test():
        run(closing())

    test.__name__ = coroutine.__name__
    return test


@virtual
async def test_what_is_written_goes_to_the_link_and_what_comes_is_read():
    s = Stream()
    s.writer.write(b"ab")
    s.writer.writelines([b"c", b"d"])
    assert s.changes > 0
    s.pump()
    assert s.link.got == b"abcd"
    s.transport.deliver(b"answer")
    s.pump()
    assert await s.reader.readexactly(6) == b"answer"
    assert s.link.freed == 6
    assert s.writer.get_extra_info("peername") == "guest"


@virtual
async def test_drain_waits_for_the_guest():
    s = Stream(room=100)
    s.writer.write(bytes(100_000))
    waiting = asyncio.ensure_future(s.writer.drain())
    s.pump()
    await asyncio.sleep(0)
    assert not waiting.done()
    assert s.transport.get_write_buffer_size() == 99_900
    s.link.room = 99_900 - 0x4000
    s.pump()
    await waiting
    assert s.transport.get_write_buffer_size() == 0x4000


@virtual
async def test_water_marks():
    s = Stream()
    assert s.transport.get_write_buffer_limits() == (0x4000, 0x10000)
    s.transport.set_write_buffer_limits(high=40)
    assert s.transport.get_write_buffer_limits() == (10, 40)
    s.transport.set_write_buffer_limits(low=5)
    assert s.transport.get_write_buffer_limits() == (5, 20)
    s.transport.set_write_buffer_limits()
    assert s.transport.get_write_buffer_limits() == (0x4000, 0x10000)
    with pytest.raises(ValueError, match="high water 1"):
        s.transport.set_write_buffer_limits(high=1, low=2)


@virtual
async def test_a_reader_that_is_not_read_stops_the_guest():
    s = Stream()
    for _ in range(4):
        s.transport.deliver(bytes(0x10000))
    s.pump()
    # asyncio's reader holds twice its limit of 64 KiB, and pauses above that.
    assert s.link.freed == 0x30000
    assert not s.transport.is_reading()
    before = s.changes
    await s.reader.readexactly(0x30000)
    assert s.transport.is_reading()
    assert s.changes > before
    s.pump()
    assert s.link.freed == 0x40000


@virtual
async def test_the_guests_end_comes_behind_its_data():
    s = Stream()
    s.transport.pause_reading()
    s.transport.deliver(b"last")
    s.transport.deliver_eof()
    s.pump()
    assert not s.reader.at_eof()
    s.transport.resume_reading()
    s.pump()
    assert await s.reader.read() == b"last"
    assert not s.transport.is_closing()


@virtual
async def test_write_eof_comes_behind_what_was_written():
    s = Stream(room=1)
    assert s.writer.can_write_eof()
    s.writer.write(b"ab")
    s.writer.write_eof()
    s.pump()
    assert s.link.log == []
    s.link.room = 1
    s.pump()
    s.pump()
    assert s.link.log == ["finish"]
    with pytest.raises(StateError):
        s.writer.write(b"c")


@virtual
async def test_close_sends_what_was_written_and_drops_what_comes():
    s = Stream(room=1)
    s.writer.write(b"ab")
    s.writer.close()
    s.writer.write(b"ignored")
    assert s.transport.is_closing()
    s.pump()
    s.link.room = 9
    s.transport.deliver(b"late")
    s.transport.deliver_eof()
    s.pump()
    assert s.link.got == b"ab"
    assert s.link.log == ["close"]
    assert s.link.freed == 4
    s.transport.lost(None)
    await s.writer.wait_closed()
    assert await s.reader.read() == b""
    assert s.transport.is_over


@virtual
async def test_abort_drops_what_was_written():
    s = Stream(room=1)
    s.writer.write(b"ab")
    s.transport.abort()
    s.pump()
    assert s.link.got == b""
    assert s.link.log == ["reset"]
    assert s.transport.is_over
    s.pump()
    assert s.link.log == ["reset"]


@virtual
async def test_a_loss_with_an_error_reaches_both():
    s = Stream(room=0)
    s.writer.write(bytes(0x20000))
    waiting = asyncio.ensure_future(s.writer.drain())
    await asyncio.sleep(0)
    s.transport.lost(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError, match="gone"):
        await s.reader.read()
    with pytest.raises(ConnectionResetError):
        await waiting
    with pytest.raises(ConnectionResetError):
        await s.writer.wait_closed()


@virtual
async def test_what_came_before_an_orderly_end_is_still_read():
    s = Stream()
    s.transport.pause_reading()
    s.transport.deliver(b"rest")
    s.transport.lost(None)
    await asyncio.sleep(0)
    assert not s.reader.at_eof()
    s.transport.resume_reading()
    assert await s.reader.read() == b"rest"


@virtual
async def test_protocols_can_be_exchanged():
    s = Stream()
    other = asyncio.Protocol()
    s.transport.set_protocol(other)
    assert s.transport.get_protocol() is other


@virtual
async def test_a_handler_that_ends_closes():
    s = Stream()
    tasks = set()

    async def handler(reader, writer):
        writer.write((await reader.readline()).upper())

    start_handler(handler, (s.reader, s.writer), tasks)
    s.transport.deliver(b"line\n")
    s.pump()
    await asyncio.gather(*tasks)
    await asyncio.sleep(0)
    s.pump()
    assert s.link.got == b"LINE\n"
    assert s.link.log == ["close"]
    assert tasks == set()


@virtual
async def test_a_handler_that_fails_resets_and_is_reported():
    s = Stream()
    tasks = set()
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))

    async def handler(reader, writer):
        raise ValueError("mistake")

    start_handler(handler, (s.reader, s.writer), tasks)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    s.pump()
    assert s.link.log == ["reset"]
    assert [str(report["exception"]) for report in reports] == ["mistake"]


@virtual
async def test_a_handler_that_is_cancelled_resets_quietly():
    s = Stream()
    tasks = set()

    async def handler(reader, writer):
        await reader.read()

    start_handler(handler, (s.reader, s.writer), tasks)
    await asyncio.sleep(0)
    for task in tuple(tasks):
        task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    s.pump()
    assert s.link.log == ["reset"]
