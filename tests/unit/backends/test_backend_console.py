"""The virtio console as streams, in virtual time and on the wall clock."""

import asyncio

import pytest
from backend_bench import Bench, settle

from aiovm.backends.console import ConsolePort
from aiovm.errors import StateError
from aiovm.loop import run

RUNNERS = pytest.mark.parametrize("runner", [run, asyncio.run])


@RUNNERS
def test_what_the_guest_prints_is_read_and_what_is_written_is_typed(runner):
    async def main():
        console = ConsolePort(columns=100, rows=30)
        driver = Bench().driver(console)
        assert driver.get(0x100) == 30 << 16 | 100
        reader, writer = console.streams
        driver.send(1, b"login: ")
        assert await reader.readexactly(7) == b"login: "
        assert driver.rings[1].take() == [(0, 0)]
        writer.write(b"root\n")
        await asyncio.sleep(0.01)
        assert driver.rings[0].take() == []
        _, (address,) = driver.send(0, 16)
        await asyncio.sleep(0.01)
        assert driver.rings[0].take() == [(0, 5)]
        assert driver.memory.read(address, 5) == b"root\n"
        await console.aclose()

    runner(main())


def test_a_program_that_does_not_read_holds_the_guest_back():
    async def main():
        console = ConsolePort()
        driver = Bench().driver(console, size=64)
        reader, _ = console.streams
        for _ in range(10):
            driver.rings[1].buffers = 0x30_0000
            driver.send(1, b"x" * 0x8000)
            await settle()
        given = len(driver.rings[1].take())
        assert 4 <= given < 10
        assert len(await reader.readexactly(10 * 0x8000)) == 10 * 0x8000
        await settle()
        assert len(driver.rings[1].take()) == 10 - given
        await console.aclose()

    run(main())


def test_the_window_may_change_before_and_after():
    async def main():
        console = ConsolePort()
        console.resize(90, 20)
        bench = Bench()
        driver = bench.driver(console)
        assert driver.get(0x100, 2) == 90
        console.resize(91, 20)
        await settle()
        assert driver.get(0x100, 2) == 91
        with pytest.raises(StateError):
            bench.driver(console)
        await console.aclose()

    run(main())


def test_the_end_of_the_machine_is_the_end_of_the_stream():
    async def main():
        console = ConsolePort()
        with pytest.raises(StateError):
            _ = console.streams
        await console.aclose()
        driver = Bench().driver(console)
        driver.send(1, b"last words")
        await console.aclose()
        assert await console.streams[0].read() == b"last words"

    run(main())


def test_closing_the_stream_lets_the_guest_print_into_the_void():
    async def main():
        console = ConsolePort()
        driver = Bench().driver(console, size=64)
        console.streams[1].transport.close()
        for _ in range(8):
            driver.rings[1].buffers = 0x30_0000
            driver.send(1, b"x" * 0x8000)
            await settle()
        assert len(driver.rings[1].take()) == 8
        console.streams[1].transport.abort()
        await settle()
        await console.aclose()

    run(main())
