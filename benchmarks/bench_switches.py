"""vCPU switches a second with a real guest: the ticket lock guest, 8 vCPUs, a slice each 2 us of virtual time."""

from __future__ import annotations

import time

from aiovm import Host, Vm, guests, run
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


def main() -> None:
    """Measure and print."""
    rows = []
    for pcpus in (8, 4, 2):
        count, seconds = switches(pcpus)
        rows.append([f"8 on {pcpus}", f"{count:,}", f"{count / seconds / 1000:.0f}k", f"{seconds / count * 1e6:.1f}"])
    show("vCPU switches with a real guest", ("vCPUs", "slices", "a second", "us each"), rows)


if __name__ == "__main__":
    main()
