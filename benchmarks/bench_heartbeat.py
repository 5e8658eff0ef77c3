"""How late a heartbeat of 1 ms is on the loop of a machine whose four vCPUs run flat out on the wall clock.

Beside it, in turns: the same heartbeat on an idle loop, and on an idle loop while as many other processes compute as
the machine has worker threads (one): what the operating system's scheduler does to it alone.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiovm import Host, Vm, run_wall
from aiovm.loaders import apply
from aiovm.stats import percentile
from aiovm.vcpu import MpState
from benchmarks.bench_boot import GUESTS, PROMPT
from benchmarks.common import heartbeat, show

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_VCPUS = 4
_ROUNDS = 4
_BEATS = 2_500
_LINUX_LOAD = "while :; do :; done & " * _VCPUS
#: Each runs in real mode on every vCPU, for ever.
_LOOPS = {
    "computes": "40 eb fd",  # inc ax; jmp
    "CPUID": "0f a2 eb fc",
    "OUT": "e6 80 eb fc",  # out 0x80, al; jmp
    "INT 32, IRET": "c7 06 80 00 10 7c 8c 0e 82 00 cd 20 eb fc 90 90 cf",  # mov [0x80], 0x7c10; mov [0x82], cs; int 32
}


@asynccontextmanager
async def idle() -> AsyncIterator[None]:
    """Nothing else."""
    yield


@asynccontextmanager
async def neighbour() -> AsyncIterator[None]:
    """Another process computes."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    try:
        yield
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def looping(code: bytes) -> AsyncIterator[None]:
    """A machine, every vCPU of which runs ``code``."""
    async with Vm(Host(_VCPUS), vcpus=_VCPUS, memory=1 << 20) as vm:
        image = vm.load(code, kind="flat")
        for vcpu in vm.vcpus[1:]:
            apply(image.entry, vcpu.context.state)
            vcpu.set_mp_state(MpState.RUNNABLE)
        vm.start()
        try:
            yield
        finally:
            vm.stop()
            await vm.finished()


@asynccontextmanager
async def linux() -> AsyncIterator[None]:
    """Linux with a busy process on each CPU."""
    kernel, initrd = GUESTS / "vmlinuz", str(GUESTS / "initrd.gz")
    async with Vm.linux(kernel, initrd=initrd, vcpus=_VCPUS) as vm:
        await vm.expect(PROMPT)
        await vm.shell(_LINUX_LOAD)
        yield


def main() -> None:
    """Measure and print."""
    scenes = {"idle loop": idle, "another process computes": neighbour}
    for name, code in _LOOPS.items():
        scenes[f"{_VCPUS} vCPUs: {name}"] = lambda code=code: looping(bytes.fromhex(code))
    if (GUESTS / "initrd.gz").exists():
        scenes[f"{_VCPUS} vCPUs: Linux, busy"] = linux
    found: dict[str, list[int]] = {name: [] for name in scenes}

    async def measure(name: str) -> None:
        async with scenes[name]():
            await heartbeat(found[name], _BEATS)

    for _ in range(_ROUNDS):
        for name in scenes:
            run_wall(measure(name))
    rows = [
        [name, *(f"{percentile(late, percent) / 1e6:.2f}" for percent in (50, 99, 100))] for name, late in found.items()
    ]
    show("A heartbeat of 1 ms is late by, ms", ("beside it", "p50", "p99", "max"), rows)


if __name__ == "__main__":
    main()
