"""A machine without vCPUs for backends: memory and a clock, on a virtual loop or on asyncio's own."""

import asyncio
from types import SimpleNamespace

from virtio_driver import Driver, ram

from aiovm.clock import WallClock
from aiovm.loop import VirtualLoop


class Bench:
    def __init__(self, seed=0):
        loop = asyncio.get_running_loop()
        self.clock = loop.clock if isinstance(loop, VirtualLoop) else WallClock()
        self.memory = ram()
        self.host = SimpleNamespace(seed=seed)

    def call_at(self, deadline, callback):
        return self.clock.call_at(deadline, callback)

    def post(self, deadline, callback):
        self.clock.call_at(deadline, callback)

    def driver(self, backend, **options):
        """A driver that has brought ``backend``'s device up."""
        return Driver(lambda memory, irq: backend.attach(self, irq), memory=self.memory, **options)


async def settle():
    """Let everything that is due happen, and what follows from it."""
    for _ in range(10):
        await asyncio.sleep(0.000_001)


async def until(condition, seconds=5):
    """Wait until ``condition()``; on the wall clock with patience."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is many things
            await asyncio.sleep(0.001)
