"""KVM's calls that get and set one vCPU's state: what a guest left, what it then finds, and what is refused."""

import asyncio
from dataclasses import replace

import pytest
from bare import CODE, DATA, END, bare, prepare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiovm.errors import ConfigError, StateError
from aiovm.kvm_structs import (
    EventsFlag,
    KvmDebugregs,
    KvmFpu,
    KvmRegs,
    KvmSegment,
    KvmVcpuEvents,
    KvmXcrs,
    KvmXsave,
    MpState,
)
from aiovm.loop import Host, VirtualLoop, run
from aiovm.vcpu_state import MSR_INDEX_LIST
from aiovm.vm import Vm

U64 = st.integers(0, (1 << 64) - 1)


@pytest.fixture(params=[True, False], ids=["pointers", "public"])
def cpu(request):
    """A vCPU in long mode that has not run yet."""

    async def make():
        vm = Vm(Host(1), memory=1 << 20, pointers=request.param)
        prepare(vm, "long")
        return vm

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        vm = runner.run(make())
        yield vm.vcpus[0]
        vm.close()


SLOW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@SLOW
@given(values=st.tuples(*[U64] * 17), rflags=st.integers(0, 0x3F_7FD7).map(lambda x: x & 0x3F_7FD7 | 2))
def test_registers_round_trip(cpu, values, rflags):
    regs = KvmRegs(*values, rflags & ~0x2_0000)
    cpu.set_regs(regs)
    assert cpu.get_regs() == regs


def test_registers_are_what_the_guest_left():
    # mov ebx, 0x11; mov esi, 0x22; add ebx, ebx with carry and zero clear
    end = bare("bb11000000 be22000000 01db" + END, look=lambda vm: vm.vcpus[0].get_regs())
    regs = end.extra
    assert (regs.rbx, regs.rsi, regs.rip) == (0x22, 0x22, CODE + 14)
    assert regs.rflags & 0x8D5 == 0x4  # 0x22 has two set bits: PF


def test_the_guest_finds_what_was_set():
    def setup(vm):
        vcpu = vm.vcpus[0]
        vcpu.set_regs(replace(vcpu.get_regs(), r13=0x77, rflags=0x3))

    # mov eax, r13d; adc eax, 0
    assert bare("4489e8 83d000" + END, setup=setup).gpr[0] & 0xFF == 0x78


def test_set_regs_drops_a_pending_exception(cpu):
    cpu.events.queue_exception(13, 0)
    cpu.set_regs(cpu.get_regs())
    assert not cpu.events.has_exception


def test_reserved_flags_are_refused(cpu):
    with pytest.raises(ConfigError, match="rflags"):
        cpu.set_regs(KvmRegs(rflags=0x8))


def test_system_registers_of_long_mode(cpu):
    sregs = cpu.get_sregs()
    assert (sregs.cr0, sregs.cr4, sregs.efer, sregs.cr8) == (0x8001_0033, 0x620, 0xD01, 0)
    assert (sregs.cs.l, sregs.cs.s, sregs.cs.present, sregs.ss.dpl, sregs.apic_base) == (1, 1, 1, 0, 0xFEE0_0900)
    cpu.set_sregs(sregs)
    assert cpu.get_sregs() == sregs


@SLOW
@given(base=U64, limit=st.integers(0, 0xFFFF_FFFF), selector=st.integers(0, 0xFFFF), bits=st.integers(0, 0x3FF))
def test_segments_round_trip(cpu, base, limit, selector, bits):
    present = bits >> 9
    segment = KvmSegment(
        base, limit, selector, bits & 15, present, bits >> 4 & 3, bits >> 6 & 1, bits >> 7 & 1, 0, bits >> 8 & 1, 0,
        1 - present,
    )  # fmt: skip
    for name in ("ds", "es", "fs", "gs"):
        sregs = replace(cpu.get_sregs(), **{name: segment})
        cpu.set_sregs(sregs)
        assert cpu.get_sregs() == sregs


def test_ss_sets_the_privilege_level(cpu):
    sregs = cpu.get_sregs()
    cpu.set_sregs(replace(sregs, ss=replace(sregs.ss, dpl=3)))
    assert (cpu.context.state.cpl, cpu.get_sregs().ss.dpl) == (3, 3)


def test_cr8_and_an_interrupt_under_way(cpu):
    sregs = replace(cpu.get_sregs(), cr8=5, interrupt_bitmap=(0, 1 << 1, 0, 0))
    cpu.set_sregs(sregs)
    assert cpu.get_sregs() == sregs
    assert (cpu.apic.tpr, cpu.events.s.interrupt_nr) == (0x50, 65)


