"""A service runs strangers' guests: one host for all, a deadline and a limit of output each, one told to stop.

In virtual time here, so that the output repeats. To serve, say ``aiovm.run_wall``, or await it in a loop of yours.
"""

import asyncio

import aiovm
from aiovm import guests

GUESTS = {
    "hello": guests.path("hello").read_bytes(),
    "hangs": bytes.fromhex("fa ebfe"),  # cli; jmp $
    "halts": bytes.fromhex("fa f4"),  # cli; hlt
    "floods": bytes.fromhex("baf803 b061 ee ebfd"),  # mov dx, 0x3f8; mov al, 'a'; out dx, al; jmp
    "faults": bytes.fromhex("0f011e077c 0f0b 000000000000"),  # lidt [0x7c07]; ud2; a table of one byte
    "cancelled": bytes.fromhex("ebfe"),  # jmp $
}
MOST_OUTPUT = 1000


class TooMuchOutput(Exception):
    pass


class Output(bytearray):
    def add(self, data: bytes) -> None:
        """The machine's console. On the wall clock it is called in the machine's thread; what it raises, run() does."""
        self.extend(data)
        if len(self) > MOST_OUTPUT:
            raise TooMuchOutput


async def serve(host: aiovm.Host, slots: asyncio.Semaphore, image: bytes) -> str:
    output = Output()
    async with slots, aiovm.Vm(host, vcpus=2, memory="16M", console=output.add) as vm:
        vm.load(image)
        try:
            async with asyncio.timeout(0.1):
                outcome = await vm.run()
        except TimeoutError:
            return "too slow"
        except TooMuchOutput:
            return "says too much"
        except aiovm.GuestError as error:
            return f"{type(error).__name__} at {error.rip:#x}"
        return f"{outcome.reason}, status {outcome.status}, {len(output)} bytes"


async def main() -> None:
    host = aiovm.Host(pcpus=2)  # however many machines there are, two vCPUs run at a time
    slots = asyncio.Semaphore(4)  # and four machines have memory
    tasks = {name: asyncio.create_task(serve(host, slots, image)) for name, image in GUESTS.items()}
    asyncio.get_running_loop().call_later(0.05, tasks["cancelled"].cancel)
    for name, answer in zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True):
        print(f"{name}: {answer!r}")


aiovm.run(main())
