"""``struct kvm_vcpu_arch`` by its names: each answers what the guest did, in KVM's bit numbers."""

import asyncio

import pytest
from bare import CODE, DATA, END, STACK, bare, prepare

from aiovm.engine.unicorn.budget import NATIVE
from aiovm.errors import StateError
from aiovm.exits import Interrupted
from aiovm.kvm_structs import MpState
from aiovm.loop import Host, run, run_wall
from aiovm.memory import SlotFlags
from aiovm.page_walk import PagingRegs
from aiovm.vcpu_arch import HFlag
from aiovm.vm import Vm

RFLAGS, CR3 = 1 << 19, 1 << 18


def arch(code, mode="long", *, look=lambda a: a, **options):
    return bare(code, mode, look=lambda vm: look(vm.vcpus[0].arch), **options).extra


def test_general_registers_are_in_hardware_order():
    regs = arch("b811000000 b922000000 ba33000000 bb44000000 41bf55000000" + END, look=lambda a: a.regs)
    assert (regs[0] & 0xFF, regs[1], regs[2], regs[3], regs[15]) == (0x11, 0x22, 0x33, 0x44, 0x55)
    assert regs[4] == STACK
    assert regs[16] == CODE + 28


def test_flags_that_the_core_has_not_computed_are_not_available():
    # add eax, ebx leaves the condition codes to whoever asks for them; popf loads the register. Seen at out 0x99, al.
    seen = []

    class Probe:
        def write(self, _offset, _size, _value, _now):
            seen.append((self.arch.regs_avail, self.arch.regs_dirty))

    def setup(vm):
        probe = Probe()
        probe.arch = vm.vcpus[0].arch
        vm.ports.register(0x99, 1, probe)

    bare("01d8 e699 6a02 9d e699" + END, setup=setup)
    assert seen == [((1 << 21) - 1 & ~RFLAGS, 0), ((1 << 21) - 1, 0)]
    # What ends the slice behind an OUT is an event, for which they are computed.
    assert arch("01d8" + END, look=lambda a: a.regs_avail) == (1 << 21) - 1


def test_what_was_written_is_dirty_until_the_entry():
    seen = []

    def setup(vm):
        state, a = vm.vcpus[0].context.state, vm.vcpus[0].arch
        vm.engine.load(vm.vcpus[0].context)
        state.rflags = 0x893
        seen.append(a.regs_dirty & RFLAGS)
        state.cr3 = state.cr3
        seen.append(a.regs_dirty)

    end = bare(END, setup=setup, look=lambda vm: vm.vcpus[0].arch.regs_dirty)
    assert seen == [RFLAGS, RFLAGS | CR3]
    assert end.extra == 0
    assert end.rflags & 0x8D5 == 0x891


def test_control_registers():
    # mov rax, 0x123000 would unmap the code: CR2 alone is stored by the guest, the others stand as set up.
    found = arch("0f22d0" + END, regs={0: 0x1234_5000}, look=lambda a: (a.cr0, a.cr2, a.cr3, a.cr4, a.efer))
    assert found == (0x8001_0033, 0x1234_5000, 0x2_0000, 0x620, 0xD01)


def test_the_guest_owns_no_control_register_bit_each_store_is_seen():
    # clts; mov cr0 with TS; mov cr4 with DE: had the guest owned TS or DE, no exit would have charged its time.
    code = "0f06 0f20c0 83c808 0f22c0 0f20e0 83c808 0f22e0"
    a = arch(code + END, look=lambda a: (a.cr0_guest_owned_bits, a.cr4_guest_owned_bits, a.cr0 & 8, a.cr4 & 8))
    assert a == (0, 0, 8, 8)
    exits = (bare(code + END).now - bare("90" * 20 + END).now) / 600
    assert 3 <= exits < 3.1


