"""Debug registers, breakpoints, single steps, and instructions that are privileged or not there."""

import struct

import pytest
from bare import (
    CODE,
    DATA,
    DATA0,
    DB,
    END,
    GP,
    HANDLERS,
    STACK0,
    TSS,
    UD,
    bare,
    fault,
    set_gate,
)

TF = 0x100


# ---- debug registers and single steps --------------------------------------------------------------------------------


def test_debug_registers_keep_their_fixed_bits():
    # xor eax, eax; mov dr6, rax; mov rbx, dr6; mov dr7, rax; mov rcx, dr7; mov eax, -1; mov dr6, rax; mov rdx, dr6
    end = bare("31c00f23f00f21f30f23f80f21f9b8ffffffff0f23f00f21f2" + END)
    assert (end.gpr[3], end.gpr[1], end.gpr[2]) == (0xFFFF_0FF0, 0x400, 0xFFFF_EFFF)


def test_dr4_is_dr6_unless_debugging_extensions_are_on():
    assert bare("0f21e3" + END).gpr[3] == 0xFFFF_0FF0  # mov rbx, dr4
    code = "b8280600000f22e0" + "0f21e3"  # mov eax, 0x628; mov cr4, rax
    assert fault(code)[0] == UD


@pytest.mark.parametrize("register", ["0f23f0", "0f23f8"])
def test_upper_halves_of_dr6_and_dr7_are_reserved(register):
    code = "48b80000000001000000" + register  # mov rax, 0x100000000
    assert fault(code) == (GP, 0, CODE + 10)


def test_general_detect_faults_before_the_access():
    code = "b8002400000f23f8" + "0f21c3" + END  # mov eax, 0x2400; mov dr7, rax | mov rbx, dr0
    end = bare(code)
    assert (end.vector, end.fault_rip) == (DB, CODE + 8)
    assert end.dr[6] == 0xFFFF_2FF0
    assert end.dr[7] == 0x400  # GD is clear in the handler


def test_single_step_follows_each_kind_of_instruction():
    # nop | cpuid | mov rax, cr0; mov cr0, rax | rdtsc
    for code, length in (("90", 1), ("0fa2", 2), ("0f20c00f22c0", 3), ("0f31", 2)):
        end = bare(code + END, flags=TF | 2)
        assert (end.vector, end.fault_rip) == (DB, CODE + length)
        assert end.dr[6] == 0xFFFF_4FF0
        assert end.pushed_flags & TF
        assert not end.rflags & TF


def test_instruction_breakpoint_is_a_fault_and_rf_passes_it():
    # mov eax, 0x8012; mov dr0, rax; mov eax, 0x402; mov dr7, rax; nop; nop
    setup = "b8128000000f23c0b8020400000f23f89090"  # the nop at 0x8010, 0x8011
    code = setup + "ffc3" + END  # inc ebx
    end = bare(code)
    assert (end.vector, end.fault_rip, end.gpr[3]) == (DB, CODE + 0x12, 0)
    assert end.dr[6] & 0xF == 1
    assert not end.pushed_flags & 0x1_0000
    # A handler that sets RF in the image goes past it.
    handler = "814c241000000100ffc148cf"  # or dword ptr [rsp+0x10], 0x10000; inc ecx; iretq
    end = bare(code, more={HANDLERS + 8 * DB: b"", 0x9000: handler}, setup=lambda vm: set_gate(vm, DB, 0x9000))
    assert end.vector is None
    assert (end.gpr[3], end.gpr[1]) == (1, 1)


@pytest.mark.parametrize(
    ("dr7", "access", "hit"),
    [
        (0xD0_0404, "89042500000500", 2),  # write, 4 bytes  # mov dword ptr [0x50000], eax
        (0xD0_0404, "8b042500000500", 0),  # mov eax, dword ptr [0x50000]
        (0xF0_0404, "8b042500000500", 2),  # read or write  # mov eax, dword ptr [0x50000]
        (0xD0_0404, "88042503000500", 2),  # mov byte ptr [0x50003], al
        (0xD0_0404, "88042504000500", 0),  # mov byte ptr [0x50004], al
        (0xD0_0404, "48890425fcff0400", 2),  # overlaps  # mov qword ptr [0x4fffc], rax
        (0x90_0404, "88042507000500", 2),  # 8 bytes  # mov byte ptr [0x50007], al
        (0x10_0404, "88042501000500", 0),  # 1 byte  # mov byte ptr [0x50001], al
    ],
)
def test_data_breakpoints_are_traps(dr7, access, hit):
    # mov ecx, 0x50000; mov dr1, rcx | mov dr7, rcx
    code = "b9000005000f23c9" + "b9" + struct.pack("<I", dr7).hex() + "0f23f9" + access + END
    end = bare(code)
    assert end.vector == (DB if hit else None)
    if hit:
        assert end.fault_rip == CODE + 16 + len(access) // 2
        assert end.dr[6] & 0xF == hit


def test_int1_and_into_and_int3_push_the_next_rip():
    assert fault("f1") == (DB, None, CODE + 1)
    assert fault("66f1") == (DB, None, CODE + 2)
    assert fault("cc") == (3, None, CODE + 1)  # int3
    assert fault("66cc") == (3, None, CODE + 2)
    assert fault("b07f0401ce", "prot") == (4, None, CODE + 5)  # mov al, 0x7f; add al, 1; into
    assert bare("31c0ce" + END, "prot").vector is None  # xor eax, eax; into


