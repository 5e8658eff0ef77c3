"""SMAP and XSAVE."""

import struct

import pytest
from bare import (
    CODE,
    DATA,
    END,
    GP,
    PF,
    TABLES,
    UD,
    bare,
    fault,
)

# ---- SMAP ------------------------------------------------------------------------------------------------------------

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


# ---- XSAVE -----------------------------------------------------------------------------------------------------------

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