def test_cr8_is_the_task_priority():
    assert arch("b805000000 440f22c0" + END, look=lambda a: (a.cr8, a.apic.state.tpr)) == (5, 0x50)


def test_hflags_are_those_of_6_16():
    seen = []

    def setup(vm):
        vm.memory.write(0x3_8000, bytes.fromhex("b001 e6f1 0faa"))  # out 0xf1, al; rsm
        vm.ports.register(0xF1, 1, Spy(lambda: seen.append(vm.vcpus[0].arch.hflags)))
        vm.vcpus[0].inject_smi()

    assert arch("90" * 4 + END, setup=setup, look=lambda a: a.hflags) == HFlag.NONE
    assert seen == [HFlag.SMM]
    assert [int(flag) for flag in HFlag] == [1, 2, 4]

    def inside_an_nmi(vm):
        setup(vm)
        vm.vcpus[0].events.s.nmi_masked = vm.vcpus[0].context.state.nmi_masked = True

    seen.clear()
    after = arch("90" * 4 + END, setup=inside_an_nmi, look=lambda a: (a.hflags, a._vcpu.context.state.nmi_masked))
    assert seen == [HFlag.SMM | HFlag.SMM_INSIDE_NMI]
    assert after == (HFlag.NONE, True)  # RSM goes back into the NMI's handler


class Spy:
    """A port that tells when it is written."""

    def __init__(self, call):
        self.call = call

    def read(self, offset, size, now):
        return 0

    def write(self, offset, size, value, now):
        self.call()


def test_misc_enable_is_what_was_stored():
    assert arch("b9a0010000 b809080000 31d2 0f30" + END, look=lambda a: a.ia32_misc_enable_msr) == 0x809


@pytest.mark.parametrize("instruction", ["0f32", "0f30"])
def test_xss_faults_without_xsaves(instruction):
    end = bare("b9a00d0000 31c0 31d2" + instruction + END, look=lambda vm: vm.vcpus[0].arch.ia32_xss)
    assert (end.vector, end.error_code, end.extra) == (13, 0, 0)


def test_apic_base_and_arbitration():
    # mov ecx, 0x1b; rdmsr; or eax, 0x400; wrmsr: x2APIC.
    found = arch("b91b000000 0f32 0d00040000 0f30" + END, look=lambda a: (a.apic_base, a.apic_arb_prio))
    assert found == (0xFEE0_0D00, 0)
    # In x2APIC mode a self-addressed lowest-priority interrupt 0x40, in flat logical terms cluster 0, member 0.
    code = "b91b000000 0f32 0d00040000 0f30 b930080000 b840090000 ba01000000 0f30"
    assert arch(code + END, look=lambda a: a.apic_arb_prio) == 1


def test_pv_eoi_is_in_apic_attention():
    def setup(vm):
        eoi = vm.vcpus[0].pv.eoi
        assert eoi.write_msr(DATA | 1)
        eoi.arm(irr_pending=False, isr_vector=0x40, ioapic_handles=False)

    seen = []
    bare(END, setup=lambda vm: (setup(vm), seen.append(vm.vcpus[0].arch.apic_attention)))
    assert seen == [2]
    assert arch(END, look=lambda a: a.apic_attention) == 0


def test_tpr_accesses_leave_when_somebody_asked():
    code = bytes.fromhex("a38000e0fe eb00 8b1d8000e0fe eb00 f4")  # mov [TPR], eax; mov ebx, [TPR]; hlt

    async def main():
        vm = Vm(Host(1), memory=1 << 20)
        vm.load(b"\xf4")
        vcpu = vm.vcpus[0]
        state = vcpu.context.state
        prepare(vm, "prot")
        vm.memory.write(CODE, code)
        state.gpr[0] = 0x30
        vcpu.tpr_access_reporting = True
        assert vcpu.arch.tpr_access_reporting
        first, second = await vcpu.run(), await vcpu.run()
        assert (first.is_write, second.is_write) == (True, False)
        assert state.gpr[3] == 0x30, "the access was done"
        vcpu.tpr_access_reporting = False
        task = asyncio.create_task(vcpu.run())
        await asyncio.sleep(0.001)
        vcpu.immediate_exit = True
        vcpu.kick()
        assert await task == Interrupted()
        vm.close()

    run(main())


