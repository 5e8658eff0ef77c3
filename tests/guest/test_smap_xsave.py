"""SMAP, protection keys and XSAVE (SDM vol. 3A, 4.6; vol. 1, 13)."""

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
    prepare,
)

from aiovm.kvm_structs import MpState

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


# ---- protection keys -------------------------------------------------------------------------------------------------

PKE, KEY = 1 << 22, 5
RDPKRU, WRPKRU = "0f01ee", "0f01ef"
CLEAR = "31c9" + "31d2"  # xor ecx, ecx; xor edx, edx
AD, WD = 1 << 2 * KEY, 2 << 2 * KEY


def rights(pkru):
    """WRPKRU of ``pkru``."""
    return CLEAR + f"b8{pkru.to_bytes(4, 'little').hex()}" + WRPKRU


def pke(vm, supervisors=False):
    """The page at 0x200000 has the key; user code runs from the one below, which has key 0."""
    vm.vcpus[0].context.state.cr4 |= PKE
    vm.memory.write_u(TABLES + 0x2008, 8, 0x20_0083 | (0 if supervisors else 4) | KEY << 59)


def without_wp(vm):
    pke(vm)
    vm.vcpus[0].context.state.cr0 &= ~(1 << 16)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("pkru", "code", "error"), [(AD, READ, 0x21), (AD, WRITE, 0x23), (WD, WRITE, 0x23), (AD | WD, WRITE, 0x23)]
)
def test_a_key_keeps_data_accesses_out(cpl, pkru, code, error):
    program = rights(pkru) + code + USER_PAGE
    error |= 4 if cpl else 0
    assert fault(program, setup=pke, cpl=cpl) == (PF, error, CODE + len(program) // 2 - 7)


@pytest.mark.parametrize(
    ("pkru", "code", "setup"),
    [
        (WD, READ, pke),
        (0xFFFF_FFFC & ~(AD | WD), WRITE, pke),  # other keys' rights, but for the stack's and the code's, which is 0
        (AD | WD, READ, lambda vm: pke(vm, supervisors=True)),
        (WD, WRITE, without_wp),
    ],
    ids=["read", "others", "supervisor's page", "without WP"],
)
def test_a_key_lets_pass(pkru, code, setup):
    assert bare(rights(pkru) + code + USER_PAGE + END, setup=setup).vector is None


def test_without_wp_a_key_still_keeps_reads_out_and_user_writes():
    program = rights(AD) + READ + USER_PAGE
    assert fault(program, setup=without_wp)[:2] == (PF, 0x21)
    program = rights(WD) + WRITE + USER_PAGE
    assert fault(program, setup=without_wp, cpl=3)[:2] == (PF, 0x27)


def test_keys_say_nothing_of_fetches():
    # mov byte [0x200000], c3; wrpkru; call 0x200000
    program = "c6042500002000c3" + rights(AD) + "b900002000" + "ffd1"
    assert bare(program + END, setup=pke).vector is None


def test_rights_count_at_once_and_back():
    # A read, rights taken, given back: the TLB knows the page each time.
    program = READ + USER_PAGE + rights(AD) + rights(0) + READ + USER_PAGE + rights(AD) + READ + USER_PAGE
    assert fault(program, setup=pke) == (PF, 0x21, CODE + len(program) // 2 - 7)


def test_keys_cover_stores_that_are_answered_here():
    program = rights(WD) + "0f010425" + USER_PAGE  # sgdt [0x200000]
    assert fault(program, setup=pke) == (PF, 0x23, CODE + len(program) // 2 - 8)
    assert bare(rights(0) + "0f010425" + USER_PAGE + END, setup=pke).vector is None


def test_rdpkru_and_wrpkru():
    end = bare(rights(0x8765_4320) + "31c0" + "83caff" + RDPKRU + END, setup=pke)  # xor eax, eax; or edx, -1; rdpkru
    assert (end.gpr[0], end.gpr[2]) == (0x8765_4320, 0)
    assert bare(CLEAR + RDPKRU + END, setup=pke, regs={0: 7}).gpr[0] == 0  # after reset
    for code in (RDPKRU, WRPKRU):
        assert fault(code) == (UD, None, CODE)  # without CR4.PKE
        assert fault("f0" + code, setup=pke) == (UD, None, CODE)
        assert fault(code, setup=pke, regs={1: 1}) == (GP, 0, CODE)
    assert fault(WRPKRU, setup=pke, regs={2: 1}) == (GP, 0, CODE)


def test_pke_is_the_guests_to_set_and_cpuid_tells():
    # mov rax, cr4; bts eax, 22; mov cr4, rax; mov eax, 7; xor ecx, ecx; cpuid
    code = "0f20e0" + "0fbae816" + "0f22e0" + "b807000000" + "31c9" + "0fa2" + END
    end = bare(code)
    assert end.cr4 & PKE
    assert end.gpr[1] >> 3 & 3 == 3
    assert bare("b807000000" + "31c9" + "0fa2" + END).gpr[1] >> 3 & 3 == 1


def test_vcpus_with_other_rights_do_not_share_translations():
    """The first reads the page again and again, the second may not; both have the same tables."""

    def setup(vm):
        pke(vm)
        prepare(vm, "long", index=1)
        first, second = (cpu.context.state for cpu in vm.vcpus)
        vm.memory.write_u(TABLES + 0x2008, 8, 0x20_0087 | KEY << 59)
        first.rip, second.rip = CODE + 0x100, CODE
        second.gpr[4] -= 0x1000
        second.cr4 |= PKE
        second.pkru = AD
        vm.vcpus[1].set_mp_state(MpState.RUNNABLE)

    # The first reads for ever. The second: mov ecx, 10000; dec ecx; jnz; read; mov al, 0x55.
    second = "b910270000" + "ffc9" + "75fc" + READ + USER_PAGE + "b055" + END
    first = READ + USER_PAGE + "ebf7"
    end = bare(second, setup=setup, vcpus=2, more={CODE + 0x100: first}, look=lambda vm: vm.vcpus[1].arch.cr2)
    assert (end.status, end.extra) == (PF << 1 | 1, 0x20_0000)


# ---- XSAVE -----------------------------------------------------------------------------------------------------------

XGETBV, XSETBV = "0f01d0", "0f01d1"
XSAVE, XRSTOR, XSAVEOPT = "0fae2425", "0fae2c25", "0fae3425"  # [m]


def osxsave(vm):
    vm.vcpus[0].context.state.cr4 |= 1 << 18


def both(vm):
    pke(vm)
    osxsave(vm)


@pytest.mark.parametrize("value", [1, 3, 0x201, 0x203])
def test_xcr0_takes_what_is_offered(value):
    # xor ecx, ecx; xor edx, edx; mov eax, value; xsetbv; xor eax, eax; xgetbv
    code = "31c9" + "31d2" + f"b8{value.to_bytes(4, 'little').hex()}" + XSETBV + "31c0" + XGETBV
    end = bare(code + END, setup=osxsave, look=lambda vm: vm.vcpus[0].get_xcrs().xcr0)
    assert (end.gpr[0], end.gpr[2], end.extra) == (value, 0, value)


@pytest.mark.parametrize("value", [0, 2, 5, 7, 0x202, 0x207])
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


def test_xsave_keeps_the_rights_at_their_place():
    code = CLEAR + "b803020000" + XSETBV + rights(0x1234_5678 & ~3)
    code += CLEAR + "b800020000" + XSAVE + "00000500" + rights(0)
    code += CLEAR + "b800020000" + XRSTOR + "00000500" + CLEAR + RDPKRU + END
    end = bare(code, setup=both, more={DATA: bytes(4096)})
    assert end.gpr[0] == 0x1234_5678
    assert end.read_u(DATA + 512, 8) == 0x200  # XSTATE_BV
    assert end.read_u(DATA + 2688, 8) == 0x1234_5678
    # XRSTOR with XSTATE_BV 0: all rights. And what it loads counts at once.
    code = CLEAR + "b803020000" + XSETBV + rights(AD) + CLEAR + "b800020000" + XRSTOR + "00000500"
    assert bare(code + READ + USER_PAGE + END, setup=both, more={DATA: bytes(4096)}).vector is None
    code = CLEAR + "b803020000" + XSETBV + READ + USER_PAGE + "b800020000" + XRSTOR + "00000500" + READ + USER_PAGE
    area = bytes(512) + b"\0\2" + bytes(2688 - 514) + AD.to_bytes(8, "little")
    assert fault(code, setup=both, more={DATA: area}) == (PF, 0x21, CODE + len(code) // 2 - 7)


def test_cpuid_tells_osxsave():
    code = "b801000000" + "31c9" + "0fa2" + END  # mov eax, 1; xor ecx, ecx; cpuid
    assert bare(code).gpr[1] >> 26 & 3 == 1
    assert bare(code, setup=osxsave).gpr[1] >> 26 & 3 == 3


@pytest.mark.parametrize("code", ["660fae3c25", "660fae3425"])
def test_clflushopt_and_clwb_are_executed(code):
    assert bare(code + "00000500" + END).rip == CODE + 9 + 2  # [0x50000]