def test_int_n_needs_the_gate_to_allow_it():
    assert fault("cd42", cpl=3) == (GP, 0x42 << 3 | 2, CODE)  # int 0x42
    end = bare("cd42", cpl=3, setup=lambda vm: set_gate(vm, 0x42, HANDLERS + 8 * 0x42, dpl=3))  # int 0x42
    assert (end.vector, end.fault_rip, end.gpr[4]) == (0x42, CODE + 2, STACK0 - 40)


@pytest.mark.parametrize(
    "code",
    [
        "0f01c8",  # monitor
        "0f01c9",  # mwait
        "0fc7f0",  # rdrand
        "0fc7f8",  # rdseed
        "660f38f6c1",  # adcx
        "0faa",  # rsm
        "0f0b",  # ud2
        "0f01d8",  # vmrun
        "0f01ee",  # rdpkru
    ],
)
def test_instructions_that_this_cpu_has_not_are_undefined(code):
    assert fault(code)[0] == UD


def test_rdpmc_faults_as_without_a_pmu():
    assert fault("0f33") == (GP, 0, CODE)  # rdpmc


@pytest.mark.parametrize(
    "code",
    [
        "0f08",  # invd
        "0f09",  # wbinvd
        "0f06",  # clts
        "0f01f0",  # lmsw ax
        "0f22d8",  # mov cr3, rax
        "0f21c0",  # mov rax, dr0
        "0f00d8",  # ltr ax
        "f4",  # hlt
        "0f32",  # rdmsr
        "0f0110",  # lgdt [rax]
        "fa",  # cli
    ],
)
def test_privileged_instructions(code):
    assert fault(code, cpl=3, regs={0: DATA}) == (GP, 0, CODE)


# ---- stack faults and shadows ----------------------------------------------------------------------------------------

FAR = 0x8000_0000_0000  # not canonical


@pytest.mark.parametrize(
    ("code", "register", "vector"),
    [
        ("8b0424", 4, 12),  # mov eax, [rsp]
        ("8b442408", 4, 12),  # mov eax, [rsp+8]
        ("8b4500", 5, 12),  # mov eax, [rbp]
        ("488945f8", 5, 12),  # mov [rbp-8], rax
        ("0fb64500", 5, 12),  # movzx eax, byte [rbp]
        ("418b4500", 13, GP),  # mov eax, [r13]: DS
        ("8b00", 0, GP),  # mov eax, [rax]
        ("8b0428", 5, GP),  # mov eax, [rax+rbp]: an index names no stack
        ("648b4500", 5, GP),  # mov eax, fs:[rbp]
        ("50", 4, 12),  # push rax
        ("58", 4, 12),  # pop rax
        ("9c", 4, 12),  # pushfq
        ("ff30", 4, 12),  # push [rax]
        ("8f00", 4, 12),  # pop [rax]
        ("e800000000", 4, 12),  # call
        ("ffd0", 4, 12),  # call rax
        ("c3", 4, 12),  # ret
        ("c9", 5, 12),  # leave
    ],
)
def test_a_stack_address_that_is_not_canonical_is_ss(code, register, vector):
    """SDM vol. 3A, 6.15, interrupts 12 and 13. The handlers have a stack of their own (IST 1)."""

    def setup(vm):
        vm.memory.write_u(TSS + 36, 8, STACK0)
        for number in (12, 13):
            set_gate(vm, number, HANDLERS + 8 * number, ist=1)

    regs = {0: DATA} | {register: FAR + 0x1000}
    assert fault(code, regs=regs, setup=setup) == (vector, 0, CODE)


@pytest.mark.parametrize(
    ("code", "hit"),
    [
        ("8ed0" + "90" + "f4", False),  # mov ss, ax; nop
        ("fb" + "90" + "f4", True),  # sti; nop
        ("8ed8" + "90" + "f4", True),  # mov ds, ax; nop
    ],
)
def test_a_load_of_ss_holds_an_instruction_breakpoint_back(code, hit):
    """The one on the next instruction (SDM vol. 3A, 6.8.3)."""

    def setup(vm):
        vcpu = vm.vcpus[0]
        vcpu.context.state.set_dr(0, CODE + code.index("90") // 2)
        vcpu.context.state.set_dr(7, 0x402)
        vcpu.update_debug()

    end = bare(code.replace("f4", END), regs={0: DATA0}, setup=setup)
    assert (end.vector == DB) is hit


@pytest.mark.parametrize(
    ("code", "rip"),
    [
        ("90" + "90", CODE + 8),  # nop: behind it
        ("f1" + "90", CODE + 8),  # int1: one #DB for both
        ("2ef1" + "90", CODE + 9),  # with a prefix
        ("cc" + "90", HANDLERS + 8 * 3),  # int3: #BP first, and then at its handler
    ],
)
def test_a_load_of_ss_holds_its_data_breakpoint_back(code, rip):
    load = "8e142500000500"  # mov ss, [0x50000]

    def setup(vm):
        vcpu = vm.vcpus[0]
        vcpu.context.state.set_dr(1, DATA)
        vcpu.context.state.set_dr(7, 0xF0_0408)  # 4 bytes, read or written
        vcpu.update_debug()

    end = bare(load + code + END, more={DATA: "10000000"}, setup=setup, look=lambda vm: vm.vcpus[0].held_hits)
    assert (end.vector, end.fault_rip, end.dr[6] & 0xF, end.extra) == (DB, rip, 2, 0)
