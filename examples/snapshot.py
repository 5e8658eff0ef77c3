"""Four CPUs compete for a lock on two. In the middle the machine is saved; then its future happens twice.

The second time in other words: the file is read, the machine made anew on another host, and the trace compared.
"""

import asyncio
import tempfile
from pathlib import Path

from aiovm import guests, snapshot_file
from aiovm.loop import Host, run
from aiovm.trace import HashSink
from aiovm.vm import Vm

FILE = Path(tempfile.mkdtemp()) / "half.snap"


def watch(host: Host) -> HashSink:
    """The hash of everything that happens on ``host`` from now on."""
    digest = HashSink()
    host.trace.add(digest)
    return digest


async def saved() -> str:
    """Run, save on the way, and go on."""
    host = Host(pcpus=2)
    async with Vm(host, vcpus=4, memory=16 << 20) as vm:
        vm.load(guests.path("locks").read_bytes(), cmdline="lock=pvticket cpus=4 duration=8000000")
        vm.start()
        await asyncio.sleep(0.005)
        await vm.pause()
        snapshot = vm.save()
        print(f"saved at {snapshot.now} ns: {vm.describe()}")
        snapshot_file.write(FILE, snapshot)
        digest = watch(host)
        vm.resume()
        outcome = await vm.finished()
    host.trace.close()
    print(f"the saved machine ends at {outcome.now} ns, trace {digest.hexdigest()}")
    return digest.hexdigest()


async def restored() -> str:
    """The same from the file."""
    snapshot = snapshot_file.read(FILE)
    host = Host(pcpus=2)
    digest = watch(host)
    async with Vm.restore(host, snapshot) as vm:
        kvm = vm.vcpus[0].get_regs()
        print(f"restored with RIP {kvm.rip:#x}, RFLAGS {kvm.rflags:#x}, CR3 {vm.vcpus[0].get_sregs().cr3:#x}")
        outcome = await vm.run()
    host.trace.close()
    print(f"the restored one ends at {outcome.now} ns, trace {digest.hexdigest()}")
    return digest.hexdigest()


print("the same future:", run(saved()) == run(restored()))
FILE.unlink()
FILE.parent.rmdir()
