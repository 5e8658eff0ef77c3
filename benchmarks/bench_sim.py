"""Model vCPUs with the full scheduler at work: events a second beside SimPy, salabim and a bare heap on the same waits;
how the cost of an event and the memory grow from 10 to 10,000 vCPUs.

An event of ours is a guest operation's end: an exit, a switch or a wake-up is on top and not counted.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import random
import time
import tracemalloc

from aiovm.loop import Host, run
from aiovm.sim.lab import Laboratory
from aiovm.sim.machine import SimMachine
from aiovm.sim.scenario import Features, HostSpec, LockBound, Ns, Scenario, VmSpec
from benchmarks.common import best, show

_VCPUS, _EVENTS = 64, 3_000


def _waits(seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randint(1, 50_000) for _ in range(_EVENTS)]


_WAITS = [_waits(i) for i in range(_VCPUS)]


def model(pcpus: int) -> float:
    """Eight machines of eight vCPUs, each computing its waits."""

    def program(waits):
        yield from waits

    async def main() -> float:
        host = Host(pcpus, seed=1)
        machines = [SimMachine(host, vcpus=8) for _ in range(_VCPUS // 8)]
        for number, machine in enumerate(machines):
            for index in range(8):
                machine.start(index, lambda _, n=number * 8 + index: program(_WAITS[n]))
        begin = time.perf_counter()
        await asyncio.gather(*(machine.run() for machine in machines))
        return time.perf_counter() - begin

    return run(main())


def simpy_timeouts() -> float | None:
    """SimPy's timeouts: no CPUs, no scheduler."""
    try:
        import simpy
    except ImportError:
        return None
    env = simpy.Environment()

    def process(mine):
        for wait in mine:
            yield env.timeout(wait)

    for mine in _WAITS:
        env.process(process(mine))
    begin = time.perf_counter()
    env.run()
    return time.perf_counter() - begin


def salabim_holds() -> float | None:
    """salabim's holds, in its generator mode."""
    try:
        import salabim
    except ImportError:
        return None
    salabim.yieldless(False)
    env = salabim.Environment(trace=False)

    class Process(salabim.Component):
        def setup(self, mine):
            self.mine = mine

        def process(self):
            for wait in self.mine:
                yield self.hold(wait)

    for mine in _WAITS:
        Process(mine=mine)
    begin = time.perf_counter()
    env.run()
    return time.perf_counter() - begin


def bare_heap() -> float:
    """Generators stepped from a heap."""
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


def scale(vcpus: int, pcpus: int) -> tuple[float, float]:
    """Lock-bound machines of ten vCPUs: microseconds an event, bytes a vCPU once all of them have run."""
    duration = 20_000_000 if vcpus >= 1000 else 100_000_000
    scenario = Scenario(
        warmup=Ns(1_000_000),
        duration=Ns(duration),
        host=HostSpec(pcpus=pcpus),
        features=Features(ple=False),
        vm=[VmSpec(count=vcpus // 10, vcpus=10, workload=LockBound(lock="pvqspinlock", spin=512))],
    )

    async def main() -> tuple[float, float]:
        gc.collect()
        laboratory = Laboratory(scenario)
        begin = time.perf_counter()
        result = await laboratory.run()
        return 1e6 * (time.perf_counter() - begin) / result.operations, 0.0

    return run(main())


def memory(vcpus: int, pcpus: int) -> float:
    """Bytes a vCPU, each of which has had a slice."""
    scenario = Scenario(
        warmup=Ns(1_000_000),
        duration=Ns(1_000_000),
        host=HostSpec(pcpus=pcpus, slice=Ns(20_000)),
        features=Features(ple=False),
        vm=[VmSpec(count=vcpus // 10, vcpus=10, workload=LockBound(lock="pvqspinlock", spin=512))],
    )

    async def main() -> float:
        gc.collect()
        tracemalloc.start()
        laboratory = Laboratory(scenario)
        await laboratory.run()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used / vcpus

    return run(main())


def main() -> None:
    """Measure and print."""
    total = _VCPUS * _EVENTS
    simpy_seconds = best(simpy_timeouts) if simpy_timeouts() else None
    rows = []
    for name, seconds in (
        ("aiovm, 64 model vCPUs on 64 CPUs", best(lambda: model(64))),
        ("aiovm, 64 model vCPUs on 16 CPUs", best(lambda: model(16))),
        ("SimPy timeouts", simpy_seconds),
        ("salabim holds", best(salabim_holds) if salabim_holds() else None),
        ("bare heap", best(bare_heap)),
    ):
        ratio = f"{simpy_seconds / seconds:.2f}" if seconds and simpy_seconds else "-"
        rows.append([name, f"{total / seconds / 1000:,.0f}k" if seconds else "-", ratio])
    show("The same waits", ("", "events a second", "times SimPy"), rows)

    rows = []
    for vcpus, pcpus in ((10, 4), (100, 16), (1_000, 64), (10_000, 256)):
        cost, _ = scale(vcpus, pcpus)
        rows.append([f"{vcpus:,}", str(vcpus // 10), str(pcpus), f"{cost:.2f}", f"{memory(vcpus, pcpus) / 1000:.1f}"])
    show("Growth", ("vCPUs", "machines", "CPUs", "us an event", "kB a vCPU"), rows)


if __name__ == "__main__":
    main()
