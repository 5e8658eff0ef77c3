"""Lengths and operands of intercepted instructions."""

import pytest
from fake_cpu import FakeCpu

from aiovm.engine.base import Seg, Segment
from aiovm.engine.unicorn.decode import decode, effective_address


@pytest.mark.parametrize(
    ("code", "mode", "length", "opcode"),
    [
        ("0fa2", 64, 2, 0x0FA2),  # cpuid
        ("660fa2", 64, 3, 0x0FA2),  # data16 cpuid
        ("f3480fa2", 64, 4, 0x0FA2),  # rep rex.w cpuid
        ("2e670f31", 32, 4, 0x0F31),  # cs addr32 rdtsc
        ("f4", 16, 1, 0xF4),  # hlt
        ("f390", 64, 2, 0x90),  # pause
        ("cd80", 32, 2, 0xCD),  # int 0x80
        ("66cd80", 32, 3, 0xCD),
        ("cc", 64, 1, 0xCC),
        ("e460", 16, 2, 0xE4),  # in al, 0x60
        ("66ed", 32, 2, 0xED),  # in ax, dx
        ("f3676e", 64, 3, 0x6E),  # rep outs dx, [esi]
        ("0f22d8", 64, 3, 0x0F22),  # mov cr3, rax
        ("450f22c7", 64, 4, 0x0F22),  # mov cr8, r15
        ("0f0130", 32, 3, 0x0F01),  # lmsw [eax]
        ("0f017008", 64, 4, 0x0F01),  # lmsw [rax+8]
        ("0f01b078563412", 64, 7, 0x0F01),  # lmsw [rax+0x12345678]
        ("0f017424f0", 64, 5, 0x0F01),  # lmsw [rsp-0x10]
        ("0f01360010", 16, 5, 0x0F01),  # lmsw [0x1000]
        ("0f01b03412", 16, 5, 0x0F01),  # lmsw [bx+si+0x1234]
        ("0f013578563412", 64, 7, 0x0F01),  # lmsw [rip+0x12345678]
        ("0f01342578563412", 64, 8, 0x0F01),  # lmsw [0x12345678]
        ("0f01f0", 64, 3, 0x0F01),  # lmsw ax
    ],
)
def test_length_and_opcode(code, mode, length, opcode):
    insn = decode(bytes.fromhex(code) + b"\x90" * 8, mode)
    assert insn is not None
    assert (insn.length, insn.opcode) == (length, opcode)


@pytest.mark.parametrize("code", ["", "66", "0f", "0f22", "cd", "0f01b0341200", "0f0174", "f3f3f3"])
def test_cut_off_code_decodes_to_nothing(code):
    assert decode(bytes.fromhex(code), 64) is None


def test_control_register_moves_name_both_registers():
    insn = decode(bytes.fromhex("450f22c7"), 64)  # mov cr8, r15
    assert insn is not None
    assert (insn.reg, insn.rm) == (8, 15)
    insn = decode(bytes.fromhex("0f2319"), 32)  # mov dr3, ecx with mod 0: still a register
    assert insn is not None
    assert (insn.reg, insn.rm, insn.length, insn.is_register) == (3, 1, 3, True)


def test_operand_and_address_sizes():
    sizes = {
        ("6d", 16): (2, 2), ("666d", 16): (4, 2), ("676d", 16): (2, 4), ("6d", 32): (4, 4), ("666d", 32): (2, 4),
        ("676d", 32): (4, 2), ("6d", 64): (4, 8), ("666d", 64): (2, 8), ("676d", 64): (4, 4), ("486d", 64): (8, 8),
        ("48666d", 64): (2, 8),
    }  # fmt: skip
    for (code, mode), expected in sizes.items():
        insn = decode(bytes.fromhex(code), mode)
        assert insn is not None
        assert (insn.operand_size, insn.address_size) == expected, code


def test_prefixes_are_noted():
    insn = decode(bytes.fromhex("f3646e"), 32)  # rep outs dx, fs:[esi]
    assert insn is not None
    assert (insn.rep, insn.segment) == (True, Seg.FS)
    insn = decode(bytes.fromhex("2e6e"), 64)  # CS means nothing in 64-bit mode
    assert insn is not None
    assert insn.segment is None
    insn = decode(bytes.fromhex("f00f22c0"), 32)
    assert insn is not None
    assert insn.lock


@pytest.mark.parametrize(
    ("code", "mode", "address"),
    [
        ("0f0130", 32, 0x1_0000 + 0x100),  # [eax], DS base 0x10000
        ("0f017508", 32, 0x2_0000 + 0x508),  # [ebp+8], SS base 0x20000
        ("3e0f017508", 32, 0x1_0000 + 0x508),
        ("0f01747708", 32, 0x1_0000 + 0x700 + 2 * 0x600 + 8),  # [edi+esi*2+8]
        ("0f0130", 16, 0x1_0000 + 0x300 + 0x600),  # [bx+si]
        ("0f013600f0", 16, 0x1_F000),  # [0xf000]
        ("0f0130", 64, 0x100),  # no DS base
        ("650f0130", 64, 0x9_0100),  # GS base
        ("0f013500100000", 64, 0x7C00 + 7 + 0x1000),  # [rip+0x1000]
    ],
)
def test_effective_address(code, mode, address):
    class Cpu(FakeCpu):
        long_mode = mode == 64

    cpu = Cpu()
    cpu.rip = 0x7C00
    cpu.gpr[0], cpu.gpr[3], cpu.gpr[5], cpu.gpr[6], cpu.gpr[7] = 0x100, 0x300, 0x500, 0x600, 0x700
    cpu.set_segment(Seg.DS, Segment(0x10, 0x1_0000, 0xFFFF_FFFF, 0xCF9300))
    cpu.set_segment(Seg.SS, Segment(0x18, 0x2_0000, 0xFFFF_FFFF, 0xCF9300))
    cpu.set_segment(Seg.GS, Segment(0x20, 0x9_0000, 0xFFFF_FFFF, 0xCF9300))
    insn = decode(bytes.fromhex(code), mode)
    assert insn is not None
    assert effective_address(cpu, insn) == address
