"""What the processor checks and the core does not: each case a few instructions of a guest."""

import struct

import pytest
from bare import CODE, CODE0, DATA, DATA0, GDT, HANDLERS, IDT, STACK0, TABLES, TR, TSS, bare

from aiovm.engine.base import Seg
from aiovm.errors import TripleFault

END = "e6f4"  # out 0xf4, al
GP, UD, DB, PF, NP, TS = 13, 6, 1, 14, 11, 10
TF = 0x100


def fault(code, mode="long", **options):
    """(vector, error code, RIP that was pushed)."""
    end = bare(code, mode, **options)
    return end.vector, end.error_code if end.vector in (8, 10, 11, 12, 13, 14, 17) else None, end.fault_rip


# ---- instruction lengths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("0fa2", 2),  # cpuid
        ("66" + "0fa2", 3),  # cpuid
        ("f2f3" + "0fa2", 4),  # cpuid
        ("66" + "0f31", 3),  # rdtsc
        ("0f01f9", 3),  # rdtscp
        ("f3" + "0f01f9", 4),  # rdtscp
        ("66b91b000000" + "90", 7),  # nop
        ("2e" + "0f01c1", 4),  # vmcall
        ("0f01d9", 3),  # vmmcall
        ("0f08", 2),  # invd
        ("0f09", 2),  # wbinvd
    ],
)
def test_prefixes_belong_to_the_instruction(code, length):
    assert bare(code + END).rip == CODE + length + 2


def test_rdmsr_with_a_prefix():
    end = bare("b91b000000" + "66" + "0f32" + END)  # mov ecx, 0x1b | rdmsr
    assert end.rip == CODE + 5 + 3 + 2
    assert end.gpr[0] == 0xFEE0_0900


def test_an_instruction_may_cross_a_page():
    code = "b800000040"  # mov eax, 0x40000000
    end = bare(bytes.fromhex("90" * 0xFF8 + code + "66" * 3 + "0fa2" + END))  # cpuid
    assert end.rip == CODE + 0xFF8 + 5 + 5 + 2
    assert end.gpr[3] == 0x4B4D_564B


# ---- control registers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "48b833000580010000000f22c0",  # a bit above 31  # mov rax, 0x180050033; mov cr0, rax
        "b8330005a00f22c0",  # NW without CD  # mov eax, 0xa0050033; mov cr0, rax
        "b8320005800f22c0",  # PG without PE  # mov eax, 0x80050032; mov cr0, rax
        "b8330005000f22c0",  # PG off in 64-bit code  # mov eax, 0x50033; mov cr0, rax
        "48b800000000000100000f22d8",  # bit 40  # mov rax, 0x10000000000; mov cr3, rax
        "48b800000200000000800f22d8",  # bit 63 without PCID  # mov rax, 0x8000000000020000; mov cr3, rax
        "b8202600000f22e0",  # VMXE  # mov eax, 0x2620; mov cr4, rax
        "b8200602000f22e0",  # PCIDE  # mov eax, 0x20620; mov cr4, rax
        "b8200640000f22e0",  # PKE  # mov eax, 0x400620; mov cr4, rax
        "48b820060000010000000f22e0",  # mov rax, 0x100000620; mov cr4, rax
        "b8000600000f22e0",  # PAE off in long mode  # mov eax, 0x600; mov cr4, rax
        "b810000000440f22c0",  # mov eax, 0x10; mov cr8, rax
        "b9800000c031c031d20f30",  # LME off under paging  # mov ecx, 0xc0000080; xor eax, eax; xor edx, edx; wrmsr
        "b9800000c0b8011d000031d20f30",  # SVME  # mov ecx, 0xc0000080; mov eax, 0x1d01; xor edx, edx; wrmsr
        "b977020000b80604070231d20f30",  # memory type 2  # mov ecx, 0x277; mov eax, 0x02070406; xor edx, edx; wrmsr
        "b9820000c031c0ba008000000f30",  # not canonical  # mov ecx, 0xc0000082; xor eax, eax; mov edx, 0x8000; wrmsr
        "b9030100c031c0ba010000000f30",  # mov ecx, 0xc0000103; xor eax, eax; mov edx, 1; wrmsr
        "b99e0000000f32",  # SMBASE outside SMM  # mov ecx, 0x9e; rdmsr
        "b9452301000f32",  # mov ecx, 0x12345; rdmsr
    ],
)
def test_refused_values_are_general_protection_with_nothing_changed(code):
    end = bare(code)
    assert (end.vector, end.error_code) == (GP, 0)
    last = 4 if code.endswith("440f22c0") else 2 if code.endswith(("0f30", "0f32")) else 3
    assert end.fault_rip == CODE + len(code) // 2 - last
    assert (end.cr0, end.cr3, end.cr4, end.efer) == (0x8001_0033, TABLES, 0x620, 0xD01)


