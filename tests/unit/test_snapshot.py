"""A machine as a value: pause, save, restore; and that the restored machine's future is the saved one's."""

import asyncio
from dataclasses import fields, replace

import pytest
from bare import CODE, DATA, prepare

from aiovm import guests
from aiovm.backends import ConsolePort, Entropy, UserNet
from aiovm.clock import VirtualClock
from aiovm.costs import Costs
from aiovm.engine.base import ContextState
from aiovm.errors import ConfigError, GuestError, StateError
from aiovm.loop import Host, run, run_wall
from aiovm.memory import SlotFlags
from aiovm.policy import POLICIES, by_name
from aiovm.trace import ListSink
from aiovm.vcpu_snapshot import ThreadAccount, VcpuSnapshot
from aiovm.vm import Vm
from aiovm.vm_life import LifeState

#: mov al, 0; out 0xf4, al
CODE_THAT_ENDS = bytes.fromhex("b000 e6f4")


class Future:
    """What a machine does from now on."""

    def __init__(self, host, said):
        self._sink = ListSink()
        self._host = host
        self._said = said
        self._from = len(said)
        host.trace.add(self._sink)

    async def of(self, ending):
        try:
            outcome = await ending
        except GuestError as error:
            outcome = repr(error)
        self._host.trace.flush()
        return outcome, bytes(self._said[self._from :]), self._sink.records


def saved_and_future(image, when, *, vcpus=1, pcpus=1, policy="fair", **options):
    """Run a guest, save it at ``when`` (ns); the snapshot and what came after it."""

    async def main():
        said = bytearray()
        host = Host(pcpus, policy=by_name(policy, slice_ns=1_000_000), seed=7)
        async with Vm(host, vcpus=vcpus, memory=8 << 20, console=said.extend) as vm:
            vm.load(image, **options)
            vm.start()
            await asyncio.sleep(when / 1e9)
            await vm.pause()
            snapshot = vm.save()
            future = Future(host, said)
            vm.resume()
            return snapshot, await future.of(vm.finished())

    return run(main())


def future_of(snapshot, *, pcpus=1, policy="fair", clock=None, **paths):
    """The future of a restored machine."""

    async def main():
        said = bytearray()
        host = Host(pcpus, policy=by_name(policy, slice_ns=1_000_000), seed=7)
        future = Future(host, said)
        async with Vm.restore(host, snapshot, console=said.extend, **paths) as vm:
            return await future.of(vm.run())

    return run(main(), clock=clock)


def guest(name):
    return guests.path(name).read_bytes()


@pytest.mark.parametrize("when", [0, 1_000_003, 6_543_210])
def test_ticks_go_on(when):
    snapshot, future = saved_and_future(guest("ticks"), when, vcpus=2)
    assert snapshot.now >= when
    assert future_of(snapshot) == future
    assert len(future[2]) > 100


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_goes_on(policy):
    cmdline = "lock=pvticket cpus=4 duration=4000000"
    snapshot, future = saved_and_future(guest("locks"), 2_345_678, vcpus=4, pcpus=2, policy=policy, cmdline=cmdline)
    assert future_of(snapshot, pcpus=2, policy=policy) == future


@pytest.mark.parametrize("paths", [{"native": False}, {"pointers": False}], ids=["twin", "public"])
def test_every_path_of_the_engine_goes_on_alike(paths):
    cmdline = "lock=qspinlock cpus=3 duration=1000000"
    snapshot, future = saved_and_future(guest("locks"), 1_500_000, vcpus=3, pcpus=2, cmdline=cmdline)
    assert future_of(snapshot, pcpus=2, **paths) == future


def test_a_snapshot_is_restored_again_and_again():
    snapshot, future = saved_and_future(guest("ipi"), 500_000, vcpus=2, pcpus=2)
    assert future_of(snapshot, pcpus=2) == future
    assert future_of(snapshot, pcpus=2) == future


