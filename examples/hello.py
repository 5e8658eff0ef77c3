"""A guest with three vCPUs on one physical CPU says hello, in virtual time."""

from aiovm import guests
from aiovm.loop import Host, run
from aiovm.vm import Vm


async def main() -> None:
    host = Host(pcpus=1)
    async with Vm(host, vcpus=3, console=lambda data: print(data.decode(), end="")) as vm:
        vm.load(guests.path("hello").read_bytes())
        outcome = await vm.run()
    print(f"ended by {outcome.reason}, status {outcome.status}")


run(main())