def test_control_registers_take_what_is_offered():
    end = bare("0f20e00dd00001000f22e00f20e3" + END)  # mov rax, cr4; or eax, 0x100d0; mov cr4, rax; mov rbx, cr4
    assert end.gpr[3] == end.cr4 == 0x1_06F0
    end = bare("b83f0005c00f22c00f20c3" + END)  # mov eax, 0xc005003f; mov cr0, rax; mov rbx, cr0
    assert end.gpr[3] == 0xC005_003F
    end = bare("b83b00f9df0f22c00f20c3" + END)  # mov eax, 0xdff9003b; mov cr0, rax; mov rbx, cr0
    assert end.gpr[3] == 0xC001_003B  # reserved bits are dropped


def test_clts_and_lmsw_change_their_bits_only():
    # mov eax, 0xb; lmsw ax; mov rbx, cr0; clts; mov rcx, cr0; smsw dx
    end = bare("b80b0000000f01f00f20c30f060f20c1660f01e2" + END)
    assert (end.gpr[3], end.gpr[1], end.gpr[2] & 0xFFFF) == (0x8001_003B, 0x8001_0033, 0x33)
    end = bare("31c00f01f00f20c3" + END)  # xor eax, eax; lmsw ax; mov rbx, cr0
    assert end.gpr[3] == 0x8001_0031  # PE stays


def test_lmsw_reads_memory():
    end = bare("0f013425000005000f20c3" + END, more={DATA: "0e00"})  # lmsw [0x50000]; mov rbx, cr0
    assert end.gpr[3] == 0x8001_003F
    assert fault("b8000000400f0130") == (PF, 0, CODE + 5)  # mov eax, 0x40000000; lmsw [rax]


def test_lmsw_reads_a_device():
    # mov eax, 0xff000000 | mov word [eax], 0x3b | lmsw [eax]
    assert bare("b8000000ff" + "66c7003b00" + "0f0130" + END, "prot").cr0 & 0xE == 0xA


def test_entering_and_leaving_long_mode():
    """From 32-bit code with paging off: PAE, CR3, EFER.LME, then PG sets LMA; PG off again clears it."""
    code = "b8200600000f22e0b8000002000f22d8"  # mov eax, 0x620; mov cr4, eax; mov eax, 0x20000; mov cr3, eax
    code += "b9800000c0b80001000031d20f30"  # mov ecx, 0xc0000080; mov eax, 0x100; xor edx, edx; wrmsr
    code += "b8330000800f22c00f3289c3"  # mov eax, 0x80000033; mov cr0, eax; rdmsr; mov ebx, eax
    code += "b8330000000f22c00f32"  # mov eax, 0x33; mov cr0, eax; rdmsr
    tables = {TABLES: struct.pack("<Q", TABLES + 0x1007), TABLES + 0x1000: struct.pack("<Q", 0x87)}
    end = bare(code + END, "prot", more=tables)
    assert (end.gpr[3], end.gpr[0]) == (0x500, 0x100)


def test_paging_on_in_long_mode_needs_pae():
    # mov ecx, 0xc0000080; mov eax, 0x100; xor edx, edx; wrmsr; mov eax, 0x80000033; mov cr0, eax
    code = "b9800000c0b80001000031d20f30b8330000800f22c0"
    assert fault(code, "prot")[:2] == (GP, 0)


@pytest.mark.parametrize(
    ("pdpte", "expected"), [(TABLES + 0x1001, None), (TABLES + 0x1003, GP), (0x80_0000_0000_0001, GP)]
)
def test_pae_checks_the_four_pdptes(pdpte, expected):
    # mov eax, 0x620; mov cr4, eax; mov eax, 0x20000; mov cr3, eax; mov eax, 0x80000033; mov cr0, eax
    code = "b8200600000f22e0b8000002000f22d8b8330000800f22c0"
    tables = {TABLES: struct.pack("<Q", pdpte), TABLES + 0x1000: struct.pack("<Q", 0x83)}
    end = bare(code + END, "prot", more=tables)
    assert end.vector == expected
    assert bool(end.cr0 >> 31) == (expected is None)


