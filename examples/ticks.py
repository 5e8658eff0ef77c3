"""A guest sleeps between the ticks of its LAPIC timer, while a coroutine of ours sleeps beside it on the same clock."""

import asyncio
from itertools import pairwise

from aiovm import guests
from aiovm.loop import Host, run
from aiovm.trace import Kind, ListSink, Tracer
from aiovm.vm import Vm

PERIOD_US = 2000


async def watch(vm: Vm) -> None:
    """Report every 3 ms of virtual time. ``asyncio.sleep`` is the ordinary one."""
    while True:
        await asyncio.sleep(0.003)
        vcpu = vm.vcpus[0]
        print(f"    3 ms later: {vcpu.stat.irq_injections} interrupts injected, {vcpu.stat.halt_exits} halts")


async def main() -> None:
    seen = ListSink()
    trace = Tracer()
    trace.add(seen)
    host = Host(pcpus=1, trace=trace)
    async with Vm(host, console=lambda data: print(data.decode(), end="")) as vm:
        vm.load(guests.path("ticks").read_bytes(), cmdline=f"mode=deadline n=5 period={PERIOD_US}")
        watcher = asyncio.create_task(watch(vm))
        await vm.run()
        watcher.cancel()

    trace.close()
    fired = [record.now for record in seen.of(Kind.TIMER)]
    injected = [record.now for record in seen.of(Kind.INJECT)]
    print("between the ticks:", *(f"{b - a} ns" for a, b in pairwise(fired)))
    print("timer to interrupt:", *(f"{b - a} ns" for a, b in zip(fired, injected, strict=True)))


run(main())
