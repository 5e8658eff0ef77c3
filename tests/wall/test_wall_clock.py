"""The same machines on the wall clock, on asyncio's loop and on uvloop: what happens, not how fast."""

import asyncio
import gc
import importlib.util
import os
import re
import threading
import time

import pytest

from aiovm import guests
from aiovm.clock import WallClock
from aiovm.engine.unicorn.context import UnicornContext
from aiovm.errors import TripleFault
from aiovm.loaders import apply
from aiovm.loop import Host, run_wall
from aiovm.policy.thread import ThreadState
from aiovm.vcpu import MpState
from aiovm.vm import Vm
from aiovm.vm_life import LifeState

pytestmark = pytest.mark.wall

NEVER_END = bytes.fromhex("ebfe")  # jmp $
HALT_FOR_EVER = bytes.fromhex("fa f4")  # cli; hlt
NO_IDT = bytes.fromhex("0f011e077c 0f0b 000000000000")  # lidt [0x7c07]; ud2; a table of one byte
SAY_X = bytes.fromhex("baf803 b078 ee ebfe")  # mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $
OUT_FOR_EVER = bytes.fromhex("e680 ebfc")  # out 0x80, al; jmp
CPUID_FOR_EVER = bytes.fromhex("0fa2 ebfc")  # cpuid; jmp
#: mov word [0x80], 0x7c10; mov [0x82], cs; int 32; jmp; an iret at 0x7c10.
INT_FOR_EVER = bytes.fromhex("c7068000107c 8c0e8200 cd20 ebfc 9090 cf")
#: Waits for a byte on the serial port, sends it back and ends.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee b000 e6f4")


@pytest.fixture(
    params=[
        asyncio.run,
        pytest.param(
            run_wall, marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="no uvloop")
        ),
    ],
    ids=["asyncio", "uvloop"],
)
def run(request):
    return request.param


def play(run, name, cmdline="", *, vcpus, pcpus=None):
    """A guest's process status and the lines that it printed."""
    said = bytearray()

    async def main():
        host = Host(pcpus or vcpus)
        assert isinstance(host.clock, WallClock)
        async with Vm(host, vcpus=vcpus, memory=16 << 20, console=said.extend) as vm, asyncio.timeout(60):
            vm.load(guests.path(name).read_bytes(), cmdline=cmdline)
            return (await vm.run()).status

    return run(main()), said.decode().split("\r\n")[:-1]


def workers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("aiovm")]


# ---- guests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_hello(run, vcpus):
    status, lines = play(run, "hello", vcpus=vcpus)
    assert (status, lines) == (1, [f"hello from vCPU {cpu} of {vcpus}" for cpu in range(vcpus)])


@pytest.mark.parametrize("mode", ["oneshot", "periodic", "deadline"])
def test_ticks_come_in_order(run, mode):
    status, lines = play(run, "ticks", f"mode={mode} n=4 period=2000", vcpus=1)
    assert status == 1
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3"]
    times = [int(line.split()[3]) for line in lines]
    assert times == sorted(times)
    if mode == "deadline":
        assert all(time >= 2000 * (number + 1) for number, time in enumerate(times)), "never early"