def test_mov_to_cr3_forgets_translations():
    """The same linear address leads elsewhere after CR3 changes."""
    # mov rbx, [0x200000]; mov eax, 0x30000; mov cr3, rax; mov rcx, [0x200000]
    code = "488b1c2500002000b8000003000f22d8488b0c2500002000" + END
    tables = {
        0x3_0000: struct.pack("<Q", 0x3_1007), 0x3_1000: struct.pack("<Q", 0x3_2007),
        0x3_2000: struct.pack("<2Q", 0x87, 0x87), 0: "1122334455667788", 0x20_0000: "0102030405060708",
    }  # fmt: skip
    end = bare(code, more=tables)
    assert (end.gpr[3], end.gpr[1]) == (0x0807_0605_0403_0201, 0x8877_6655_4433_2211)


# ---- debug registers and single steps ----------------------------------------------------------------------------


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
    end = bare(code, more={HANDLERS + 8 * DB: b"", 0x9000: handler}, setup=lambda vm: _gate(vm, DB, 0x9000))
    assert end.vector is None
    assert (end.gpr[3], end.gpr[1]) == (1, 1)


def _gate(vm, vector, at, *, dpl=0, kind=0xE, ist=0, selector=CODE0):
    gate = at & 0xFFFF | selector << 16 | ist << 32 | (0x80 | dpl << 5 | kind) << 40 | (at >> 16) << 48
    vm.memory.write_u(IDT + 16 * vector, 8, gate)


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
    end = bare("cd42", cpl=3, setup=lambda vm: _gate(vm, 0x42, HANDLERS + 8 * 0x42, dpl=3))  # int 0x42
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


# ---- ports -------------------------------------------------------------------------------------------------------


def _allow(*ports):
    def setup(vm):
        bitmap = bytearray(b"\xff" * 0x2001)
        for port in ports:
            bitmap[port >> 3] &= ~(1 << (port & 7))
        vm.memory.write(TSS + 0x68, bytes(bitmap))
        state = vm.vcpus[0].context.state
        state.set_segment(Seg.TR, state.segment(Seg.TR)._replace(limit=0x68 + 0x2000))

    return setup


@pytest.mark.parametrize("mode", ["long", "prot"])
def test_ports_are_refused_above_iopl(mode):
    code = "b834120000e6e0"  # mov eax, 0x1234; out 0xe0, al
    end = bare(code, mode, cpl=3)
    assert (end.vector, end.error_code, end.fault_rip) == (GP, 0, CODE + 5)
    assert bare("e6f4", mode, cpl=3, flags=0x3002).vector is None  # out 0xf4, al


def test_a_refused_in_leaves_rax_alone():
    end = bare("b878563412e4e0", cpl=3)  # mov eax, 0x12345678; in al, 0xe0
    assert end.vector == GP
    assert end.gpr[0] == 0x1234_560D  # the handler's own AL


def test_the_bitmap_of_the_tss_opens_ports_one_by_one():
    code = "b005e6f4"  # mov al, 5; out 0xf4, al
    assert bare(code, cpl=3, setup=_allow(0xF4)).status == 11
    assert bare(code, cpl=3, setup=_allow(0xF5)).vector == GP
    wide = "66bae000ed" + code  # mov dx, 0xe0; in eax, dx
    assert bare(wide, cpl=3, setup=_allow(0xE0, 0xE1, 0xE2, 0xF4)).vector == GP
    assert bare(wide, cpl=3, setup=_allow(0xE0, 0xE1, 0xE2, 0xE3, 0xF4)).status == 11


def test_a_refused_string_instruction_moves_nothing():
    end = bare("b903000000be0000050066bae000f36e", cpl=3)  # mov ecx, 3; mov esi, 0x50000; mov dx, 0xe0; rep outsb
    assert (end.vector, end.fault_rip) == (GP, CODE + 14)
    assert (end.gpr[1], end.gpr[6]) == (3, 0x5_0000)


def test_strings_go_port_by_port():
    # mov ecx, 4; mov esi, 0x50000; mov edi, 0x50100; mov dx, 0xe0; rep outsb; mov ecx, 4; rep insb
    code = "b904000000be00000500bf0001050066bae000f36eb904000000f36c" + END
    end = bare(code, more={DATA: "11223344"})
    assert (end.gpr[1], end.gpr[6], end.gpr[7]) == (0, 0x5_0004, 0x5_0104)
    assert end.read(DATA + 0x100, 4) == b"\x44" * 4  # the scratch port of the test device


