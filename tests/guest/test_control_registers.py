"""Control registers, EFER and the PDPTEs: what is refused, what is kept, and modes that change."""

import struct

import pytest
from bare import (
    CODE,
    DATA,
    END,
    GP,
    PF,
    TABLES,
    bare,
    fault,
)


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
        "b8200600010f22e0",  # PKS  # mov eax, 0x1000620; mov cr4, rax
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
