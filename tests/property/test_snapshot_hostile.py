"""Hostile guests (``machine_fuzz``) saved at random moments: their restored machines do the same, to the byte."""

import asyncio
import random

import pytest
from machine_fuzz import _prepare, _rings

from aiovm import snapshot_file
from aiovm.backends import Entropy
from aiovm.errors import GuestError, StallError, StateError
from aiovm.loop import Host, run
from aiovm.trace import ListSink
from aiovm.vm import Vm

LIMIT_NS = 300_000
RAM = 4 << 20


async def end(vm, running):
    """Everything that happens from now on, and how the machine is left."""
    sink = ListSink()
    vm.trace.add(sink)
    task = asyncio.ensure_future(running)
    vm.clock.call_at(LIMIT_NS, task.cancel)
    try:
        how = (await task).reason
    except asyncio.CancelledError:
        how = "limit"
    except (GuestError, StallError) as error:
        how = repr(error)
    vm.trace.flush()
    left = [(v.get_regs(), v.get_sregs(), v.get_fpu(), v.apic.save(), v.stat) for v in vm.vcpus]
    return how, sink.records, left, vm.memory.read(0, RAM)


async def first(seed):
    rng = random.Random(seed)
    vcpus = rng.choice((1, 2, 3))
    pcpus = rng.randint(1, vcpus)
    async with Vm(Host(pcpus, seed=seed), vcpus=vcpus, memory=RAM, virtio=(Entropy(), Entropy())) as vm:
        vm.load(b"\xf4", kind="flat")
        for vcpu in vm.vcpus:
            _prepare(vm, vcpu, rng)
        _rings(vm, rng)
        running = asyncio.ensure_future(vm.run())
        await asyncio.sleep(rng.randrange(100_000) / 1e9)
        try:
            await vm.pause()
        except StateError:  # it ended before
            await asyncio.wait([running])
            running.exception()
            return None
        data = snapshot_file.pack(vm.save())
        vm.resume()
        return pcpus, data, await end(vm, running)


async def second(seed, pcpus, data):
    virtio = (Entropy(), Entropy())
    async with Vm.restore(Host(pcpus, seed=seed), snapshot_file.unpack(data), virtio=virtio) as vm:
        return await end(vm, vm.run())


@pytest.mark.parametrize("seed", range(6))
def test_the_same_mischief_twice(seed):
    found = run(first(seed))
    if found is not None:
        pcpus, data, future = found
        assert run(second(seed, pcpus, data)) == future