def test_ending_inside_a_string_leaves_between_two_elements():
    # mov ecx, 4; mov esi, 0x50000; mov dx, 0xf4; rep outsb
    end = bare("b904000000be0000050066baf400f36e", more={DATA: "07223344"})
    assert end.status == 15
    assert (end.gpr[1], end.gpr[6], end.rip) == (3, 0x5_0001, CODE + 14)
    # mov ecx, 1; mov esi, 0x50000; mov dx, 0xf4; rep outsb
    end = bare("b901000000be0000050066baf400f36e", more={DATA: "07223344"})
    assert (end.gpr[1], end.rip) == (0, CODE + 16)


# ---- the task register -------------------------------------------------------------------------------------------


def _available(vm):
    vm.memory.write_u(GDT + TR + 5, 1, 0x89)


def test_ltr_marks_the_descriptor_busy():
    end = bare("b8280000000f00d8660f00cb" + END, setup=_available)  # mov eax, 0x28; ltr ax; str bx
    assert end.vector is None
    assert end.read_u(GDT + TR + 5, 1) == 0x8B
    assert end.segments[Seg.TR].flags >> 8 & 0xFF == 0x8B
    assert end.gpr[3] & 0xFFFF == 0x28


def test_ltr_refuses_what_is_no_available_tss():
    assert fault("31c00f00d8") == (GP, 0, CODE + 2)  # xor eax, eax; ltr ax
    assert fault("b8280000000f00d8") == (GP, 0x28, CODE + 5)  # busy  # mov eax, 0x28; ltr ax
    assert fault("b8100000000f00d8") == (GP, 0x10, CODE + 5)  # data  # mov eax, 0x10; ltr ax
    assert fault("b82c0000000f00d8") == (GP, 0x2C, CODE + 5)  # the LDT's  # mov eax, 0x2c; ltr ax
    assert fault("b8380000000f00d8") == (GP, 0x38, CODE + 5)  # 16 bytes do not fit the GDT  # mov eax, 0x38; ltr ax
    absent = lambda vm: vm.memory.write_u(GDT + TR + 5, 1, 0x09)  # noqa: E731
    assert fault("b8280000000f00d8", setup=absent) == (NP, 0x28, CODE + 5)  # mov eax, 0x28; ltr ax


def test_a_call_gate_without_a_valid_tss_ends_no_process():
    """Straight after reset TR holds no task-state segment that the core would take."""
    gate = 0x8000 | CODE0 << 16 | 0xEC00 << 32 | 0 << 48
    # .byte 0x9a; .long 0; .word 0x33
    end = bare("9a000000003300", "prot", cpl=3, more={GDT + 0x30: struct.pack("<Q", gate)})
    assert end.vector in (None, GP, TS, DB)


# ---- events ------------------------------------------------------------------------------------------------------


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
        _gate(vm, PF, 0, ist=1)
        vm.memory.write_u(IDT + 16 * PF + 8, 4, 0x1000)  # offset 63:32
        vm.call_at(3_000_000, lambda: _gate(vm, PF, HANDLERS + 8 * PF))
        vm.call_at(3_000_000, lambda: vm.memory.write_u(IDT + 16 * PF + 8, 4, 0))

    end = bare("b800000040488b00", setup=setup)  # mov eax, 0x40000000; mov rax, [rax]
    assert end.vector == PF
    assert 3_000_000 <= end.now < 3_100_000


def _nmi_at(ns):
    return lambda vm: vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())


def test_an_nmi_wakes_from_hlt_with_interrupts_off():
    end = bare("f4", setup=_nmi_at(10_000))  # hlt
    assert (end.vector, end.fault_rip) == (2, CODE + 1)


def test_a_second_nmi_waits_for_iret():
    """The handler counts, lets the time of the second NMI pass, and only its IRET lets that one in."""
    handler = "ffc3b9a0860100ffc975fc4189d848cf"  # inc ebx; mov ecx, 100000; 1: dec ecx; jnz 1b; mov r8d, ebx; iretq
    code = "f483fb027502e6f4ebfe"  # hlt; cmp ebx, 2; jne 1f; out 0xf4, al; 1: jmp 1b

    def setup(vm):
        _gate(vm, 2, 0x9000)
        for ns in (10_000, 20_000):
            vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())

    end = bare(code, setup=setup, more={0x9000: handler})
    assert (end.gpr[3], end.gpr[8]) == (2, 2)
    assert end.vm.vcpus[0].stat.nmi_injections == 2