def test_mp_state():
    assert arch(END, look=lambda a: a.mp_state.name) == "RUNNABLE"


def test_paging_contexts():
    def look(vm):
        a = vm.vcpus[0].arch
        assert a.walk_mmu is a.mmu
        assert a.nested_mmu is None
        assert a.walk_mmu.translate_debug(DATA + 5) == DATA + 5
        outer = PagingRegs.of(vm.vcpus[0].context.state)
        a.mmus.enter_nested(lambda: outer)
        assert a.walk_mmu is a.nested_mmu is not a.mmu
        found = a.walk_mmu.translate_debug(DATA + 5)
        a.mmus.leave_nested()
        return found, a.walk_mmu is a.mmu

    assert bare(END, look=look).extra == (DATA + 5, True)


def test_the_clock_record():
    # mov ecx, 0x4b564d01; mov eax, DATA | 1; xor edx, edx; wrmsr
    def look(vm):
        a = vm.vcpus[0].arch
        return a.time, a.pv_time_enabled, a.pv_time.gpa, a.hw_tsc_khz, a.hv_clock, a.pvclock_set_guest_stopped_request

    code = "b9014d564b b801000500 31d2 0f30"
    time, enabled, gpa, khz, record, stopped = bare(code + END, look=look).extra
    assert (time, enabled, gpa, khz, stopped) == (DATA | 1, True, DATA, 2_000_000, False)
    assert (record.scale.shift, record.scale.mul) == (0, 0x8000_0000), "ns at 2 GHz: half the cycles"
    assert bare(END, look=lambda vm: vm.vcpus[0].arch.pv_time).extra is None


def test_ctrl_sets_the_stopped_request():
    def look(vm):
        vm.vcpus[0].pv.clock.ctrl()
        return vm.vcpus[0].arch.pvclock_set_guest_stopped_request

    assert bare("b9014d564b b801000500 31d2 0f30" + END, look=look).extra is True


# ---- kvm_vcpu's own ----------------------------------------------------------------------------------------------


def test_the_fpu_is_active_while_nothing_traps_it():
    assert bare(END, look=lambda vm: vm.vcpus[0].fpu_active).extra is True
    end = bare("0f20c0 83c808 0f22c0 d9e8" + END, look=lambda vm: vm.vcpus[0].fpu_active)  # TS set; fld1
    assert (end.vector, end.extra) == (7, False)


def test_the_fpu_is_loaded_with_its_vcpu():
    def look(vm):
        one, two = vm.vcpus
        before = one.guest_fpu_loaded, two.guest_fpu_loaded
        vm.engine.load(two.context)
        return before, (one.guest_fpu_loaded, two.guest_fpu_loaded), two.guest_xcr0_loaded

    assert bare(END, vcpus=2, look=look).extra == ((True, False), (False, True), False)


def test_srcu_idx_is_the_generation_that_a_slice_reads():
    seen = []

    def setup(vm):
        vm.memory.set_region(7, 0x80_0000, 0x1000)
        vm.ports.register(0xF1, 1, Spy(lambda: seen.append((vm.vcpus[0].srcu_idx, vm.memory.map.generation))))

    end = bare("e6f1" + END, setup=setup, look=lambda vm: vm.vcpus[0].srcu_idx)
    generation = seen[0][1]
    assert seen == [(generation, generation)]
    assert generation % 2 == 0
    assert end.extra == -1


