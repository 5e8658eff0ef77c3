"""Entropy: repeatable in virtual time, by the host's seed."""

import asyncio

from backend_bench import Bench

from aiovm.backends.entropy import Entropy
from aiovm.loop import run


def drawn(runner, seed, backend=None):
    async def main():
        entropy = Entropy() if backend is None else backend
        driver = Bench(seed).driver(entropy)
        _, (address,) = driver.send(0, 16)
        await entropy.aclose()
        return driver.memory.read(address, 16)

    return runner(main())


def test_virtual_time_repeats_by_seed():
    assert drawn(run, 1) == drawn(run, 1)
    assert drawn(run, 1) != drawn(run, 2)


def test_the_wall_clock_does_not():
    assert drawn(asyncio.run, 1) != drawn(asyncio.run, 1)


def test_another_source():
    assert drawn(run, 1, Entropy(lambda n: b"\7" * n)) == b"\7" * 16


def test_the_generator_goes_on_where_it_was_saved():
    async def main():
        bench = Bench(3)
        first, second = Entropy(), Entropy()
        driver = bench.driver(first)
        driver.send(0, 16)
        saved = first.save()
        _, (address,) = driver.send(0, 16)
        wanted = driver.memory.read(address, 16)
        again = bench.driver(second)
        second.restore({**saved, "device": second.save()["device"]})
        _, (address,) = again.send(0, 16)
        assert again.memory.read(address, 16) == wanted

    run(main())