@pytest.mark.parametrize(
    "change",
    [
        {"cr0": 1 << 31},  # PG without PE
        {"cr0": 0xA000_0011},  # NW without CD
        {"cr4": 0x600},  # long mode without PAE
        {"cr4": 1 << 17 | 0x620},  # PCID is not offered
        {"efer": 0x100},  # LME and PG without LMA
        {"efer": 0xD01 | 1 << 12},  # SVME
        {"cr3": 1 << 40},
        {"cr0": 0x11, "efer": 0},  # a 64-bit CS in protected mode
        {"cr8": 16},
        {"apic_base": 0xFEE0_0400},  # x2APIC without the enable bit
    ],
)
def test_a_state_that_cannot_be_is_refused_whole(cpu, change):
    before = cpu.get_sregs()
    with pytest.raises(ConfigError, match="KvmSregs"):
        cpu.set_sregs(replace(before, **change))
    assert cpu.get_sregs() == before


@SLOW
@given(data=st.data())
def test_fpu_round_trip(cpu, data):
    ten = st.binary(min_size=10, max_size=10).map(lambda b: b + bytes(6))
    sixteen = st.binary(min_size=16, max_size=16)
    u16 = st.integers(0, 0xFFFF)
    fpu = KvmFpu(
        data.draw(st.tuples(*[ten] * 8)), data.draw(u16), data.draw(u16), data.draw(st.integers(0, 255)),
        data.draw(u16), data.draw(U64), data.draw(U64), data.draw(st.tuples(*[sixteen] * 16)), data.draw(u16),
    )  # fmt: skip
    cpu.set_fpu(fpu)
    assert cpu.get_fpu() == fpu


def test_fpu_is_what_fxsave_stores():
    # fninit; fld1; fldpi; mov eax, 0x1fa0 to MXCSR and XMM3; fxsave [0x50000]
    code = "dbe3 d9e8 d9eb b8a01f0000 890425100005000fae142510000500 660f6ed8 0fae042500010500"
    end = bare(code + END, look=lambda vm: vm.vcpus[0].get_fpu())
    fpu, image = end.extra, end.read(DATA + 0x100, 512)
    assert fpu.fpr == tuple(image[32 + 16 * i : 48 + 16 * i] for i in range(8))
    assert fpu.xmm == tuple(image[160 + 16 * i : 176 + 16 * i] for i in range(16))
    assert fpu.fpr[1].hex() == "0000000000000080ff3f" + "00" * 6  # 1.0
    assert (fpu.fcw, fpu.fsw, fpu.ftwx) == (0x37F, 0x3000, 0xC0)
    assert image[:5] == bytes.fromhex("7f030030c0")
    assert (fpu.mxcsr, fpu.xmm[3][:4].hex()) == (0x1FA0, "a01f0000")


def test_rounding_follows_the_loaded_control_words():
    def setup(vm):
        vm.vcpus[0].set_fpu(KvmFpu(fcw=0xF7F, mxcsr=0x7F80, fpr=(bytes.fromhex("00000000000000f0ff3f") + bytes(6),
                                   *(bytes(16),) * 7), ftwx=0xFF))  # fmt: skip
        vm.memory.write(DATA, bytes.fromhex("0000f03f"))  # 1.875 as a single

    # fistp dword [0x50010]: 1.875 toward zero; cvtss2si eax, [0x50000]
    end = bare("db1c2510000500 f30f2d042500000500" + END, setup=setup)
    assert (end.read_u(DATA + 0x10, 4), end.gpr[0]) == (1, 1)


def test_mxcsr_above_16_bits_is_refused(cpu):
    with pytest.raises(ConfigError, match="mxcsr"):
        cpu.set_fpu(KvmFpu(mxcsr=0x1_1F80))


def test_xcr0_has_x87_and_may_have_sse_and_pkru(cpu):
    assert cpu.get_xcrs() == KvmXcrs(1)
    cpu.set_xcrs(KvmXcrs(3))
    assert cpu.get_xcrs() == KvmXcrs(3)
    cpu.context.restore(cpu.context.save())
    assert cpu.get_xcrs() == KvmXcrs(3)
    cpu.set_xcrs(KvmXcrs(0x203))
    assert cpu.get_xcrs() == KvmXcrs(0x203)
    for value in (0, 2, 5, 7, 0x202, 0x207):
        with pytest.raises(ConfigError, match="EINVAL"):
            cpu.set_xcrs(KvmXcrs(value))
    assert cpu.get_xcrs() == KvmXcrs(0x203)