def test_on_the_wall_clock_memory_changes_between_slices_only():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(bytes.fromhex("ebfe"))
            task = asyncio.create_task(vm.run())
            while vm.vcpus[0].srcu_idx < 0:  # noqa: ASYNC110  (a slice begins without telling anybody)
                await asyncio.sleep(0)
            with pytest.raises(StateError, match="between_slices"):
                vm.memory.set_region(7, 0x80_0000, 0x1000)
            with pytest.raises(StateError, match="between_slices"):
                vm.claim_mmio(0x80_0000, 0x1000)
            assert vm.memory.map.generation % 2 == 0
            assert vm.memory.map.find(0x80_0000) is None
            await vm.between_slices()
            vm.memory.set_region(7, 0x80_0000, 0x1000, flags=SlotFlags.READONLY)
            assert vm.memory.map.find(0x80_0000) is not None
            task.cancel()
            await asyncio.wait([task])

    run_wall(main())


def test_on_the_wall_clock_a_log_is_taken_between_slices_only():
    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            vm.load(bytes.fromhex("fe060050 ebfa"))  # inc byte [0x5000]; jmp
            vm.memory.set_region(0, 0, 1 << 20, flags=SlotFlags.LOG_DIRTY)
            vm.memory.take_dirty_log(0)
            task = asyncio.create_task(vm.run())
            for _ in range(3):
                logged = False
                while not logged:  # a slice that was kicked at once has stored nothing
                    while vm.vcpus[0].srcu_idx < 0:  # noqa: ASYNC110  (a slice begins without telling anybody)
                        await asyncio.sleep(0)
                    with pytest.raises(StateError, match="between_slices"):
                        vm.memory.take_dirty_log(0)
                    await vm.between_slices()
                    logged = vm.memory.take_dirty_log(0)[0] >> 5 & 1
                    await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])

    run_wall(main())


def test_identity_and_machine():
    def look(vm):
        return [(v.vm is vm, v.vcpu_id, v.index, v.apic.apic_id) for v in vm.vcpus]

    assert bare(END, vcpus=3, look=look).extra == [(True, 0, 0, 0), (True, 1, 1, 1), (True, 2, 2, 2)]


def test_cpu_is_where_it_ran_last_and_stays_after():
    seen = []
    end = bare(END, vcpus=2, setup=lambda vm: seen.extend(v.cpu for v in vm.vcpus), look=lambda vm: vm.vcpus[0].cpu)
    assert seen == [-1, -1]
    assert end.extra == 0


def test_preempted_is_who_still_wanted_the_cpu():
    """Two machines on one CPU, one computes for ever and one halts: the first is preempted, the second blocks."""

    async def main():
        host = Host(1)
        spins, sleeps = Vm(host, memory=1 << 20), Vm(host, memory=1 << 20)
        spins.load(bytes.fromhex("ebfe"))
        sleeps.load(bytes.fromhex("faf4ebfd"))
        told = []
        for vm in (spins, sleeps):
            vm.vcpus[0].on_sched_out = lambda vcpu, preempted: told.append(
                (vcpu.vm is spins, preempted, vcpu.preempted)
            )
        tasks = [asyncio.create_task(vm.vcpus[0].run()) for vm in (spins, sleeps)]
        await asyncio.sleep(0.02)
        assert told[:2] == [(True, True, True), (False, False, False)]
        assert (spins.vcpus[0].preempted, sleeps.vcpus[0].preempted) == (False, False)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        spins.close()
        sleeps.close()

    run(main())


def test_statistics_count_what_happened():
    # cpuid; in al, 0x80; hypercall KVM_HC_VAPIC_POLL_IRQ
    end = bare("0fa2 e480 b801000000 0f01c1" + END, look=lambda vm: vm.vcpus[0].stat)
    assert (end.extra.io_exits, end.extra.hypercalls, end.extra.mmio_exits) == (2, 1, 0)


