"""Events a second: coroutines that wait in virtual time, beside SimPy, plain asyncio and a bare heap, same waits."""

from __future__ import annotations

import asyncio
import heapq
import random
import time

from aiovm.clock import Alarm
from aiovm.loop import run
from benchmarks.common import best, show

_PROCESSES, _EVENTS = 64, 3_000


def waits(seed: int) -> list[int]:
    """One process's waits, ns."""
    source = random.Random(seed)
    return [source.randint(1, 50_000) for _ in range(_EVENTS)]


_WAITS = [waits(i) for i in range(_PROCESSES)]


def alarms() -> float:
    """Our alarms on the virtual loop."""

    async def process(mine: list[int]) -> None:
        clock = asyncio.get_running_loop().clock
        alarm = Alarm(clock)
        for wait in mine:
            await alarm.until(clock.now() + wait)

    async def main() -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(process(w) for w in _WAITS))
        return time.perf_counter() - begin

    return run(main())


def sleeps() -> float:
    """``asyncio.sleep`` on the virtual loop."""

    async def process(mine: list[int]) -> None:
        for wait in mine:
            await asyncio.sleep(wait / 1e9)

    async def main() -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(process(w) for w in _WAITS))
        return time.perf_counter() - begin

    return run(main())


def simpy_timeouts() -> float | None:
    """SimPy's timeouts."""
    try:
        import simpy
    except ImportError:
        return None
    env = simpy.Environment()

    def process(mine: list[int]):
        for wait in mine:
            yield env.timeout(wait)

    for mine in _WAITS:
        env.process(process(mine))
    begin = time.perf_counter()
    env.run()
    return time.perf_counter() - begin


def bare_heap() -> float:
    """Generators stepped from a heap: nobody can be faster in Python."""
    heap: list[tuple[int, int, object]] = []
    for serial, mine in enumerate(_WAITS):
        heapq.heappush(heap, (0, serial, iter(mine)))
    serial = len(heap)
    begin = time.perf_counter()
    while heap:
        now, _, process = heapq.heappop(heap)
        wait = next(process, None)
        if wait is not None:
            serial += 1
            heapq.heappush(heap, (now + wait, serial, process))
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    total = _PROCESSES * _EVENTS
    rows = []
    base = simpy_timeouts() and best(simpy_timeouts)
    for name, function in (
        ("aiovm alarms", alarms),
        ("asyncio.sleep on the virtual loop", sleeps),
        ("SimPy timeouts", simpy_timeouts),
        ("bare heap", bare_heap),
    ):
        seconds = best(function) if function is not simpy_timeouts else base
        ratio = "-" if not base or not seconds else f"{base / seconds:.2f}"
        rows.append([name, "-" if not seconds else f"{total / seconds / 1000:,.0f}k", ratio])
    show("Waits in virtual time", ("", "events a second", "times SimPy"), rows)


if __name__ == "__main__":
    main()