def test_three_nmis_while_one_is_served_are_one_more():
    handler = "ffc3b9a0860100ffc975fc48cf"  # inc ebx; mov ecx, 100000; 1: dec ecx; jnz 1b; iretq
    code = "f4b9801a0600ffc975fc" + END  # hlt; mov ecx, 400000; 1: dec ecx; jnz 1b

    def setup(vm):
        _gate(vm, 2, 0x9000)
        for ns in (10_000, 20_000, 30_000, 40_000):
            vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())

    end = bare(code, setup=setup, more={0x9000: handler})
    assert end.gpr[3] == 2


def test_an_nmi_stays_out_of_the_shadow_of_sti():
    """STI; the NMI that arrived before is taken, but never between STI and the instruction behind it."""
    handler = "488b1c2448cf"  # mov rbx, [rsp]; iretq
    loop = "fa90fb9083fb0074f7" + END  # 1: cli; nop; sti; nop; cmp ebx, 0; je 1b
    end = bare(loop, setup=lambda vm: (_gate(vm, 2, 0x9000), _nmi_at(7_003)(vm)), more={0x9000: handler})
    assert end.gpr[3] != CODE + 3


# ---- system management mode --------------------------------------------------------------------------------------


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
        _gate(vm, 2, 0x9000)
        _smi_at(5_000)(vm)
        _nmi_at(8_000)(vm)

    end = bare(code, setup=setup, more={0x3_8000: handler, 0x9000: nmi})
    assert end.gpr[3] == 2
    assert end.read_u(0x3_F000, 4) == 1


def test_rsm_to_a_state_that_cannot_be_is_a_shutdown():
    handler = "2e66c70658ff000000800faa"  # CR0: PG without PE  # mov dword ptr cs:[0xff58], 0x80000000; rsm
    with pytest.raises(TripleFault):
        bare("ebfe", setup=_smi_at(5_000), more={0x3_8000: handler})  # 1: jmp 1b


# ---- what CPUID does not offer, and lengths ---------------------------------------------------------------------


@pytest.mark.parametrize("code", ["0fc7f0", "480fc7f1", "660fc7f7"])
def test_rdrand_does_not_exist(code):
    """Its answers would be the host's, and no run could be repeated."""
    assert fault(code) == (UD, None, CODE)


@pytest.mark.parametrize(("prefixes", "length"), [("", 2), ("66", 3), ("2e48", 4), ("f266", 4)])
def test_syscall_returns_behind_its_prefixes(prefixes, length):
    def targets(vm):
        vm.vcpus[0].msrs.write(0xC000_0081, CODE0 << 32)
        vm.vcpus[0].msrs.write(0xC000_0082, 0x9000)

    end = bare(prefixes + "0f05", setup=targets, more={0x9000: END})
    assert (end.gpr[1], end.rip) == (CODE + length, 0x9002)


def test_sysenter_goes_where_it_should_whatever_its_prefixes():
    def targets(vm):
        for msr, value in ((0x174, CODE0), (0x175, STACK0), (0x176, 0x9000)):
            vm.vcpus[0].msrs.write(msr, value)

    assert bare("662e" + "0f34", setup=targets, more={0x9000: END}).rip == 0x9002


# ---- interrupts that an instruction brings to its own CPU --------------------------------------------------------


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


# ---- stores of system registers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "mode", "value"),
    [
        ("660f01e0", "long", 0xFFFF_FFFF_FFFF_0033),  # smsw ax
        ("0f01e0", "long", 0x8001_0033),  # smsw eax
        ("480f01e0", "long", 0x8001_0033),  # smsw rax
        ("660f01e0", "real", 0x10),  # smsw eax
        ("660f00c8", "long", 0xFFFF_FFFF_FFFF_0028),  # str ax
        ("0f00c8", "long", 0x28),  # str eax
        ("480f00c0", "long", 0),  # sldt rax
        ("0f20c0", "long", 0x8001_0033),  # mov rax, cr0
    ],
)
def test_system_registers_to_a_register(code, mode, value):
    end = bare(code + END, mode, regs={0: (1 << 64) - 1})
    assert end.gpr[0] == value
    assert end.rip == CODE + len(code) // 2 + 2


