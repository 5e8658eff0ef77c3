"""vCPU switches a second with a real guest: the ticket lock guest, 8 vCPUs, a slice each 2 us of virtual time."""

from __future__ import annotations

import time
import timeit

from aiovm import Host, Vm, guests, run
from aiovm.engine.unicorn.layout import ENV_END
from benchmarks.common import show


def switches(pcpus: int) -> tuple[int, float]:
    """Slices run, and host seconds."""

    async def main() -> tuple[int, float]:
        host = Host(pcpus, seed=1)
        async with Vm(host, vcpus=8, ple=False, console=lambda _: None) as vm:
            vm.load(guests.path("locks").read_bytes(), name="locks", cmdline="lock=ticket cpus=8 duration=50000000")
            count = 0

            def sliced(_vcpu, _start, _end) -> None:
                nonlocal count
                count += 1

            for vcpu in vm.vcpus:
                vcpu.on_slice = sliced
            begin = time.perf_counter()
            await vm.run()
            return count, time.perf_counter() - begin

    return run(main())


#: x87 and SSE registers in a vCPU's state, bytes: 8 of 16, 32 of 64, and the control words around them.
FPU_BYTES = 2_600


def copy_ns(size: int) -> float:
    """ns to copy ``size`` bytes of a vCPU's state out of the core and another's in."""
    here, there = memoryview(bytearray(size)), bytearray(size)

    def swap() -> None:
        there[:] = here
        here[:] = there

    return min(timeit.repeat(swap, number=10_000, repeat=5)) / 10_000 * 1e9


def main() -> None:
    """Measure and print."""
    rows = []
    for pcpus in (8, 4, 2):
        count, seconds = switches(pcpus)
        rows.append([f"8 on {pcpus}", f"{count:,}", f"{count / seconds / 1000:.0f}k", f"{seconds / count * 1e6:.1f}"])
    whole, lazy = copy_ns(ENV_END), copy_ns(ENV_END - FPU_BYTES)
    rows.append(["copying the state", "", "", f"{whole / 1000:.2f}"])
    rows.append(["of that, FPU and SSE", "", "", f"{(whole - lazy) / 1000:.2f}"])
    show("vCPU switches with a real guest", ("vCPUs", "slices", "a second", "us each"), rows)


if __name__ == "__main__":
    main()
