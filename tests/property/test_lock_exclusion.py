"""Every lock excludes, and nobody waits for ever, however the vCPUs are interleaved."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm import guests
from aiovm.costs import Costs
from aiovm.locks.layout import LOCKS, LockLayout
from aiovm.loop import Host, run
from aiovm.vm import Vm

IMAGE = guests.path("locks").read_bytes()
LAYOUT = LockLayout.from_elf(IMAGE)


@settings(max_examples=40, deadline=None)
@given(
    lock=st.sampled_from([lock for lock in LOCKS if lock != "broken"]),
    vcpus=st.integers(1, 8),
    pcpus=st.integers(1, 8),
    quantum_ns=st.sampled_from([100, 500, 2000]),
    spin=st.sampled_from([1, 5, 50, 300]),
    think=st.sampled_from([0, 500, 5000]),
    hold=st.sampled_from([0, 200, 1000]),
    nlocks=st.sampled_from([1, 2, 64]),
    seed=st.integers(0, 2**64 - 1),
)
def test_no_update_is_lost(lock, vcpus, pcpus, quantum_ns, spin, think, hold, nlocks, seed):
    async def main():
        host = Host(pcpus, costs=Costs(quantum_ns=quantum_ns))
        async with Vm(host, vcpus=vcpus, memory=16 << 20) as vm:
            cmdline = (
                f"lock={lock} cpus={vcpus} spin={spin} think={think} hold={hold} nlocks={nlocks} seed={seed}"
                " duration=200000"
            )
            vm.load(IMAGE, name="locks", cmdline=cmdline)
            outcome = await vm.run()
            return outcome.status, LAYOUT.read(vm.memory.read)

    status, results = run(main())
    assert (status, results.lost) == (1, 0)
    assert results.operations == sum(results.done) == results.waits.total