def test_xsave_is_what_the_instruction_stores():
    # CR4.OSXSAVE and PKE; x87, SSE and PKRU in XCR0; fld1; mov eax, 0x12345678; movd xmm3, eax; wrpkru; xsave [0x50000]
    code = "0f20e0 0d00004400 0f22e0 31c9 31d2 b803020000 0f01d1 dbe3 d9e8 b878563412 660f6ed8 0f01ef"
    code += "b803020000 0fae242500000500"
    end = bare(code + END, look=lambda vm: vm.vcpus[0].get_xsave())
    xsave = end.extra
    assert xsave == KvmXsave.unpack(end.read(DATA, 4096))
    assert (xsave.pkru, xsave.xmm[3][:4].hex(), xsave.xstate_bv) == (0x1234_5678, "78563412", 0x203)


def test_xsave_loads_what_its_header_has(cpu):
    ones, full = (b"\x11" * 16,) * 16, KvmFpu(fpr=(b"\x22" * 10 + bytes(6),) * 8, fcw=0x27F, ftwx=0xFF, mxcsr=0x1FA0)
    xsave = KvmXsave(fcw=0x27F, ftwx=0xFF, mxcsr=0x1FA0, fpr=full.fpr, xmm=ones, pkru=0x55)
    cpu.set_xsave(replace(xsave, xstate_bv=0x203))
    assert cpu.get_xsave() == replace(xsave, xstate_bv=0x203)
    cpu.context.restore(cpu.context.save())
    assert (cpu.get_fpu(), cpu.context.state.pkru) == (replace(full, xmm=ones), 0x55)
    cpu.set_xsave(replace(xsave, xstate_bv=1))
    assert (cpu.get_fpu(), cpu.context.state.pkru) == (full, 0)
    cpu.set_xsave(replace(xsave, xstate_bv=0x202))
    assert (cpu.get_fpu(), cpu.context.state.pkru) == (KvmFpu(xmm=ones, mxcsr=0x1FA0), 0x55)
    cpu.set_xsave(replace(xsave, xstate_bv=0))
    assert (cpu.get_fpu(), cpu.context.state.pkru) == (KvmFpu(), 0)
    for wrong in ({"xstate_bv": 4}, {"xcomp_bv": 1 << 63}, {"reserved": (0, 0, 1, 0, 0, 0)}, {"mxcsr": 0x1_1F80}):
        with pytest.raises(ConfigError, match="EINVAL"):
            cpu.set_xsave(replace(xsave, **{"xstate_bv": 3} | wrong))
    assert cpu.get_fpu() == KvmFpu()


def test_debug_registers_take_effect():
    def setup(vm):
        vm.vcpus[0].set_debugregs(KvmDebugregs((CODE + 5, 0, 0, 0), 0xFFFF_0FF0, 0x402))

    end = bare("b801000000 b802000000" + END, setup=setup, look=lambda vm: vm.vcpus[0].get_debugregs())
    assert end.vector == 1
    assert (end.extra.db[0], end.extra.dr6 & 0xF) == (CODE + 5, 1)


@pytest.mark.parametrize("change", [{"flags": 1}, {"dr6": 1 << 32}, {"dr7": 1 << 32}])
def test_debug_registers_that_are_refused(cpu, change):
    with pytest.raises(ConfigError):
        cpu.set_debugregs(KvmDebugregs(**change))


@SLOW
@given(
    bits=st.lists(st.booleans(), min_size=10, max_size=10),
    nr=st.sampled_from([0, 6, 13, 14]),
    pending=st.integers(0, 2),
)
def test_events_round_trip(cpu, bits, nr, pending):
    injected, has_error, shadow, nmi, masked, smm, smi, inside, latched, waiting = (int(bit) for bit in bits)
    events = KvmVcpuEvents(
        injected, nr, has_error, waiting, 0x18 * has_error, 0, 0, 0, 3 * shadow, nmi, pending, masked, 0, 0x3D,
        smm, smi, inside, latched,
    )  # fmt: skip
    cpu.set_vcpu_events(events)
    expected = replace(events, nmi_pending=min(pending, 1 if masked or nmi else 2))
    assert cpu.get_vcpu_events() == expected


def test_parts_without_their_flag_stay(cpu):
    cpu.set_vcpu_events(KvmVcpuEvents(nmi_pending=2, interrupt_shadow=3, smi_smm=1, exception_pending=1))
    events = cpu.get_vcpu_events()
    assert (events.nmi_pending, events.interrupt_shadow, events.smi_smm, events.exception_pending) == (0, 0, 0, 0)


def test_an_injected_exception_is_delivered_at_the_entry():
    def setup(vm):
        vm.vcpus[0].set_vcpu_events(
            KvmVcpuEvents(exception_injected=1, exception_nr=13, exception_has_error_code=1, exception_error_code=0x18)
        )

    end = bare("90" + END, setup=setup)
    assert (end.vector, end.error_code, end.fault_rip) == (13, 0x18, CODE)