def test_one_program_goes_back_again_and_again():
    snapshot, future = saved_and_future(guest("ticks"), 1_500_000)

    async def main():
        for _ in range(5):
            said, host = bytearray(), Host(1, seed=7, policy=by_name("fair", slice_ns=1_000_000))
            future = Future(host, said)
            async with Vm.restore(host, snapshot, console=said.extend) as vm:
                yield await future.of(vm.run())

    async def collect():
        return [found async for found in main()]

    assert run(collect()) == [future] * 5


def test_another_host_begins_its_schedule_afresh():
    cmdline = "lock=ticket cpus=4 duration=2000000"
    snapshot, future = saved_and_future(guest("locks"), 1_500_000, vcpus=4, pcpus=2, cmdline=cmdline)
    other = future_of(snapshot, pcpus=4)
    assert (other[0].reason, other[0].status) == ("debug-exit", 1)
    assert other[2] != future[2]


def test_what_a_machine_is_survives():
    async def first():
        vm = Vm(Host(1), vcpus=2, memory=2 << 20, halt_poll_ns=5, nodes=2, ple=False)
        prepare(vm, "long")
        vm.memory.set_region(7, 0x1000_0000, 0x2000, flags=SlotFlags.LOG_DIRTY)
        vm.memory.write(0x1000_1000, b"seven")
        vm.memory.write(DATA, b"data")
        vm.vcpus[0].context.state.gpr[3] = 0x1234
        vm.vcpus[1].inject_smi()
        vm.pc.ioapic.set_line(5, True)
        vm.pc.new_line(9).set(True)
        vm.life = LifeState.LOADED
        with pytest.raises(StateError, match="on its way"):
            vm.save()
        await asyncio.sleep(1e-6)
        return vm.save()

    async def second(snapshot):
        vm = Vm.restore(Host(1), snapshot)
        assert (len(vm.vcpus), vm.ram_size, vm.halt_poll_ns, vm.nodes, vm.ple) == (2, 2 << 20, 5, 2, False)
        assert vm.memory.read(DATA, 4) == b"data"
        assert vm.memory.read(0x1000_1000, 5) == b"seven"
        assert vm.vcpus[0].get_regs().rbx == 0x1234
        assert vm.pc.ioapic.save().irr == 1 << 5 | 1 << 9
        again = vm.save()
        assert vm.memory.take_dirty_log(7)[0] == 2
        vm.close()
        return again

    snapshot = run(first())
    # a wire that the program laid is the program's to lay again
    short = replace(snapshot, pc=replace(snapshot.pc, wires=snapshot.pc.wires[:-3]))
    assert run(second(short)) == short
    assert run(second(snapshot)) == short
    shorter = replace(snapshot, pc=replace(snapshot.pc, wires=snapshot.pc.wires[:-4]))
    with pytest.raises(ConfigError, match="interrupt wires"):
        run(second(shorter))


def test_time_goes_on_from_the_saved_moment():
    snapshot, _ = saved_and_future(guest("ticks"), 3_000_000)
    clock = VirtualClock(epoch_ns=5)

    async def main():
        async with Vm.restore(Host(1), snapshot) as vm:
            assert vm.clock.now() == snapshot.now
            assert vm.wall_ns() == snapshot.epoch_ns + snapshot.now
            await vm.run()

    run(main(), clock=clock)


def test_the_wall_clock_goes_on_too():
    snapshot, future = saved_and_future(guest("ticks"), 3_000_000)

    async def main():
        said = bytearray()
        async with Vm.restore(Host(1), snapshot, console=said.extend) as vm:
            assert snapshot.now <= vm.clock.now() < snapshot.now + 10**9
            outcome = await vm.run()
            return outcome.reason, outcome.status, bytes(said).count(b"\n")

    assert run_wall(main()) == ("debug-exit", 1, future[1].count(b"\n"))


def test_pause_on_the_wall_clock():
    async def main():
        async with Vm(Host(2), vcpus=2, memory=8 << 20) as vm:
            vm.load(guest("ticks"))
            vm.start()
            await asyncio.sleep(0.002)
            await vm.pause()
            assert vm.life is LifeState.PAUSED
            snapshot = vm.save()
            vm.resume()
            outcome = await vm.finished()
        async with Vm.restore(Host(2), snapshot) as vm:
            return outcome.status, (await vm.run()).status

    assert run_wall(main()) == (1, 1)


