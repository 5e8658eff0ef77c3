"""Save at any moment, under any overcommit: the restored machine's future is the saved one's, record by record."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm import guests, snapshot_file
from aiovm.loop import Host, run
from aiovm.policy import by_name
from aiovm.trace import ListSink
from aiovm.vm import Vm

LOCKS = guests.path("locks").read_bytes()


async def end(vm, host, said, ending):
    sink, begin = ListSink(), len(said)
    host.trace.add(sink)
    outcome = await ending(vm)
    host.trace.flush()
    states = [(v.get_regs(), v.get_sregs(), v.get_fpu(), v.get_lapic(), v.stat) for v in vm.vcpus]
    return outcome, bytes(said[begin:]), sink.records, states


@settings(max_examples=12, deadline=None)
@given(
    vcpus=st.integers(1, 4),
    pcpus=st.integers(1, 4),
    lock=st.sampled_from(["tas", "ticket", "pvticket", "mcs", "qspinlock", "pvqspinlock"]),
    when=st.integers(0, 3_000_000),
    again=st.integers(0, 1_000_000),
    policy=st.sampled_from(["fair", "round-robin", "random", "gang"]),
    seed=st.integers(0, 1000),
)
def test_the_future_is_the_same(vcpus, pcpus, lock, when, again, policy, seed):
    def host():
        return Host(pcpus, policy=by_name(policy, slice_ns=500_000), seed=seed)

    async def first():
        said, h = bytearray(), host()
        async with Vm(h, vcpus=vcpus, memory=8 << 20, console=said.extend) as vm:
            vm.load(LOCKS, cmdline=f"lock={lock} cpus={vcpus} duration=1500000")
            vm.start()
            for pause in (when, again):  # the second save is of a machine that was paused before
                await asyncio.sleep(pause / 1e9)
                if vm.life.value == "ended":
                    return None
                await vm.pause()
                snapshot = vm.save()
                vm.resume()
            return snapshot_file.pack(snapshot), await end(vm, h, said, Vm.finished)

    async def second(data):
        said, h = bytearray(), host()
        async with Vm.restore(h, snapshot_file.unpack(data), console=said.extend) as vm:
            return await end(vm, h, said, Vm.run)

    found = run(first())
    if found is not None:
        data, future = found
        assert run(second(data)) == future
