"""Events: double faults, NMIs, SMIs, and interrupts that an instruction brings to its own CPU."""

import struct

import pytest
from bare import (
    CODE,
    CODE0,
    END,
    GP,
    HANDLERS,
    IDT,
    PF,
    TABLES,
    TSS,
    UD,
    bare,
    nmi_at,
    set_gate,
)

from aiovm.errors import TripleFault

# ---- events ----------------------------------------------------------------------------------------------------------


def test_a_fault_on_a_fault_is_a_double_fault_and_the_third_ends_it():
    absent = lambda vm: vm.memory.write_u(IDT + 16 * UD + 4, 4, 0)  # noqa: E731
    end = bare("0f0b", setup=absent)  # ud2
    assert (end.vector, end.error_code) == (GP, UD << 3 | 3)  # a benign fault first: served one after the other

    def both(vm):
        vm.memory.write_u(IDT + 16 * GP, 8, 0)
        vm.memory.write_u(IDT + 16 * GP + 8, 8, 0)

    end = bare("b82c0000000f00d8", setup=both)  # mov eax, 0x2c; ltr ax
    assert (end.vector, end.error_code) == (8, 0)

    def all_(vm):
        vm.memory.write(IDT, bytes(0x1000))

    with pytest.raises(TripleFault):
        bare("0f0b", setup=all_)  # ud2


def test_a_handler_that_cannot_be_fetched_does_not_run_for_ever():
    """The handler's page faults when fetched, on a stack that starts anew each time: no block is ever entered."""

    def setup(vm):
        vm.memory.write_u(TSS + 36, 8, 0x5_8000)  # IST1
        set_gate(vm, PF, 0, ist=1)
        vm.memory.write_u(IDT + 16 * PF + 8, 4, 0x1000)  # offset 63:32
        vm.call_at(3_000_000, lambda: set_gate(vm, PF, HANDLERS + 8 * PF))
        vm.call_at(3_000_000, lambda: vm.memory.write_u(IDT + 16 * PF + 8, 4, 0))

    end = bare("b800000040488b00", setup=setup)  # mov eax, 0x40000000; mov rax, [rax]
    assert end.vector == PF
    assert 3_000_000 <= end.now < 3_100_000


def test_an_nmi_wakes_from_hlt_with_interrupts_off():
    end = bare("f4", setup=nmi_at(10_000))  # hlt
    assert (end.vector, end.fault_rip) == (2, CODE + 1)


def test_a_second_nmi_waits_for_iret():
    """The handler counts, lets the time of the second NMI pass, and only its IRET lets that one in."""
    handler = "ffc3b9a0860100ffc975fc4189d848cf"  # inc ebx; mov ecx, 100000; 1: dec ecx; jnz 1b; mov r8d, ebx; iretq
    code = "f483fb027502e6f4ebfe"  # hlt; cmp ebx, 2; jne 1f; out 0xf4, al; 1: jmp 1b

    def setup(vm):
        set_gate(vm, 2, 0x9000)
        for ns in (10_000, 20_000):
            vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())

    end = bare(code, setup=setup, more={0x9000: handler})
    assert (end.gpr[3], end.gpr[8]) == (2, 2)
    assert end.vm.vcpus[0].stat.nmi_injections == 2


def test_three_nmis_while_one_is_served_are_one_more():
    handler = "ffc3b9a0860100ffc975fc48cf"  # inc ebx; mov ecx, 100000; 1: dec ecx; jnz 1b; iretq
    code = "f4b9801a0600ffc975fc" + END  # hlt; mov ecx, 400000; 1: dec ecx; jnz 1b

    def setup(vm):
        set_gate(vm, 2, 0x9000)
        for ns in (10_000, 20_000, 30_000, 40_000):
            vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())

    end = bare(code, setup=setup, more={0x9000: handler})
    assert end.gpr[3] == 2


def test_an_nmi_stays_out_of_the_shadow_of_sti():
    """STI; the NMI that arrived before is taken, but never between STI and the instruction behind it."""
    handler = "488b1c2448cf"  # mov rbx, [rsp]; iretq
    loop = "fa90fb9083fb0074f7" + END  # 1: cli; nop; sti; nop; cmp ebx, 0; je 1b
    end = bare(loop, setup=lambda vm: (set_gate(vm, 2, 0x9000), nmi_at(7_003)(vm)), more={0x9000: handler})
    assert end.gpr[3] != CODE + 3


# ---- system management mode ------------------------------------------------------------------------------------------


def _smi_at(ns):
    return lambda vm: vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_smi())