@pytest.mark.parametrize(
    "events",
    [{"flags": 0x40}, {"exception_injected": 1, "exception_nr": 32}, {"exception_injected": 1, "exception_nr": 2}],
)
def test_events_that_are_refused(cpu, events):
    with pytest.raises(ConfigError):
        cpu.set_vcpu_events(KvmVcpuEvents(**events))


def test_no_smi_while_waiting_for_a_sipi(cpu):
    cpu.set_mp_state(MpState.INIT_RECEIVED)
    with pytest.raises(ConfigError, match="SIPI"):
        cpu.set_vcpu_events(KvmVcpuEvents(smi_pending=1, flags=EventsFlag.SMM))


def test_mp_state(cpu):
    cpu.set_mp_state(3)
    assert cpu.get_mp_state() is MpState.HALTED
    cpu.set_mp_state(4)
    assert (cpu.get_mp_state(), cpu.apic.state.sipi_pending) == (MpState.INIT_RECEIVED, True)
    with pytest.raises(ConfigError, match="mp_state 9"):
        cpu.set_mp_state(9)


def test_lapic_page_round_trip(cpu):
    for register, value in ((0x080, 0x20), (0x0D0, 0x0200_0000), (0x320, 0x2_0030), (0x3E0, 0xB), (0x380, 5_000_000)):
        cpu.apic.mmio_write(register, 4, value, 0)
    cpu.apic.accept(0x000, 0x51)
    page = cpu.get_lapic()
    assert len(page) == 0x400
    cpu.apic.reset()
    cpu.set_lapic(page)
    assert cpu.get_lapic() == page
    with pytest.raises(ConfigError, match="page"):
        cpu.set_lapic(page[:-1])


def test_a_loaded_timer_fires():
    def setup(vm):
        vcpu = vm.vcpus[0]
        page = bytearray(vcpu.get_lapic())
        for register, value in ((0x0F0, 0x1FF), (0x320, 0x40), (0x380, 200_000), (0x390, 100_000), (0x3E0, 0xB)):
            page[register : register + 4] = value.to_bytes(4, "little")
        vcpu.set_lapic(bytes(page))

    end = bare("fb f4 ebfd", setup=setup)  # sti; hlt
    assert (end.vector, end.now // 10_000) == (0x40, 10)


def test_msrs_round_trip_and_are_the_hosts_stores(cpu):
    values = cpu.get_msrs()
    assert tuple(values) == MSR_INDEX_LIST
    wanted = {0xC000_0082: 0x8000, 0x277: 0x0007_0406_0007_0406, 0x3B: 99, 0x9E: 0x4_0000, 0x4B56_4D01: DATA + 1}
    cpu.set_msrs(wanted)
    assert cpu.get_msrs(wanted) == wanted
    tsc = cpu.get_msrs([0x10])[0x10]
    assert tsc == 0  # TSC_ADJUST was recorded, and moved nothing
    cpu.set_msrs({0x10: 1_000})
    assert cpu.get_msrs([0x10, 0x3B]) == {0x10: 1_000, 0x3B: 99}
    assert cpu.pv.clock.enabled


@pytest.mark.parametrize("values", [{0x123: 0}, {0x10: 1 << 64}, {0xC000_0082: 1 << 60}, {0x9E: 1 << 32}])
def test_msrs_that_are_refused(cpu, values):
    with pytest.raises(ConfigError, match="does not take"):
        cpu.set_msrs(values)


def test_an_msr_that_does_not_exist(cpu):
    with pytest.raises(ConfigError, match="0x123"):
        cpu.get_msrs([0x123])


def test_kvmclock_ctrl_needs_a_clock(cpu):
    with pytest.raises(StateError, match="registered"):
        cpu.kvmclock_ctrl()
    cpu.set_msrs({0x4B56_4D01: DATA + 1})
    cpu.kvmclock_ctrl()
    cpu.service_paravirt()
    assert cpu.vm.memory.read_u(DATA + 29, 1) == 3  # stable, stopped


def test_inside_the_guest_every_call_is_refused():
    seen = []

    async def main():
        async with Vm(Host(1), memory=1 << 20) as vm:
            prepare(vm, "long")
            vm.memory.write(CODE, bytes.fromhex("ebfe"))
            vcpu = vm.vcpus[0]
            task = asyncio.create_task(vcpu.run())
            await asyncio.sleep(1e-4)
            for call in (vcpu.get_regs, vcpu.get_sregs, vcpu.get_fpu, vcpu.get_lapic, vcpu.get_msrs):
                with pytest.raises(StateError, match="in the guest"):
                    call()
                seen.append(call)
            task.cancel()
            await asyncio.wait([task])

    run(main())
    assert len(seen) == 5
