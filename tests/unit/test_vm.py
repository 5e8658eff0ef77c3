"""A machine's life: which calls are allowed when, and that nothing of it is left when it is closed."""

import asyncio
import gc

import pytest

from aiovm.costs import Costs
from aiovm.engine.base import Seg, Segment
from aiovm.errors import ConfigError, DeadlockError, StateError
from aiovm.loop import Host, run, run_wall
from aiovm.memory import NoMemory
from aiovm.policy import POLICIES
from aiovm.policy.fair import Fair
from aiovm.vm import Vm
from aiovm.vm_life import LIFE, LifeEvent, LifeState

END = bytes.fromhex("b000 e6f4")  # mov al, 0; out 0xf4, al
NEVER_END = bytes.fromhex("ebfe")  # jmp $
#: The 8254's channel 0 as it is after power-on is silent; mode 2, 100 ticks: an interrupt every 84 us, for ever.
TICKING = bytes.fromhex("b034 e643 b064 e640 b000 e640") + END
#: x2APIC on; divide by 1, vector 0x40, periodic, 0x1000 counts: the local APIC ticks for ever.
APIC_TICKING = (
    bytes.fromhex(
        "66b91b000000 66b8000ce0fe 6631d2 0f30"  # wrmsr 0x1b, 0xfee00c00
        "66b93e080000 66b80b000000 0f30"  # wrmsr 0x83e, 0xb
        "66b932080000 66b840000200 0f30"  # wrmsr 0x832, 0x20040
        "66b938080000 66b800100000 0f30"  # wrmsr 0x838, 0x1000
    )
    + END
)
#: With the FIFO on, waits for bytes on the serial port, reads until there is no more, sends back how many there were.
COUNT_BURSTS = bytes.fromhex(
    "bafa03 b001 ee 31c9 bafd03 ec a801 74fb baf803 ec 41 bafd03 ec a801 75f3 baf803 88c8 ee ebe1"
)


def test_every_state_has_a_row():
    assert set(LIFE) == set(LifeState)
    assert all(set(row) <= set(LifeEvent) for row in LIFE.values())
    reached = {LifeState.NEW} | {following for row in LIFE.values() for following in row.values()}
    assert reached == set(LifeState)


def test_the_calls_of_a_life_in_order():
    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        with pytest.raises(StateError, match="new cannot run"):
            await vm.run()
        vm.load(END)
        with pytest.raises(StateError, match="loaded cannot load"):
            vm.load(END)
        running = asyncio.create_task(vm.run())
        await asyncio.sleep(0)
        with pytest.raises(StateError, match="running cannot close"):
            vm.close()
        assert (await running).status == 1
        with pytest.raises(StateError, match="ended cannot run"):
            await vm.run()
        vm.close()
        vm.close()
        assert vm.life is LifeState.CLOSED
        with pytest.raises(StateError, match="closed cannot load"):
            vm.load(END)

    run(main())


@pytest.mark.parametrize("vcpus", [0, 256, -1])
def test_number_of_vcpus(vcpus):
    async def main():
        with pytest.raises(ConfigError, match=f"1 to 255 vCPUs, not {vcpus}"):
            Vm(Host(1), vcpus=vcpus)

    run(main())


@pytest.mark.parametrize("memory", [0, 0xFF000, 0x100001, -0x1000])
def test_memory_in_whole_pages(memory):
    async def main():
        with pytest.raises(ConfigError, match="whole pages"):
            Vm(Host(1), memory=memory)

    run(main())


@pytest.mark.parametrize("code", [TICKING, APIC_TICKING], ids=["8254", "local APIC"])
def test_a_closed_machine_is_silent(code):
    """Its periodic timers would keep time going for ever, and a stall of somebody else's hidden."""

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(code)
            assert (await vm.run()).status == 1
            assert vm.clock.horizon() < vm.clock.now() + 1_000_000, "something ticks"
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        run(main())


@pytest.mark.parametrize("paused", [False, True])
def test_leaving_the_block_stops_what_runs(paused):
    """And the program's own error is the one that comes out."""

    async def leave(vm):
        async with vm:
            raise KeyError("mine")

    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vm.load(NEVER_END)
        running = asyncio.create_task(vm.run())
        await asyncio.sleep(0.001)
        if paused:
            await vm.pause()
        with pytest.raises(KeyError, match="mine"):
            await leave(vm)
        assert vm.life is LifeState.CLOSED
        assert (await running).reason == "stopped"

    run(main())


@pytest.mark.parametrize("loaded", [True, False])
def test_a_vcpu_in_run_keeps_its_machine_open(loaded):
    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        if loaded:
            vm.load(NEVER_END)
        else:
            vm.memory.write(0x7C00, NEVER_END)
            state = vm.vcpus[0].context.state
            state.set_segment(Seg.CS, Segment(0, 0, 0xFFFF, 0x9B00))
            state.rip = 0x7C00
        running = asyncio.create_task(vm.vcpus[0].run())
        await asyncio.sleep(0.001)
        with pytest.raises(StateError, match=r"vCPU 0 is in run\(\)"):
            vm.close()
        running.cancel()
        await asyncio.wait([running])
        vm.close()

    run(main())


@pytest.mark.parametrize("start", [run, run_wall], ids=["virtual", "wall"])
def test_what_is_wanted_of_a_closed_machine_is_refused_or_done_to_nobody(start):
    """Its core is freed memory."""

    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vm.close()
        with pytest.raises(StateError, match="closed"):
            await vm.vcpus[0].run()
        vm.memory.set_region(0, 0, 1 << 20)
        vm.claim_mmio(0xD000_0000, 0x1000)

    start(main())


