"""Descriptor tables: loaded, refused, stored, and UMIP."""

import struct

import pytest
from bare import (
    CODE,
    DATA,
    END,
    GDT,
    GP,
    IDT,
    NP,
    PF,
    TABLES,
    UD,
    bare,
    fault,
)

from aiovm.engine.base import Seg

# ---- stores of system registers --------------------------------------------------------------------------------------


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


# ---- descriptor tables -----------------------------------------------------------------------------------------------


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