def test_statistics_count_the_exits_that_leave():
    # twice KVM_HC_KICK_CPU of itself (RAX 5, RBX flags, RCX APIC id) and the HLT that takes the kick; then a jump to it
    kicked = "b805000000 31db 31c9 0f01c1 f4"
    none = bare("90" * 26 + END, look=lambda vm: vm.vcpus[0].stat.exits).extra
    stat = bare(kicked * 2 + END, look=lambda vm: vm.vcpus[0].stat).extra
    assert (stat.halt_exits, stat.kicks) == (2, 2)
    assert stat.exits - none >= 2


def test_a_vcpu_that_gave_way_counts_as_a_spinner_until_it_runs_again():
    """KVM's yield sleeps inside the handler of the pause loop's exit (``kvm_vcpu_on_spin``)."""

    async def main():
        host = Host(1)
        left, running = [], []
        async with Vm(host, vcpus=2, memory=1 << 20) as vm:
            vm.load(b"\xf4", kind="flat")
            vm.memory.write(CODE, bytes.fromhex("f390ebfc"))  # pause; jmp back
            for index, vcpu in enumerate(vm.vcpus):
                prepare(vm, "prot", index=index)
                vcpu.mp_state = MpState.RUNNABLE
                vcpu.on_sched_out = lambda vcpu, preempted: left.append(vcpu.in_spin_loop)
                vcpu.on_slice = lambda vcpu, start, end: running.append(vcpu.in_spin_loop)
            tasks = [asyncio.create_task(vcpu.run()) for vcpu in vm.vcpus]
            await asyncio.sleep(0.05)
            yields = sum(vcpu.stat.directed_yield_successful for vcpu in vm.vcpus)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return yields, left, running

    yields, left, running = run(main())
    assert yields > 1000
    assert sum(left) > 1000
    assert not any(running)


def test_a_yielder_notes_whom_it_boosted_when_it_is_back():
    """``yield_to`` calls ``schedule`` before it returns, and ``last_boosted_vcpu`` is stored after it."""

    async def main():
        host = Host(1)
        log = []
        async with Vm(host, vcpus=3, memory=1 << 20) as vm:
            vm.load(b"\xf4", kind="flat")
            vm.memory.write(CODE, bytes.fromhex("f390ebfc"))  # pause; jmp back
            for index, vcpu in enumerate(vm.vcpus):
                prepare(vm, "prot", index=index)
                vcpu.mp_state = MpState.RUNNABLE
                vcpu.on_sched_out = lambda vcpu, _: log.append((vcpu.index, vcpu.boosting, vm.last_boosted_vcpu))
                vcpu.on_slice = lambda vcpu, start, end: log.append((vcpu.index, None, vm.last_boosted_vcpu))
            tasks = [asyncio.create_task(vcpu.run()) for vcpu in vm.vcpus]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return log

    log = run(main())
    away, last, stale = {}, 0, 0
    for index, boosting, seen in log:
        if boosting is None:  # it runs: whoever was away is back, and has noted whom it boosted
            last = away.pop(index, last)
        elif boosting >= 0:
            away[index] = boosting
            stale += boosting != seen
        assert seen == last
    assert len(log) > 1000
    assert stale


def test_stores_of_the_guest_are_in_the_dirty_log():
    # mov byte [0x50123], 7; mov byte [0x52000], 7; and at 0x51000 a store of what is there already
    code = "c6042523010500 07 c6042500200500 07 c6042500100500 00"

    def setup(vm):
        vm.memory.set_region(0, 0, 4 << 20, flags=SlotFlags.LOG_DIRTY)
        vm.memory.take_dirty_log(0)

    log = bare(code.replace(" ", "") + END, setup=setup, look=lambda vm: vm.memory.take_dirty_log(0)).extra
    pages = [page for page in range(1024) if log[page >> 3] >> (page & 7) & 1]
    assert {0x50, 0x52} <= set(pages)
    assert (0x51 in pages) is NATIVE  # the C hook notes stores; without it changes are looked for
    assert len(pages) < 10
