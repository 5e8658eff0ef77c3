"""A kick is never lost, wherever it falls: before the waiter's test, between its test and its HLT, after its HLT.

Two CPUs take turns and sleep meanwhile with interrupts off. A lost kick leaves both asleep for ever, and the virtual
loop says so (``DeadlockError``).
"""

import re
import struct

import pytest

from aiovm import guests
from aiovm.loop import Host, run
from aiovm.policy import POLICIES, by_name
from aiovm.trace import Tracer
from aiovm.vm import Vm

MP_STATE, HALTED = 12, 3


class Sleeps:
    """Counts how often a vCPU fell asleep."""

    def __init__(self):
        self.count = 0

    def write(self, batch):
        self.count += sum(kind == MP_STATE and a == HALTED for _, kind, _, a, _ in struct.iter_unpack("=5q", batch))

    def close(self):
        pass


def race(rounds, jitter, *, pcpus=2, policy="fair", seed=0, halt_poll_ns=200_000):
    """Kicks before the test, between test and HLT, and after the HLT: how many rounds each decided."""
    said, sleeps, tracer = bytearray(), Sleeps(), Tracer()
    tracer.add(sleeps)

    async def main():
        host = Host(pcpus, policy=by_name(policy, slice_ns=1_000_000), seed=seed, trace=tracer)
        async with Vm(host, vcpus=2, memory=16 << 20, console=said.extend, halt_poll_ns=halt_poll_ns) as vm:
            cmdline = f"rounds={rounds} jitter={jitter} seed={seed}"
            vm.load(guests.path("kickrace").read_bytes(), cmdline=cmdline)
            outcome = await vm.run()
            return outcome.status, [vcpu.stat.kicks for vcpu in vm.vcpus]

    status, kicks = run(main())
    tracer.close()
    assert status == 1
    assert kicks == [rounds, rounds]
    finished, halts, before, old = map(int, re.findall(r"\d+", said.decode()))
    assert finished == rounds
    # An HLT that did not sleep had its kick already: a stale one, after which the waiter halts again, or this round's.
    between = halts - sleeps.count - old
    assert before + between + sleeps.count == 2 * rounds
    return before, between, sleeps.count


@pytest.mark.timeout(600)  # a busy machine is slow, not stuck
def test_a_hundred_thousand_rounds():
    before, between, after = race(100_000, 5_000)
    assert before > 10_000
    assert between > 10_000
    assert after > 10_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("jitter", [4_000, 20_000])
def test_under_several_jitters(jitter, seed):
    assert min(race(4_000, jitter, seed=seed)) > 100


@pytest.mark.parametrize("jitter", [0, 300])
def test_with_hardly_any_jitter(jitter):
    """A wake-up takes longer than the delays: no kick comes before the test, but for the first."""
    before, _, after = race(4_000, jitter)
    assert before <= 1
    assert after > 100


@pytest.mark.parametrize("halt_poll_ns", [0, 2_000])
def test_without_and_with_short_polls(halt_poll_ns):
    assert min(race(4_000, 5_000, halt_poll_ns=halt_poll_ns)) > 100


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pcpus", [1, 2])
def test_under_each_policy(policy, pcpus):
    _, between, after = race(2_000, 8_000, pcpus=pcpus, policy=policy)
    assert between + after > 100
