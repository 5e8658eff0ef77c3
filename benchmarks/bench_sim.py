"""Model vCPUs with the full scheduler at work: events a second beside SimPy, salabim and a bare heap on the same waits;
how the cost of an event and the memory grow from 10 to 10,000 vCPUs.

An event of ours is a guest operation's end: an exit, a switch or a wake-up is on top and not counted. Growth is held
against what Python itself costs when more objects are walked, on the same processor and its caches. Times
are CPU time.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import random
import time
import tracemalloc
from typing import NamedTuple

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
        begin = time.process_time()
        await asyncio.gather(*(machine.run() for machine in machines))
        return time.process_time() - begin

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
    begin = time.process_time()
    env.run()
    return time.process_time() - begin


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
    begin = time.process_time()
    env.run()
    return time.process_time() - begin


def bare_heap() -> float:
    """Generators stepped from a heap."""
    heap: list[tuple[int, int, object]] = []
    for serial, mine in enumerate(_WAITS):
        heapq.heappush(heap, (0, serial, iter(mine)))
    serial = len(heap)
    begin = time.process_time()
    while heap:
        now, _, process = heapq.heappop(heap)
        wait = next(process, None)
        if wait is not None:
            serial += 1
            heapq.heappush(heap, (now + wait, serial, process))
    return time.process_time() - begin


class _Part:
    """A small object of a process's own."""

    __slots__ = ("box", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.box = [number]


def python_walk(processes: int, busy: int) -> float:
    """Microseconds an event of generators stepped from a heap, ``busy`` of so many; at an event each looks at 25 of
    its 100 own objects (14 kB): how Python's own memory grows dearer when there is more of it."""

    def process(seed: int):
        source = random.Random(seed)
        parts = [_Part(seed + n) for n in range(100)]
        at = 0
        while True:
            yield source.randrange(1, 50_000)
            for _ in range(25):
                at = (at + 7) % 100
                part = parts[at]
                part.number = (part.number + part.box[0]) & 0xFF_FFFF

    made = [process(n) for n in range(processes)]
    heap = [(next(one), serial, one) for serial, one in enumerate(made)]
    random.Random(1).shuffle(heap)
    del heap[busy:]
    heapq.heapify(heap)
    events = 100_000
    gc.collect()
    gc.freeze()
    begin = time.process_time()
    for serial in range(processes, processes + events):
        now, _, one = heap[0]
        heapq.heapreplace(heap, (now + next(one), serial, one))
    seconds = time.process_time() - begin
    gc.unfreeze()
    return 1e6 * seconds / events


class Growth(NamedTuple):
    """What :func:`scale` measures."""

    us_an_event: float
    #: Entries in the clock's heap an event; where nobody else is due before, an operation needs none.
    heap_entries: float
    #: Microseconds a vCPU to launch it and to end it.
    us_a_vcpu: float


def scale(vcpus: int, pcpus: int) -> Growth:
    """Lock-bound machines of ten vCPUs, from the end of the warm-up on."""
    warmup, duration = 1_000_000, 20_000_000 if vcpus >= 1000 else 100_000_000
    scenario = Scenario(
        warmup=Ns(warmup),
        duration=Ns(duration),
        host=HostSpec(pcpus=pcpus),
        features=Features(ple=False),
        vm=[VmSpec(count=vcpus // 10, vcpus=10, workload=LockBound(lock="pvqspinlock", spin=512))],
    )
    marks: list[tuple[float, int, int]] = []

    async def main() -> Growth:
        def mark(share: float) -> None:
            if not marks or share in (warmup / (warmup + duration), 1):
                operations = sum(guest.operations() for guest in laboratory.guests)
                marks.append((time.process_time(), operations, laboratory.host.clock._serial))

        gc.collect()
        laboratory = Laboratory(scenario, progress=mark)
        begin = time.process_time()
        await laboratory.run()
        ended = time.process_time()
        launched, warm, done = marks
        events = done[1] - warm[1]
        return Growth(
            1e6 * (done[0] - warm[0]) / events,
            (done[2] - warm[2]) / events,
            1e6 * (launched[0] - begin + ended - done[0]) / vcpus,
        )

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
        measured = [scale(vcpus, pcpus) for _ in range(3)]
        event = min(m.us_an_event for m in measured)
        rows.append([
            f"{vcpus:,}", str(vcpus // 10), str(pcpus), f"{event:.2f}", f"{event / math.log10(vcpus):.2f}",
            f"{measured[0].heap_entries:.2f}", f"{best(lambda v=vcpus, p=pcpus: python_walk(v, p)):.2f}",
            f"{min(m.us_a_vcpu for m in measured):.0f}", f"{memory(vcpus, pcpus) / 1000:.1f}",
        ])  # fmt: skip
    show(
        "Growth",
        (
            "vCPUs", "VMs", "CPUs", "us an event", "/ log10", "heap entries", "Python's walk, us", "us a vCPU",
            "kB a vCPU",
        ),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