def test_a_guest_with_a_clock_is_told_that_it_was_stopped():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            prepare(vm, "long")
            vm.life = LifeState.LOADED
            vm.memory.write(CODE, bytes.fromhex("ebfe"))
            vcpu = vm.vcpus[0]
            vcpu.set_msrs({0x4B56_4D01: DATA + 1})
            vm.start()
            await asyncio.sleep(1e-4)
            assert vm.memory.read_u(DATA + 29, 1) == 1
            await vm.pause()
            snapshot = vm.save()
            vm.resume()
            await asyncio.sleep(1e-4)
            assert vm.memory.read_u(DATA + 29, 1) == 3
            vm._running.cancel()
            await asyncio.wait([vm._running])
        return snapshot

    async def again(snapshot):
        async with Vm.restore(Host(1), snapshot) as vm:
            vm.start()
            await asyncio.sleep(1e-4)
            assert vm.memory.read_u(DATA + 29, 1) == 3
            vm._running.cancel()
            await asyncio.wait([vm._running])

    run(again(run(main())))


def test_while_paused_nothing_runs_and_chips_go_on():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            prepare(vm, "long")
            vm.life = LifeState.LOADED
            vm.memory.write(CODE, bytes.fromhex("48ffc0 ebfb"))  # inc rax; jmp
            apic = vm.vcpus[0].apic
            for register, value in ((0x0F0, 0x1FF), (0x320, 0x40), (0x3E0, 0xB), (0x380, 300_000)):
                apic.mmio_write(register, 4, value, 0)
            vm.vcpus[0].arm_timer()
            vm.start()
            await asyncio.sleep(1e-4)
            await vm.pause()
            before = vm.vcpus[0].get_regs()
            await asyncio.sleep(1e-3)
            assert vm.vcpus[0].get_regs() == before
            assert apic.timer.pending
            vm.resume()
            await asyncio.sleep(1e-4)
            await vm.pause()
            assert vm.vcpus[0].get_regs().rax > before.rax
            vm._running.cancel()
            await asyncio.wait([vm._running])

    run(main())


def test_life_and_calls_that_come_at_the_wrong_time():
    async def main():
        host = Host(1)
        async with Vm(host, memory=8 << 20) as vm:
            with pytest.raises(StateError, match="new cannot pause"):
                await vm.pause()
            with pytest.raises(StateError, match="new cannot be saved"):
                vm.save()
            vm.load(guest("ticks"))
            snapshot = vm.save()
            with pytest.raises(StateError, match="loaded cannot resume"):
                vm.resume()
            vm.start()
            await asyncio.sleep(1e-3)
            with pytest.raises(StateError, match="running cannot be saved"):
                vm.save()
            await vm.pause()
            with pytest.raises(StateError, match="paused cannot pause"):
                await vm.pause()
            vm.resume()
            await vm.finished()
            with pytest.raises(StateError, match="ended cannot be saved"):
                vm.save()
            with pytest.raises(StateError, match="of its own"):
                Vm.restore(host, snapshot)

    run(main())


def test_a_guest_that_ends_first_is_not_paused():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            prepare(vm, "long")
            vm.life = LifeState.LOADED
            vm.memory.write(CODE, bytes.fromhex("90" * 2000 + "e6f4"))
            vm.start()
            await asyncio.sleep(1.6e-6)
            with pytest.raises(StateError, match="ended before"):
                await vm.pause()
            return await vm.finished()

    assert run(main()).reason == "debug-exit"


def test_a_vcpu_that_waits_for_an_answer_is_not_saved():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            prepare(vm, "long")
            vm.life = LifeState.LOADED
            vm.memory.write(CODE, bytes.fromhex("e410 e6f4"))  # in al, 0x10
            vm.claim_ports(0x10, 1)
            vcpu = vm.vcpus[0]
            await vcpu.run()
            with pytest.raises(StateError, match="waits for an answer"):
                vm.save()
            vcpu.kvm_run.data = b"\x05"
            vcpu.immediate_exit = True
            await vcpu.run()
            assert vm.save().vcpus[0].context.registers[0] == 5

    run(main())


