"""Debian's kernel, unmodified, on four virtual CPUs that share two physical ones; after ``make guests``."""

import os
from pathlib import Path

import aiovm

GUESTS = Path(os.environ.get("AIOVM_GUESTS", "out/guests"))


async def main() -> None:
    async with aiovm.Vm.linux(GUESTS / "vmlinuz", initrd=str(GUESTS / "initrd.gz"), vcpus=4, pcpus=2) as vm:
        await vm.expect("~ # ")
        print("processors:", await vm.shell("nproc"), end="")
        print("a sum:", await vm.shell("seq 1 1000 | md5sum"), end="")
        print(await vm.shell("dmesg | grep -o 'kvm-guest: .*'"), end="")
        vm.console.type("poweroff -f\n")
        outcome = await vm.finished()
        print("ended by", outcome.reason)


aiovm.run(main())