@pytest.mark.parametrize("start", [run, run_wall], ids=["virtual", "wall"])
def test_a_machine_runs_on_its_hosts_loop_alone(start):
    async def make():
        vm = Vm(Host(1), memory=1 << 20)
        vm.load(END)
        return vm

    async def on_another(vm):
        with pytest.raises(StateError, match="the event loop on which the host was made"):
            await vm.run()
        with pytest.raises(StateError, match="the event loop on which the host was made"):
            Vm(vm.host, memory=1 << 20)

    async def main():
        vm = await make()
        await asyncio.to_thread(start, on_another(vm))
        assert (await vm.run()).status == 1  # none the worse
        vm.close()
        assert vm.host.machines == []

    start(main())
    start(on_another(start(make())))  # the loop of the first is closed


def test_a_machine_is_started_once():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            with pytest.raises(StateError, match="new cannot run"):
                vm.start()
            vm.load(END)
            vm.start()
            with pytest.raises(StateError, match="started already"):
                vm.start()
            assert (await vm.finished()).status == 1
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(NEVER_END)
            running = asyncio.create_task(vm.run())
            await asyncio.sleep(0.001)
            with pytest.raises(StateError, match="running cannot run"):
                vm.start()
            vm.stop()
            await running

    run(main())


@pytest.mark.parametrize("base", [1 << 40, (1 << 52) - 4096])
def test_memory_that_no_address_reaches_is_refused_before_anything_changes(base):
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            before = vm.memory.map
            with pytest.raises(ConfigError, match="40 bits"):
                vm.memory.set_region(7, base, 4096)
            assert vm.memory.map is before
            vm.load(END)
            assert (await vm.run()).status == 1

    run(main())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_forgets_the_machines_that_are_closed(policy):
    """A service makes one host, and machines for ever."""

    async def main():
        host = Host(1, policy=POLICIES[policy]())
        stays = Vm(host, memory=1 << 20, vcpus=2)
        numbers = []
        for _ in range(3):
            async with Vm(host, vcpus=2, memory=1 << 20) as vm:
                vm.load(END)
                assert (await vm.run()).status == 1
                numbers += [vm.number, *(vcpu.thread.number for vcpu in vm.vcpus)]
        assert numbers == [1, 2, 3, 2, 4, 5, 3, 6, 7]  # none is used twice
        assert host.machines == [stays]
        assert [thread.number for thread in host.threads] == [0, 1]
        stays.load(END)
        assert (await stays.run()).status == 1
        stays.close()
        assert host.machines == host.threads == []

    run(main())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vcpus": "2"}, "vCPUs, not '2'"),
        ({"vcpus": 1.0}, r"vCPUs, not 1\.0"),
        ({"memory": 64.0}, r"memory of 64\.0"),
        ({"memory": "64Q"}, "bad size '64Q'"),
        ({"nodes": 0}, "nodes, of NUMA: 0 is not a whole number from 1 to 1"),
        ({"nodes": 2}, "nodes, of NUMA: 2"),
        ({"halt_poll_ns": -1}, "halt_poll_ns: -1"),
        ({"wall_slice_ns": 0}, "wall_slice_ns: 0"),
        ({"console": "stdout"}, "console: 'stdout' cannot be called"),
    ],
)
def test_wrong_options_are_named_at_once(options, words):
    async def main():
        with pytest.raises(ConfigError, match=words):
            Vm(Host(1), **options)

    run(main())


def test_memory_as_people_write_it():
    async def main():
        async with Vm(Host(1), memory="2M") as vm:
            assert vm.ram_size == 0x20_0000

    run(main())


def test_a_host_refuses_what_is_no_policy_and_what_is_anothers():
    async def main():
        with pytest.raises(ConfigError, match="'fair' is no Policy"):
            Host(1, policy="fair")
        policy = Fair()
        Host(1, policy=policy)
        with pytest.raises(ConfigError, match="fair policy serves another host"):
            Host(1, policy=policy)

    run(main())


@pytest.mark.parametrize(
    "options", [{"quantum_ns": 0}, {"code_rate": 0}, {"inject_ns": 0}, {"ipi_ns": -1}, {"exit_ns": 1.5}]
)
def test_costs_are_whole_and_not_negative(options):
    with pytest.raises(
        ConfigError, match=f"{next(iter(options))}: {next(iter(options.values()))} is not a whole number"
    ):
        Costs(**options)


def test_a_closed_machine_gives_its_memory_back():
    """At once, not when the collector comes by: a service that makes machines grew by all of their RAM meanwhile."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    async def main():
        host = Host(1)
        before = resident()
        for _ in range(4):
            async with Vm(host, memory=64 << 20) as vm:
                vm.memory.write(0, b"x" * (64 << 20))
            with pytest.raises(NoMemory):
                vm.memory.read(0, 1)
        return resident() - before

    gc.collect()
    gc.disable()
    try:
        assert run(main()) < 96 << 20
    finally:
        gc.enable()


def test_typed_input_comes_a_fifo_at_a_time():
    """A kernel's interrupt handler reads until there is no more. Where that never comes it gives up, and is deaf."""
    counts = bytearray()

    async def main():
        async with Vm(Host(1), memory=1 << 20, console=counts.extend) as vm:
            vm.load(COUNT_BURSTS)
            vm.start()
            await asyncio.sleep(0.001)
            vm.feed_console(bytes(300))
            await asyncio.sleep(0.003)
            vm.stop()
            await vm.finished()

    run(main())
    assert sum(counts) == 300
    assert max(counts) == 16
