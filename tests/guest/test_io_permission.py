"""Ports above IOPL, the bitmap of the TSS, and the task register."""

import struct

import pytest
from bare import (
    CODE,
    CODE0,
    DATA,
    DB,
    END,
    GDT,
    GP,
    NP,
    TR,
    TS,
    TSS,
    bare,
    fault,
)

from aiovm.engine.base import Seg

# ---- ports -----------------------------------------------------------------------------------------------------------


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


# ---- the task register -----------------------------------------------------------------------------------------------


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