def test_virtio_devices_come_back_with_the_same_kinds_only():
    async def saved(*backends):
        async with Vm(Host(1), memory=8 << 20, virtio=backends) as vm:
            vm.load(guest("ticks"))
            return vm.save()

    async def restored(snapshot, *backends):
        try:
            async with Vm.restore(Host(1), snapshot, virtio=backends) as vm:
                return vm.save()
        finally:
            for backend in backends:
                await backend.aclose()

    snapshot = run(saved(Entropy(), ConsolePort(columns=99)))
    assert run(restored(snapshot, Entropy(), ConsolePort())) == snapshot
    with pytest.raises(ConfigError, match="has 2 virtio devices, not 0"):
        run(restored(snapshot))
    with pytest.raises(ConfigError, match="another kind"):
        run(restored(snapshot, ConsolePort(), Entropy()))
    with pytest.raises(ConfigError, match="a virtio UserNet cannot be saved"):
        run(saved(UserNet()))


def test_the_programs_own_lines_come_back_with_their_levels():
    async def save():
        async with Vm(Host(1), memory=1 << 20) as vm:
            _low, high = vm.pc.new_line(20), vm.pc.new_line(5)
            vm.load(CODE_THAT_ENDS)
            high.set(True)
            await asyncio.sleep(0.001)  # the 8259's word is on its way
            return vm.save()

    async def restore(snapshot):
        async with Vm.restore(Host(1), snapshot) as vm:
            low, high = vm.pc.new_line(20), vm.pc.new_line(5)
            assert (low.level, high.level) == (False, True)
            assert vm.pc.ioapic.save().irr >> 5 & 1
            assert vm.save().pc == snapshot.pc
            high.set(False)
            assert not vm.pc.ioapic.save().irr >> 5 & 1, "the same source of the same pin"
            assert not vm.pc.new_line(20).level
            return (await vm.run()).status

    assert run(restore(run(save()))) == 1


def test_hosts_that_cannot_take_it():
    snapshot, _ = saved_and_future(guest("ticks"), 1_000_000)

    async def restore(host, changed):
        Vm.restore(host, changed)

    async def main():
        with pytest.raises(ConfigError, match="engine"):
            Vm.restore(Host(1), replace(snapshot, engine="other"))
        with pytest.raises(ConfigError, match="kHz"):
            Vm.restore(Host(1, costs=Costs(tsc_khz=3_000_000)), snapshot)
        asyncio.get_running_loop().call_later(1, int)
        with pytest.raises(StateError, match="clock cannot be set"):
            Vm.restore(Host(1), snapshot)

    run(main())


#: What a snapshot need not hold: made with the machine, derived from what is held, empty at rest, or the program's.
MADE = {
    "vcpu": "vm index vcpu_id apic context events pv steal ple port thread tsc requests stat _history _runs_ahead",
    "derived": "eff_db _timer _poll",
    "at rest": "mode blocking answering _polling mutex wq pid mmio",
    "program's": "kvm_run sigpending sigset sigset_active _immediate_exit _interrupted",
    "hooks": "on_sched_out on_slice lock_probe",
}
MADE_CONTEXT = (
    "engine index port buffer address state _stored map_generation stepping watching accesses answers tsc delivered"
)
MADE_THREAD = "number group notifier alarm state resched"


def test_whatever_a_vcpu_gets_is_saved_or_named_here():
    """An attribute that is new here belongs into VcpuSnapshot, ThreadAccount, ContextState, or the lists above."""

    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vcpu = vm.vcpus[0]
        vm.close()
        return set(vars(vcpu)), set(vars(vcpu.context)), {field.name for field in fields(vcpu.thread)}

    vcpu, context, thread = run(main())
    renamed = {"owed": "owed_ns"}
    saved = {renamed.get(field.name, field.name) for field in fields(VcpuSnapshot)}
    assert vcpu - saved == set(" ".join(MADE.values()).split()) - saved
    assert context - {field.name for field in fields(ContextState)} == set(MADE_CONTEXT.split())
    assert thread - {field.name for field in fields(ThreadAccount)} == set(MADE_THREAD.split())