@pytest.mark.parametrize("lock", ["tas", "ticket", "pvticket", "pvqspinlock"])
@pytest.mark.parametrize(("vcpus", "pcpus"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_locks_exclude(run, lock, vcpus, pcpus):
    status, lines = play(run, "locks", f"lock={lock} cpus={vcpus} duration=10000000", vcpus=vcpus, pcpus=pcpus)
    assert status == 1
    assert re.fullmatch(rf"{lock}: {vcpus} CPUs, \d+ operations, 0 lost", lines[-1])


@pytest.mark.parametrize("pcpus", [1, 2])
def test_no_kick_is_lost(run, pcpus):
    """Each vCPU wakes while its sibling's slice may run, 300 times: its state must not be touched before that ends."""
    status, lines = play(run, "kickrace", "rounds=300", vcpus=2, pcpus=pcpus)
    assert status == 1
    assert lines[-1].startswith("kickrace: 300 rounds, ")


@pytest.mark.parametrize("vcpus", [2, 4])
def test_interrupts_between_cpus(run, vcpus):
    status, lines = play(run, "ipi", f"mode=all cpus={vcpus} rounds=20", vcpus=vcpus)
    assert (status, lines) == (1, [f"vCPU {cpu} received 20" for cpu in range(vcpus)])


# ---- the loop -----------------------------------------------------------------------------------------------------


def test_two_machines_on_one_host(run):
    """Of which one ends while the other goes on."""

    async def main():
        host = Host(2)
        first, second = bytearray(), bytearray()
        async with (
            asyncio.timeout(60),
            Vm(host, vcpus=2, memory=16 << 20, console=first.extend) as one,
            Vm(host, vcpus=2, memory=16 << 20, console=second.extend) as other,
        ):
            one.load(guests.path("hello").read_bytes())
            other.load(guests.path("locks").read_bytes(), cmdline="lock=pvticket cpus=2 duration=20000000")
            outcomes = await asyncio.gather(one.run(), other.run())
        return outcomes, first.decode(), second.decode()

    outcomes, first, second = run(main())
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert first == "hello from vCPU 0 of 2\r\nhello from vCPU 1 of 2\r\n"
    assert second.endswith(", 0 lost\r\n")


def test_a_heartbeat_keeps_beating(run):
    """A guest that never waits does not hold up the loop; nor do two of them."""

    async def main():
        host = Host(2)
        beats = 0
        async with Vm(host, memory=1 << 20) as one, Vm(host, memory=1 << 20) as other:
            running = []
            for vm in (one, other):
                vm.load(NEVER_END)
                running.append(asyncio.create_task(vm.run()))
            async with asyncio.timeout(60):
                while one.vcpus[0].stat.exits < 20 or other.vcpus[0].stat.exits < 20:
                    await asyncio.sleep(0.001)
                    beats += 1
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return beats

    assert run(main()) >= 5


@pytest.mark.parametrize("code", [OUT_FOR_EVER, INT_FOR_EVER, CPUID_FOR_EVER], ids=["out", "int", "cpuid"])
def test_answers_do_not_make_a_slice_long(run, code, monkeypatch):
    """While Python answers, the slice's thread holds the interpreter, and the loop gets it at the slice's end for sure.
    In CPU time, which a busy machine does not stretch; a slice that charged nothing for answers would take seconds."""
    spent = []
    run_slice = UnicornContext.run

    def timed(context, limit):
        begin = time.thread_time_ns()
        exit_ = run_slice(context, limit)
        spent.append(time.thread_time_ns() - begin)
        return exit_

    monkeypatch.setattr(UnicornContext, "run", timed)

    async def main():
        async with Vm(Host(4), vcpus=4, memory=1 << 20) as vm, asyncio.timeout(60):
            image = vm.load(code)
            for vcpu in vm.vcpus[1:]:
                apply(image.entry, vcpu.context.state)
                vcpu.set_mp_state(MpState.RUNNABLE)
            vm.start()
            while len(spent) < 12:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.001)
            vm.stop()
            await vm.finished()

    run(main())
    assert max(spent) < 50_000_000


@pytest.mark.parametrize("vcpus", [1, 4])
def test_waiting_for_a_siblings_slice_is_steal_time(run, vcpus):
    """One core executes a machine, so at any time all of its vCPUs wait but one; the guest's record says so."""
    record = 0x2000

    async def main():
        async with Vm(Host(vcpus), vcpus=vcpus, memory=1 << 20) as vm, asyncio.timeout(60):
            image = vm.load(NEVER_END)
            for vcpu in vm.vcpus:
                vcpu.set_msrs({0x4B564D03: record + 0x40 * vcpu.index | 1})
                apply(image.entry, vcpu.context.state)
                vcpu.set_mp_state(MpState.RUNNABLE)
            begin = vm.clock.now()
            vm.start()
            while min(vcpu.stat.exits for vcpu in vm.vcpus) < 40:  # noqa: ASYNC110  (however busy the machine is)
                await asyncio.sleep(0.01)
            vm.stop()
            await vm.finished()
            elapsed = vm.clock.now() - begin
            told = [vm.memory.read_u(record + 0x40 * n, 8) for n in range(vcpus)]
            return [steal / elapsed for steal in told]

    steal = run(main())
    if vcpus == 1:
        assert steal == [0]
    else:
        assert all(0.5 < share < 1 for share in steal)
        assert 2 < sum(steal) <= 3.1


@pytest.mark.parametrize("code", [NEVER_END, HALT_FOR_EVER], ids=["running", "halted"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_cancellation_leaves_nothing_behind(run, code, vcpus):
    async def main():
        host = Host(1)
        async with Vm(host, vcpus=vcpus, memory=1 << 20) as vm:
            vm.load(code)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.03):
                    await vm.run()
            assert vm.life is LifeState.ENDED
            assert all(vcpu.thread.state is ThreadState.BLOCKED for vcpu in vm.vcpus)
            assert host.pcpus[0].current is None
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
    assert workers() == []


def test_cancelled_twice_in_mid_slice(run):
    """The slice's thread is waited for all the same."""

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(NEVER_END)
            vcpu = vm.vcpus[0]
            task = asyncio.create_task(vcpu.run())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await vm.between_slices()
            return vcpu.context.state.rip

    assert run(main()) == 0x7C00
    assert workers() == []


@pytest.mark.parametrize("turns", range(5))
def test_a_machine_cancelled_twice_still_ends_and_closes(run, turns):
    """A deadline, then the loop's end or a TaskGroup's: the second comes while the vCPUs are waited for."""

    async def main():
        vm = Vm(Host(1), vcpus=2, memory=1 << 20)

        async def serve():
            async with vm:
                vm.load(NEVER_END)
                await vm.run()

        task = asyncio.create_task(serve())
        await asyncio.sleep(0.01)
        for _ in range(2):
            task.cancel()
            for _ in range(turns):
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert vm.life is LifeState.CLOSED
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
    assert workers() == []


def test_a_guest_that_ends_itself_badly(run):
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(NO_IDT)
            with pytest.raises(TripleFault, match="vCPU 0, RIP 0x7c05"):
                await vm.run()

    run(main())
    assert workers() == []


def test_an_error_of_the_embedding_program_comes_out_of_run(run):
    class Full(Exception):
        pass

    def console(_data):
        raise Full

    async def main():
        async with Vm(Host(1), memory=1 << 20, console=console) as vm:
            vm.load(SAY_X)
            with pytest.raises(Full):
                await vm.run()

    run(main())
    assert workers() == []


def test_typed_input_reaches_a_guest_that_never_waits(run):
    said = bytearray()

    async def main():
        async with Vm(Host(1), memory=1 << 20, console=said.extend) as vm, asyncio.timeout(60):
            vm.load(ECHO)
            asyncio.get_running_loop().call_later(0.01, vm.feed_console, b"q")
            return (await vm.run()).status

    assert run(main()) == 1
    assert said == b"q"


def test_waiting_for_words_stops_no_slice(run):
    async def main():
        async with Vm(Host(1), memory=1 << 20, wall_slice_ns=10**12) as vm:
            vm.load(SAY_X, kind="flat")
            vm.start()
            await vm.expect("x", timeout=10)
            assert vm.vcpus[0].stat.exits == 0
            vm.stop()
            await vm.finished()

    run(main())


def test_a_callback_that_raises_does_not_stop_the_others(run):
    async def main():
        loop = asyncio.get_running_loop()
        reported = []
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        clock, rung = WallClock(), asyncio.Event()
        clock.call_at(0, lambda: 1 // 0)
        clock.call_at(0, rung.set)
        async with asyncio.timeout(60):
            await rung.wait()
        return reported

    (error,) = run(main())
    assert isinstance(error, ZeroDivisionError)


def test_hosts_that_are_gone_leave_no_descriptor(run):
    """Each has a timer of the kernel's; the loop, which lives on, must not keep it."""

    async def descriptors():
        gc.collect()
        await asyncio.sleep(0.01)  # a descriptor is closed in a turn of the loop
        return len(os.listdir("/proc/self/fd"))

    async def main():
        before = await descriptors()
        for _ in range(20):
            async with Vm(Host(1), memory=1 << 20) as vm:
                vm.load(NEVER_END)
                vm.start()
                await asyncio.sleep(0)
        vm = None
        assert await descriptors() <= before + 1

    run(main())


def test_who_changes_memory_again_and_again_never_waits_for_a_whole_slice(run):
    """The second call comes when no slice runs that could be kicked; the next slice is then a short one."""
    budgets = []

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            call = vm._worker.call
            vm._worker.call = lambda slice_, limit, kick: (
                budgets.append(limit - vm.cells[0]) or call(slice_, limit, kick)
            )
            vm.load(NEVER_END)
            vm.start()
            await asyncio.sleep(0.01)
            await vm.between_slices()
            del budgets[:]
            for _ in range(5):
                await vm.between_slices()

    run(main())
    assert len(budgets) >= 4
    assert max(budgets[:4]) <= 100_000
