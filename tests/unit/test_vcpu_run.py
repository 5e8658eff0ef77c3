"""KVM_RUN's beginnings and ends: one runner at a time, and a runner that is cancelled leaves nothing behind."""

import asyncio

import pytest

from aiovm.exits import Interrupted
from aiovm.loop import Host, run
from aiovm.policy import by_name
from aiovm.policy.thread import ThreadState
from aiovm.requests import VcpuMode
from aiovm.vcpu import MpState
from aiovm.vm import Vm

SLEEP = bytes.fromhex("fa f4 ebfd")  # cli; again: hlt; jmp again
SPIN = bytes.fromhex("ebfe")  # jmp to itself


def machine(host, code):
    vm = Vm(host, memory=1 << 20)
    vm.load(code)
    return vm, vm.vcpus[0]


async def cancelled(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_vcpu_that_was_cancelled_asleep_is_not_woken_onto_a_cpu():
    async def main():
        host = Host(1)
        vm, vcpu = machine(host, SLEEP)
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.01)
        assert (vcpu.mp_state, vcpu.blocking) == (MpState.HALTED, True)
        await cancelled(task)
        vcpu.pv_unhalt()
        await asyncio.sleep(0.01)
        assert (vcpu.blocking, vcpu.thread.state, host.pcpus[0].current) == (False, ThreadState.BLOCKED, None)
        # The kick was not lost: the next run goes on at once, and sleeps again at the next HLT.
        halts = vcpu.stat.halt_exits
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.01)
        assert vcpu.stat.halt_exits == halts + 1
        await cancelled(task)
        vm.close()

    run(main())


def test_a_vcpu_that_was_cancelled_in_guest_mode_is_outside():
    async def main():
        host = Host(1)
        vm, vcpu = machine(host, SPIN)
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.0105)
        assert vcpu.mode is VcpuMode.IN_GUEST
        await cancelled(task)
        assert (vcpu.mode, vcpu.thread.state, host.pcpus[0].current) == (VcpuMode.OUTSIDE, ThreadState.BLOCKED, None)
        vm.close()

    run(main())


def test_a_vcpu_that_was_cancelled_while_it_waited_for_a_cpu_leaves_the_queue():
    async def main():
        host = Host(1)
        (vm, first), (other, second) = machine(host, SPIN), machine(host, SPIN)
        running = asyncio.create_task(first.run())
        await asyncio.sleep(0.001)
        waiting = asyncio.create_task(second.run())
        await asyncio.sleep(0.000_1)
        assert second.thread.state is ThreadState.READY
        await cancelled(waiting)
        assert host.pcpus[0].queue == []
        assert host.pcpus[0].current is first.thread
        await cancelled(running)
        vm.close()
        other.close()

    run(main())


def test_a_second_runner_waits_for_the_first():
    async def main():
        host = Host(1)
        vm, vcpu = machine(host, SPIN)
        first = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        second = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        assert vcpu.pid is first
        vcpu.immediate_exit = True
        assert await first == Interrupted()
        await asyncio.sleep(0.001)
        assert vcpu.pid is second
        assert not second.done()
        await cancelled(second)
        vm.close()

    run(main())


def test_immediate_exit_ends_a_sleep():
    async def main():
        host = Host(1)
        vm, vcpu = machine(host, SLEEP)
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.01)
        vcpu.immediate_exit = True
        vcpu.kick()
        assert await task == Interrupted()
        assert vcpu.stat.signal_exits == 1
        assert host.pcpus[0].load == 0
        vm.close()

    run(main())


def test_a_signal_ends_a_run_until_it_is_taken():
    async def main():
        vm, vcpu = machine(Host(1), SLEEP)
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.01)
        vcpu.send_signal(10)
        assert await task == Interrupted()
        assert await vcpu.run() == Interrupted(), "it is still pending"
        assert vcpu.take_signals() == [10]
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.01)
        assert not task.done()
        await cancelled(task)
        vm.close()

    run(main())


def test_the_mask_holds_signals_back_and_nothing_holds_a_cancellation():
    async def main():
        vm, vcpu = machine(Host(1), SPIN)
        vcpu.set_signal_mask({10, 12})
        assert (vcpu.sigset_active, vcpu.sigset) == (True, {10, 12})
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        vcpu.send_signal(12)
        vcpu.send_signal(10)
        await asyncio.sleep(0.01)
        assert not task.done()
        vcpu.send_signal(15)
        assert await task == Interrupted()
        assert vcpu.take_signals() == [10, 12, 15]
        vcpu.send_signal(10)
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        vcpu.set_signal_mask(None)
        vcpu.kick()
        assert await task == Interrupted()
        vcpu.set_signal_mask({10})
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        await cancelled(task)
        vm.close()

    run(main())


@pytest.mark.parametrize(
    ("pcpus", "vcpus", "at_ms", "caller", "target", "won"),
    [
        (1, 2, 2.5, 0, 1, 1),
        (1, 2, 2.5, 0, 0, 0),  # itself
        (1, 2, 0.5, 0, 1, 0),  # the target was not preempted yet
        (2, 3, 2.5, 1, 2, 0),  # nobody else wants the caller's CPU
    ],
)
def test_a_guests_own_yield_goes_to_who_was_preempted(pcpus, vcpus, at_ms, caller, target, won):
    """``kvm_sched_yield`` (arch/x86/kvm/x86.c of Linux 6.16); slices of 1 ms, the first vCPU's first."""

    async def main():
        policy = by_name("round-robin", slice_ns=1_000_000, jitter=0)
        vm = Vm(Host(pcpus, policy=policy), vcpus=vcpus, memory=1 << 20)
        vm.load(SPIN)
        for vcpu in vm.vcpus:
            vcpu.context.state.rip, vcpu.mp_state = vm.vcpus[0].context.state.rip, MpState.RUNNABLE
        tasks = [asyncio.create_task(vcpu.run()) for vcpu in vm.vcpus]
        await asyncio.sleep(at_ms / 1000)
        source = vm.vcpus[caller]
        assert source.thread.state is ThreadState.RUNNING
        source.sched_yield_to(target)
        assert (source.stat.directed_yield_attempted, source.stat.directed_yield_successful) == (1, won)
        for task in tasks:
            await cancelled(task)
        vm.close()

    run(main())