def test_smi_enters_and_rsm_returns():
    # mov eax, 0x12345678; mov dword ptr cs:[0xf000], eax; mov ebx, cr0; mov dword ptr cs:[0xf004], ebx; rsm
    handler = "66b8785634122e66a300f00f20c32e66891e04f00faa"
    # mov ebx, 0x77; 1: cmp dword ptr [0x3f000], 0; je 1b; mov rcx, cr0
    code = "bb77000000833c2500f003000074f60f20c1" + END
    end = bare(code, setup=_smi_at(5_000), more={0x3_8000: handler})
    assert end.read_u(0x3_F000, 4) == 0x1234_5678
    assert end.read_u(0x3_F004, 4) & 0x8000_0001 == 0  # PE and PG off in the handler
    assert (end.gpr[3], end.gpr[1], end.efer) == (0x77, 0x8001_0033, 0xD01)  # and everything back
    assert end.read_u(0x3_FEFC, 4) == 0x20064
    assert end.read_u(0x3_FF00, 4) == 0x3_0000
    assert end.read_u(0x3_FFE0, 8) == 0x77  # RBX
    assert end.read_u(0x3_FED0, 8) == 0xD01
    assert end.read_u(0x3_FF50, 8) == TABLES
    assert end.read_u(0x3_FE10, 2) == CODE0


def test_rsm_takes_a_new_smbase_and_registers_from_the_save_area():
    # mov dword ptr cs:[0xff00], 0x20000; mov dword ptr cs:[0xfff0], 0xabcd; rsm
    handler = "2e66c70600ff000002002e66c706f0ffcdab00000faa"
    code = "31c983f90074fb" + END  # xor ecx, ecx; 1: cmp ecx, 0; je 1b
    end = bare(code, setup=_smi_at(5_000), more={0x3_8000: handler})
    assert end.gpr[1] == 0xABCD
    assert end.vm.vcpus[0].smbase == 0x2_0000


def test_an_nmi_waits_for_the_end_of_smm():
    # mov ecx, 100000; 1: dec ecx; jnz 1b; mov dword ptr cs:[0xf000], ebx; rsm
    handler = "66b9a0860100664975fc2e66891e00f00faa"
    nmi = "ffc348cf"  # inc ebx; iretq
    code = "bb0100000083fb0275fb" + END  # mov ebx, 1; 1: cmp ebx, 2; jne 1b

    def setup(vm):
        set_gate(vm, 2, 0x9000)
        _smi_at(5_000)(vm)
        nmi_at(8_000)(vm)

    end = bare(code, setup=setup, more={0x3_8000: handler, 0x9000: nmi})
    assert end.gpr[3] == 2
    assert end.read_u(0x3_F000, 4) == 1


def test_rsm_to_a_state_that_cannot_be_is_a_shutdown():
    handler = "2e66c70658ff000000800faa"  # CR0: PG without PE  # mov dword ptr cs:[0xff58], 0x80000000; rsm
    with pytest.raises(TripleFault):
        bare("ebfe", setup=_smi_at(5_000), more={0x3_8000: handler})  # 1: jmp 1b


# ---- interrupts that an instruction brings to its own CPU ------------------------------------------------------------


def _pin_20_is(entry):
    def setup(vm):
        for offset, value in ((0, 0x10 + 2 * 20), (0x10, entry)):
            vm.mmio.write(0xFEC0_0000 + offset, 4, value, 0)

    return setup


def test_an_interrupt_raised_by_out_is_taken_behind_it():
    # mov edx, 0x2014 | mov al, 1 | sti | nop | out dx, al | inc ebx
    end = bare("ba14200000" + "b001" + "fb90" + "ee" + "ffc3" + END, setup=_pin_20_is(0x40))
    assert (end.vector, end.gpr[3]) == (0x40, 0)
    assert end.frame[0] == CODE + 10


def test_an_interrupt_raised_by_out_waits_while_they_are_off():
    # mov edx, 0x2014 | mov al, 1 | out dx, al | inc ebx | sti | nop | jmp .
    end = bare("ba14200000" + "b001" + "ee" + "ffc3" + "fb90" + "ebfe", setup=_pin_20_is(0x40))
    assert (end.vector, end.gpr[3]) == (0x40, 1)


def test_an_nmi_raised_by_out_is_taken_behind_it():
    # mov edx, 0x2014 | mov al, 1 | out dx, al | inc ebx
    end = bare("ba14200000" + "b001" + "ee" + "ffc3" + END, setup=_pin_20_is(0x400))
    assert (end.vector, end.gpr[3]) == (2, 0)
    assert end.frame[0] == CODE + 8