@pytest.mark.parametrize(
    ("code", "mode", "stored"),
    [
        ("0f010425", "long", "3f00" + "0000010000000000"),  # sgdt [0x50000]
        ("0f010c25", "long", "ff0f" + "0010010000000000"),  # sidt [0x50000]
        ("0f010d", "prot", "ff07" + "00100100"),  # sidt [0x50000]
        ("660f0105", "prot", "3f00" + "00000100"),  # sgdt [0x50000], base of 24 bits
        ("480f012425", "long", "3300"),  # smsw [0x50000]
        ("480f000c25", "long", "2800"),  # str [0x50000]
    ],
)
def test_system_registers_to_memory(code, mode, stored):
    end = bare(code + "00000500" + END, mode, more={DATA: "cc" * 16})
    assert end.read(DATA, 16).hex() == stored.ljust(32, "c")


def test_the_base_of_24_bits():
    def high(vm):
        state = vm.vcpus[0].context.state
        state.gdt = state.gdt._replace(base=0x1234_5678)

    end = bare("660f0105" + "00000500" + END, "prot", setup=high)  # sgdt [0x50000] with an operand size of 16 bits
    assert end.read(DATA, 6).hex() == "3f00" + "78563400"


def test_a_system_register_that_cannot_be_stored():
    # mov eax, 0x40000000; sgdt [rax]
    assert fault("b800000040" + "0f0100") == (PF, 2, CODE + 5)
    # mov ebx, 0xff000000; smsw [rbx]; mov eax, [rbx]: the test device's memory
    tables = {TABLES + 0x1000 + 24: struct.pack("<Q", 0xC000_0087)}
    end = bare("bb000000ff" + "0f0123" + "8b03" + END, more=tables)
    assert end.gpr[0] == 0x33


UMIP = {"sgdt": "0f010425", "sidt": "0f010c25", "sldt": "0f000425", "str": "0f000c25", "smsw": "0f012425"}


