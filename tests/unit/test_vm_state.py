"""KVM's calls that get and set a machine's clock, interrupt chips and timer."""

import asyncio
from dataclasses import replace

import pytest
from bare import CODE, DATA, bare, prepare

from aiovm import guests
from aiovm.errors import ConfigError, StateError
from aiovm.kvmclock import ClockData, ClockFlag
from aiovm.loop import Host, run, run_wall
from aiovm.vm import Vm
from aiovm.vm_life import LifeState
from aiovm.vm_state import IrqChip


def with_machine(check, **options):
    async def main():
        async with Vm(Host(1), memory=1 << 20, **options) as vm:
            prepare(vm, "long")
            return await check(vm)

    return run(main())


def test_the_clock_is_read_and_set():
    async def check(vm):
        await asyncio.sleep(0.001)
        data = vm.get_clock()
        assert data == ClockData(1_000_000, ClockFlag(14), vm.wall_ns(), 2_000_000)
        vm.set_clock(ClockData(5_000_000_000))
        assert vm.get_clock().clock == 5_000_000_000
        with pytest.raises(ConfigError, match="flags"):
            vm.set_clock(ClockData(0, ClockFlag(1)))

    with_machine(check)


def test_a_set_clock_reaches_the_guests_record():
    async def check(vm):
        vm.life = LifeState.LOADED
        vm.memory.write(CODE, bytes.fromhex("ebfe"))
        vm.vcpus[0].set_msrs({0x4B56_4D01: DATA + 1})
        vm.start()
        await asyncio.sleep(0.001)
        assert vm.memory.read_u(DATA + 16, 8) < 1_000_000
        vm.set_clock(ClockData(7_000_000_000))
        await asyncio.sleep(0.001)
        assert vm.memory.read_u(DATA + 16, 8) == 7_000_000_000
        vm._running.cancel()
        await asyncio.wait([vm._running])

    with_machine(check)


@pytest.mark.parametrize(("chip", "mask", "port"), [(IrqChip.PIC_MASTER, 0xFB, 0x21), (IrqChip.PIC_SLAVE, 0x3F, 0xA1)])
def test_each_8259_has_a_state_of_its_own(chip, mask, port):
    async def check(vm):
        other = IrqChip(1 - chip)
        before = vm.get_irqchip(other)
        vm.set_irqchip(chip, replace(vm.get_irqchip(chip), imr=mask))
        assert vm.ports.read(port, 1, 0) == mask
        assert vm.get_irqchip(other) == before

    with_machine(check)


def test_the_ioapic_takes_a_table():
    async def check(vm):
        state = vm.get_irqchip(IrqChip.IOAPIC)
        state.table[3] = 0x1234
        vm.set_irqchip(IrqChip.IOAPIC, state)
        vm.mmio.write(0xFEC0_0000, 4, 0x16, 0)
        assert vm.mmio.read(0xFEC0_0010, 4, 0) == 0x1234

    with_machine(check)


def test_a_chip_takes_no_other_chips_state():
    async def check(vm):
        with pytest.raises(ConfigError, match="PicState is no state of IOAPIC"):
            vm.set_irqchip(IrqChip.IOAPIC, vm.get_irqchip(IrqChip.PIC_MASTER))

    with_machine(check)


def test_a_loaded_timer_ticks():
    def setup(vm):
        source = vm.get_pit2()
        vm.set_pit2(replace(source, target_ns=50_000, period_ns=1_000_000, periodic=True))
        vm.set_irqchip(IrqChip.PIC_MASTER, replace(vm.get_irqchip(IrqChip.PIC_MASTER), base=0x30))
        vm.vcpus[0].apic.set_apic_base(0, host_initiated=True)

    end = bare("fb f4 ebfd", setup=setup)  # sti; hlt
    assert (end.vector, end.now // 10_000) == (0x30, 5)


def test_not_while_a_slice_runs():
    async def main():
        async with Vm(Host(1), memory=8 << 20, wall_slice_ns=50_000_000) as vm:
            vm.load(guests.path("bench").read_bytes(), cmdline="alu=3000000")
            vm.start()
            while not vm.slice_runs:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
            for call in (vm.get_clock, vm.get_pit2):
                with pytest.raises(StateError, match="a slice runs"):
                    call()
            vm._running.cancel()
            await asyncio.wait([vm._running])

    run_wall(main())
