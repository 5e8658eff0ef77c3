"""A machine's life: which calls are allowed when, and that nothing of it is left when it is closed."""

import asyncio

import pytest

from aiovm.errors import ConfigError, DeadlockError, StateError
from aiovm.loop import Host, run
from aiovm.vm import Vm
from aiovm.vm_life import LIFE, LifeEvent, LifeState

END = bytes.fromhex("b000 e6f4")  # mov al, 0; out 0xf4, al
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