def test_an_nmi_to_oneself_is_taken_behind_the_store():
    # mov ecx, 0x1b | mov eax, 0xfee00d00 | xor edx, edx | wrmsr (x2APIC on)
    on = "b91b000000" + "b8000de0fe" + "31d2" + "0f30"
    # mov ecx, 0x830 | mov eax, 0x4400 | wrmsr (NMI to APIC 0) | inc ebx
    end = bare(on + "b930080000" + "b800440000" + "0f30" + "ffc3" + END)
    assert (end.vector, end.gpr[3]) == (2, 0)
    assert end.frame[0] == CODE + 26


def test_there_are_no_machine_check_banks():
    end = bare("b979010000" + "0f32" + END, regs={0: 7, 2: 7})  # mov ecx, 0x179 | rdmsr
    assert end.rip == CODE + 9
    assert (end.gpr[0], end.gpr[2]) == (0, 0)


def test_cpuid_hides_an_apic_that_is_off():
    # mov ecx, 0x1b | mov eax, 0xfee00100 | xor edx, edx | wrmsr | mov eax, 1 | cpuid
    end = bare("b91b000000" + "b80001e0fe" + "31d2" + "0f30" + "b801000000" + "0fa2" + END)
    assert not end.gpr[2] >> 9 & 1
    assert bare("b801000000" + "0fa2" + END).gpr[2] >> 9 & 1


def test_rf_lasts_for_one_instruction():
    """IRET may set RF; the instruction behind it ends that, and PUSHF never shows it."""
    # mov eax, 0x10; push rax; push 0x70000; push 0x10002; push 8; lea rax, [rip+3]; push rax; iretq
    returns = "b810000000" + "50" + "6800000700" + "6802000100" + "6a08" + "488d0503000000" + "50" + "48cf"
    end = bare(returns + "90" + "eb00" + "9c5b" + END)  # nop; jmp; pushfq; pop rbx
    assert end.gpr[3] == 2
    assert not end.rflags & 1 << 16


def test_interrupts_come_at_the_vectors_that_firmware_gave_them():
    """Interrupt 11, raised through the test device, before anybody has programmed the 8259s: vector 0x73."""
    # mov dx, 0x200b; mov al, 1; out dx, al; hlt
    assert bare("ba0b20" + "b001" + "ee" + "f4", "real", flags=0x202).status == 0x73 << 1 | 1
    assert bare("ba0120" + "b001" + "ee" + "f4", "real", flags=0x202).status == 0x09 << 1 | 1  # interrupt 1


# ---- interrupts ------------------------------------------------------------------------------------------------------


def test_an_nmi_that_comes_in_a_shadow_is_not_lost():
    def setup(vm):
        vm.vcpus[0].context.state.interrupt_shadow = True  # as behind STI
        vm.vcpus[0].inject_nmi()

    end = bare("90" + "ebfe", flags=0x202, setup=setup)  # nop; jmp $
    assert (end.status, end.fault_rip) == (2 << 1 | 1, CODE + 1)


def test_one_nmi_is_remembered_while_another_is_served():
    """SDM vol. 3A, 6.7.1: the handler sends itself three, and gets one."""
    handler = 0x1_9000
    more = {
        # inc ebx; cmp ebx, 1; jne out; mov eax, 0xfee00300; mov ecx, 0x400; mov [rax], ecx three times; out: iretq
        handler: "ffc3" + "83fb01" + "7510" + "b80003e0fe" + "b900040000" + "8908" * 3 + "48cf",
        TABLES + 0x1000 + 24: struct.pack("<Q", 0xC000_0087),
    }

    def setup(vm):
        set_gate(vm, 2, handler)
        vm.lapics[0].mmio_write(0xF0, 4, 0x1FF, 0)

    # xor ebx, ebx; mov eax, 0xfee00300; mov ecx, 0x400; mov [rax], ecx; then a loop of jumps
    code = "31db" + "b80003e0fe" + "b900040000" + "8908" + "b910000000" + "eb00" + "ffc9" + "75fa"
    assert bare(code + END, setup=setup, more=more).gpr[3] == 2


def test_paravirtual_ipis_know_no_broadcast():
    """KVM_HC_SEND_IPI looks up each id (``__pv_send_ipi``): 0xFF and 0xFFFFFFFF are nobody's, and none wraps around."""
    # mov eax, 10; mov ebx, 3; xor ecx, ecx; mov edx, id; mov esi, 0x40; vmcall
    for first, reached in (("ff000000", 0), ("ffffffff", 0), ("01000000", 1), ("00000000", 2)):
        code = "b80a000000" + "bb03000000" + "31c9" + "ba" + first + "be40000000" + "0f01c1"

        def setup(vm):
            for lapic in vm.lapics:
                lapic.mmio_write(0xF0, 4, 0x1FF, 0)

        assert bare(code + END, vcpus=2, setup=setup).gpr[0] == reached, first
