"""A storm in a Linux guest: each CPU forks, pipes, packs and hashes, and the host knows every hash.

    PYTHONPATH=. python tests/linux_storm.py --minutes 10 --clock wall    (make soak: both clocks, one after the other)

A round hashes lines of numbers behind a packer and from a file; both hashes must be the host's own. Between batches
the kernel's log is read: it must be free of complaints. ``--minutes`` are the host's: the virtual clock of four busy
CPUs gets through some seconds in that time.
"""

import argparse
import asyncio
import hashlib
import re
import sys
import time

from linux_guests import GUESTS

from aiovm.loop import run, run_wall
from aiovm.stats import percentile
from aiovm.units import format_ns
from aiovm.vm import Vm
from benchmarks.common import heartbeat

COMPLAINTS = re.compile(r"BUG|WARNING|Oops|soft lockup|hard LOCKUP|unstable|rcu.*stall|blocked for more than")
PATIENCE = 3600

_LINES = 2000
_SHELL = f"""
round() {{
    seq $1 $(($1 + {_LINES})) | gzip | gunzip | tee /tmp/storm$1 | md5sum
    md5sum < /tmp/storm$1
    rm /tmp/storm$1
}}
storm() {{
    i=$1
    while [ $i -lt $2 ]; do
        echo $i $(round $i)
        i=$((i + 1))
    done
}}
"""


def expected(first):
    """The hash of round ``first``."""
    numbers = "".join(f"{i}\n" for i in range(first, first + _LINES + 1))
    return hashlib.md5(numbers.encode(), usedforsecurity=False).hexdigest()


async def prepare(vm):
    """Teach the guest's shell the storm."""
    await vm.shell(_SHELL, timeout=PATIENCE)


async def storm(vm, first, rounds):
    """``rounds`` on each CPU, numbered from ``first``; the number behind the last. Miscompares raise."""
    ranges = [(first + rounds * i, first + rounds * (i + 1)) for i in range(len(vm.vcpus))]
    background = " ".join(f"storm {low} {high} &" for low, high in ranges)
    output = await vm.shell(f"{background} wait", timeout=PATIENCE)
    found = sorted(output.splitlines())
    last = ranges[-1][1]
    wanted = sorted(f"{i} {expected(i)} - {expected(i)} -" for i in range(first, last))
    assert found == wanted, f"miscompare: {sorted(set(found) ^ set(wanted))}"
    return last


async def soak(clock, vcpus, minutes):
    """Storm until the time is over; prints what happened."""
    guest = Vm.linux(GUESTS / "vmlinuz", initrd=str(GUESTS / "initrd.gz"), cmdline="console=ttyS0 quiet", vcpus=vcpus)
    async with guest as vm:
        await vm.expect("~ # ", timeout=PATIENCE)
        await prepare(vm)
        began, said, done, late = time.monotonic(), 0.0, 0, []
        pulse = asyncio.create_task(heartbeat(late, sys.maxsize)) if clock == "wall" else None
        while (spent := time.monotonic() - began) < 60 * minutes:
            done = await storm(vm, done, 16)
            log = await vm.shell("dmesg", timeout=PATIENCE)
            assert not COMPLAINTS.search(log), log
            if spent - said >= 60:
                said = spent
                print(f"{clock}: {spent / 60:.1f} min, {done} rounds", flush=True)
        if pulse is not None:
            pulse.cancel()
            print(f"{clock}: a heartbeat of 1 ms is late by {format_ns(percentile(late, 99))} at p99", flush=True)
        source = await vm.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        guest_s = vm.clock.now() / 1e9
        vm.console.type("poweroff -f\n")
        outcome = await vm.finished()
    print(
        f"{clock}: {vcpus} vCPUs, {(time.monotonic() - began) / 60:.1f} min, {guest_s:.1f} s of guest time, "
        f"{done} rounds without a miscompare or a complaint, clocksource {source.strip()}, {outcome.reason}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description="Storm in a Linux guest, for as long as you like.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clock", choices=("wall", "virtual"), default="wall")
    parser.add_argument("--vcpus", type=int, default=4)
    arguments = parser.parse_args()
    runner = run_wall if arguments.clock == "wall" else run
    runner(soak(arguments.clock, arguments.vcpus, arguments.minutes))


if __name__ == "__main__":
    sys.exit(main())