@pytest.mark.parametrize("name", UMIP)
def test_umip(name):
    """CPUID.7:ECX.UMIP and CR4.UMIP (bit 11): outside CPL 0 the five instructions are #GP(0)."""
    code = UMIP[name] + "00000500"

    def forbid(vm):
        vm.vcpus[0].context.state.cr4 |= 0x800

    end = bare(code + "cd40", cpl=3)
    assert end.vector == GP  # INT 0x40 from CPL 3: the instruction passed
    assert end.error_code == 0x202
    assert fault(code, cpl=3, setup=forbid) == (GP, 0, CODE)
    assert fault(code + "0f0b", setup=forbid) == (UD, None, CODE + len(code) // 2)


def test_umip_is_offered():
    # mov eax, 7; xor ecx, ecx; cpuid; mov rax, cr4; bts eax, 11; mov cr4, rax
    end = bare("b807000000" + "31c9" + "0fa2" + "0f20e0" + "0fbae80b" + "0f22e0" + END)
    assert end.gpr[1] & 4
    assert end.cr4 == 0xE20


# ---- SMAP --------------------------------------------------------------------------------------------------------

SMAP, AC = 1 << 21, 1 << 18
READ, WRITE, STAC, CLAC = "8b0425", "890425", "0f01cb", "0f01ca"  # mov eax, [m]; mov [m], eax
USER_PAGE = "00002000"  # 0x200000; in these tests the page below is the supervisor's


def smap(vm):
    vm.vcpus[0].context.state.cr4 |= SMAP
    vm.memory.write_u(TABLES + 0x2000, 8, 0x83)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (READ + USER_PAGE, 1),
        (WRITE + USER_PAGE, 3),
        (STAC + CLAC + READ + USER_PAGE, 1),
    ],
)
def test_smap_keeps_the_supervisor_from_user_pages(code, error):
    assert fault(code, setup=smap) == (PF, error, CODE + len(code) // 2 - 7)


@pytest.mark.parametrize("code", [STAC + READ + USER_PAGE, STAC + WRITE + USER_PAGE, READ + "00000500"])
def test_smap_lets_pass(code):
    assert bare(code + END, setup=smap).vector is None


def test_smap_looks_at_ac_and_at_cr4():
    assert bare(READ + USER_PAGE + END, setup=smap, flags=AC | 2).vector is None
    # mov eax, 0x200000; mov rbx, cr4; btr ebx, 21; mov cr4, rbx; mov ecx, [rax]; then bts, and the same again
    code = "b800002000" + "0f20e3" + "0fbaf315" + "0f22e3" + "8b08" + "0fbaeb15" + "0f22e3" + "8b08"
    assert fault(code, setup=smap) == (PF, 1, CODE + len(code) // 2 - 2)


def test_smap_covers_stores_that_are_answered_here():
    code = "0f010425" + USER_PAGE  # sgdt [0x200000]
    assert fault(code, setup=smap) == (PF, 3, CODE)
    assert bare(STAC + code + END, setup=smap).vector is None


def test_stac_and_clac():
    assert bare(STAC + END).rflags == AC | 2
    assert bare(CLAC + END, flags=AC | 2).rflags == 2
    assert fault(STAC, cpl=3) == (UD, None, CODE)
    assert fault(CLAC, cpl=3) == (UD, None, CODE)


# ---- XSAVE -------------------------------------------------------------------------------------------------------

XGETBV, XSETBV = "0f01d0", "0f01d1"
XSAVE, XRSTOR, XSAVEOPT = "0fae2425", "0fae2c25", "0fae3425"  # [m]


def osxsave(vm):
    vm.vcpus[0].context.state.cr4 |= 1 << 18


@pytest.mark.parametrize("value", [1, 3])
def test_xcr0_takes_what_is_offered(value):
    # xor ecx, ecx; xor edx, edx; mov eax, value; xsetbv; xor eax, eax; xgetbv
    code = "31c9" + "31d2" + f"b8{value:02x}000000" + XSETBV + "31c0" + XGETBV
    end = bare(code + END, setup=osxsave, look=lambda vm: vm.vcpus[0].get_xcrs().xcr0)
    assert (end.gpr[0], end.gpr[2], end.extra) == (value, 0, value)


@pytest.mark.parametrize("value", [0, 2, 5, 7, 0x203])
def test_xcr0_refuses_the_rest(value):
    code = "31c9" + "31d2" + f"b8{value.to_bytes(4, 'little').hex()}" + XSETBV
    assert fault(code, setup=osxsave) == (GP, 0, CODE + 9)


def test_xcr0_after_reset_is_x87():
    assert bare("31c9" + XGETBV + END, setup=osxsave).gpr[0] == 1  # xor ecx, ecx


def test_xsave_needs_its_permission():
    for code in (XGETBV, XSETBV, XSAVE + "00000500", XRSTOR + "00000500", XSAVEOPT + "00000500"):
        assert fault(code) == (UD, None, CODE)
    assert fault("31c931d2b803000000" + XSETBV, setup=osxsave, cpl=3) == (GP, 0, CODE + 9)
    assert fault("b902000000" + XGETBV, setup=osxsave) == (GP, 0, CODE + 5)  # there is no XCR2
    assert fault(XSAVE + "08000500", setup=osxsave) == (GP, 0, CODE)  # not on 64 bytes
    assert fault("0fc72425" + "00000500", setup=osxsave) == (UD, None, CODE)  # xsavec


@pytest.mark.parametrize("save", [XSAVE, XSAVEOPT])
def test_xsave_and_xrstor(save):
    """x87 and SSE go out and come back; what RFBM or XSTATE_BV leaves out is the initial state, or stays."""
    setup = "31c931d2b803000000" + XSETBV  # XCR0: both
    setup += "dbe3d9e8" + "b878563412660f6ec8"  # fninit; fld1; mov eax, 0x12345678; movd xmm1, eax
    code = setup + "b803000000" + save + "00000500"
    code += "ddd8660fefc9" + XRSTOR + "00000500"  # fstp st; pxor xmm1, xmm1; xrstor
    code += "660f7ecb" + "dd1c2500080500"  # movd ebx, xmm1; fstp qword [0x50800]
    end = bare(code + END, setup=osxsave, more={DATA: "cc" * 512 + "00" * 64 + "cc" * 448})
    assert end.gpr[3] == 0x1234_5678
    assert end.read(DATA + 0x800, 8) == struct.pack("<d", 1.0)
    assert end.read_u(DATA + 512, 8) & 3 == 3  # XSTATE_BV
    assert end.read_u(DATA + 160 + 16, 4) == 0x1234_5678  # XMM1's place
    assert end.read(DATA + 576, 8) == b"\xcc" * 8  # no further state
    # XRSTOR of SSE alone with XSTATE_BV 0: the initial state, and x87's stack stays.
    code = setup + "b802000000" + XRSTOR + "00000500" + "660f7ecb" + "dd1c2500080500"
    end = bare(code + END, setup=osxsave, more={DATA: bytes(24) + b"\x80\x1f" + bytes(1024)})
    assert end.gpr[3] == 0
    assert end.read(DATA + 0x800, 8) == struct.pack("<d", 1.0)


def test_cpuid_tells_osxsave():
    code = "b801000000" + "31c9" + "0fa2" + END  # mov eax, 1; xor ecx, ecx; cpuid
    assert bare(code).gpr[1] >> 26 & 3 == 1
    assert bare(code, setup=osxsave).gpr[1] >> 26 & 3 == 3


@pytest.mark.parametrize("code", ["660fae3c25", "660fae3425"])
def test_clflushopt_and_clwb_are_executed(code):
    assert bare(code + "00000500" + END).rip == CODE + 9 + 2  # [0x50000]


# ---- stack faults and shadows ------------------------------------------------------------------------------------

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
            _gate(vm, number, HANDLERS + 8 * number, ist=1)

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


# ---- descriptor tables -------------------------------------------------------------------------------------------


def _ldt(base=0x1234_5678_9000, type_=0x82, upper=0):
    def setup(vm):
        low = 0x2F | (base & 0xFF_FFFF) << 16 | type_ << 40 | (base >> 24 & 0xFF) << 56
        vm.memory.write_u(GDT + 0x28, 8, low)
        vm.memory.write_u(GDT + 0x30, 8, base >> 32 & 0xFFFF_FFFF | upper << 40)

    return setup


def test_lldt():
    end = bare("b828000000" + "0f00d0" + "0f00c3" + END, setup=_ldt())  # mov eax, 0x28; lldt ax; sldt ebx
    ldt = end.segments[Seg.LDTR]
    assert (ldt.selector, ldt.base, ldt.limit, end.gpr[3]) == (0x28, 0x1234_5678_9000, 0x2F, 0x28)
    end = bare("b828000000" + "0f00d0" + "31c0" + "0f00d0" + END, setup=_ldt())  # then lldt of 0
    assert end.segments[Seg.LDTR].selector == 0


@pytest.mark.parametrize(
    ("selector", "setup", "expected"),
    [
        (0x2C, _ldt(), (GP, 0x2C)),  # the LDT's
        (0x38, _ldt(), (GP, 0x38)),  # 16 bytes do not fit
        (0x28, _ldt(type_=0x89), (GP, 0x28)),  # a task-state segment
        (0x28, _ldt(type_=0x02), (NP, 0x28)),
        (0x28, _ldt(upper=2), (GP, 0x28)),
        (0x28, _ldt(base=1 << 47), (GP, 0x28)),  # not canonical
        (0x28, _ldt(base=0x00FF_8000_0000_0000), (GP, 0x28)),
    ],
)
def test_lldt_refuses(selector, setup, expected):
    assert fault(f"b8{selector:02x}000000" + "0f00d0", setup=setup) == (*expected, CODE + 5)


@pytest.mark.parametrize("base", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 0x00AA_AAAA_AAAA_AAAA])
def test_bases_that_are_not_canonical(base):
    """LTR faults with the selector, LGDT and LIDT with 0; nothing changes."""
    assert fault("b828000000" + "0f00d8", setup=_ldt(base=base, type_=0x89)) == (GP, 0x28, CODE + 5)
    table = {DATA: struct.pack("<HQ", 0x1234, base)}
    for code in ("0f011425", "0f011c25"):  # lgdt, lidt [0x50000]
        assert fault(code + "00000500", more=table) == (GP, 0, CODE)


def test_lgdt_and_lidt():
    table = {DATA: struct.pack("<HQ", 0xFFF, IDT), DATA + 16: struct.pack("<HQ", 0x2F, GDT)}
    # lidt [0x50000]; lgdt [0x50010]; sidt [0x50020]; sgdt [0x50030]
    code = "0f011c2500000500" + "0f01142510000500" + "0f010c2520000500" + "0f01042530000500"
    end = bare(code + END, more=table)
    assert end.read(DATA + 32, 10) == table[DATA]
    assert end.read(DATA + 48, 10) == table[DATA + 16]
    # 32-bit code, then with an operand size of 16 bits, which takes 24 bits of the base: sgdt [0x50020] after each
    for prefix, base in (("", 0x8765_4321), ("66", 0x65_4321)):
        code = prefix + "0f011500000500" + "0f010520000500"
        end = bare(code + END, "prot", more={DATA: struct.pack("<HI", 0x2F, 0x8765_4321)})
        assert end.read(DATA + 32, 6) == struct.pack("<HI", 0x2F, base)
    assert fault("b800000040" + "0f0110") == (PF, 0, CODE + 5)  # mov eax, 0x40000000; lgdt [rax]
    assert fault("0f011425" + "00000500", cpl=3) == (GP, 0, CODE)


# ---- interrupts --------------------------------------------------------------------------------------------------


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
        _gate(vm, 2, handler)
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
