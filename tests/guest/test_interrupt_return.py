"""IRET in long mode: as the core does it, but that FS and GS keep their bases (SDM vol. 2A, IRET)."""

import itertools
import random

import pytest
from bare import CODE, CODE0, CODE3, DATA0, DATA3, GDT, IDT, STACK, bare

from aiovm.engine.base import Seg

GP, SS = 13, 12
NT, TF = 1 << 14, 1 << 8
CODE32, CONFORMING, ABSENT, ABSENT_DATA = 0x40, 0x48, 0x50, 0x58
DESCRIPTORS = (0x00CF_FB00_0000_FFFF, 0x00AF_9F00_0000_FFFF, 0x00AF_1B00_0000_FFFF, 0x00CF_7300_0000_FFFF)
TARGET = CODE + 0x100
IRET = {8: "48cf", 4: "cf", 2: "66cf"}


def returned(words, width=8, *, intercepted, cpl=0, flags=2, target="cd4090"):
    """Execute IRET with ``words`` on the stack; at the target INT 0x40."""

    def setup(vm):
        state = vm.vcpus[0].context.state
        for index, entry in enumerate(DESCRIPTORS):
            vm.memory.write_u(GDT + CODE32 + 8 * index, 8, entry)
        state.gdt = state.gdt._replace(limit=0x5F)
        data = b"".join((word & (1 << 8 * width) - 1).to_bytes(width, "little") for word in words)
        vm.memory.write(STACK, data)
        state.set_segment(Seg.FS, state.segment(Seg.FS)._replace(base=0x1234_5678_9000))
        state.set_segment(
            Seg.GS, state.segment(Seg.GS)._replace(selector=DATA0, base=0xFFFF_8000_0000_0000, flags=0xCF_9300)
        )
        state.nmi_masked = True
        vm.memory.write(IDT + 16 * 0x40 + 5, b"\xee")  # INT 0x40 from anywhere
        state.iret_intercepted = intercepted

    end = bare(IRET[width], setup=setup, cpl=cpl, flags=flags, more={TARGET: target})
    s = end.vm.vcpus[0].context.state
    return end, (end.vector, end.frame[:6], end.gpr, end.rip, end.cpl, end.cr2, s.nmi_masked, s.segment(Seg.DS))


SELECTORS = (0, 3, CODE0, CODE3, CODE32 | 3, CONFORMING, CONFORMING | 3, ABSENT, DATA0, DATA3, 0x60, 0x1C)
STACKS = (0, 3, DATA0, DATA3, DATA0 | 3, CODE0, 0x60)


@pytest.mark.parametrize("width", [8, 4, 2])
@pytest.mark.parametrize("cpl", [0, 3])
def test_it_is_the_cores(width, cpl):
    """The same registers, flags, frames and faults, whoever did it."""
    rng = random.Random(width * 4 + cpl)
    seen = set()
    for cs, ss in itertools.product(SELECTORS, STACKS):
        flags = 2 | rng.getrandbits(22) & ~(TF | 1 << 17)
        words = (TARGET, cs, flags, STACK + 0x800, ss)
        before = 2 | rng.choice((0, 0x3000, 0x200))
        if width == 2:
            words = (TARGET, cs, flags, 0x7800, ss)
        _, core = returned(words, width, intercepted=False, cpl=cpl, flags=before)
        _, ours = returned(words, width, intercepted=True, cpl=cpl, flags=before)
        assert ours == core, [hex(word) for word in words]
        seen.add(core[0])
    assert {GP, 0x40} <= seen


@pytest.mark.parametrize("intercepted", [False, True])
def test_nested_task_is_refused(intercepted):
    end, _ = returned((TARGET, CODE0, 2, STACK, DATA0), intercepted=intercepted, flags=NT | 2)
    assert (end.vector, end.error_code, end.fault_rip) == (GP, 0, CODE)


def test_what_the_core_gets_wrong():
    """A RIP that is not canonical faults at IRET, and a stack segment that is not present is #SS."""
    end, _ = returned((1 << 47, CODE0, 2, STACK, DATA0), intercepted=True)
    assert (end.vector, end.error_code, end.fault_rip) == (GP, 0, CODE)
    end, _ = returned((TARGET, CODE3, 2, STACK, ABSENT_DATA | 3), intercepted=True)
    assert (end.vector, end.error_code, end.fault_rip) == (SS, ABSENT_DATA, CODE)


def test_an_outer_level_loses_the_selector_and_keeps_the_base():
    """GS names a segment of CPL 0: its selector becomes null. FS names one of CPL 3: it stays."""
    end, _ = returned((TARGET, CODE3, 2, STACK, DATA3), intercepted=True)
    fs, gs = end.segments[Seg.FS], end.segments[Seg.GS]
    assert (gs.selector, gs.base) == (0, 0xFFFF_8000_0000_0000)
    assert (fs.selector, fs.base) == (DATA3, 0x1234_5678_9000)
    end, _ = returned((TARGET, CODE0, 2, STACK, DATA0), intercepted=True)
    assert (end.segments[Seg.GS].selector, end.segments[Seg.GS].base) == (DATA0, 0xFFFF_8000_0000_0000)


def test_a_guest_that_stores_the_base_by_its_msr():
    """MOV GS with a segment of CPL 0, WRMSR of its base, IRET to CPL 3: code there finds the base."""
    # mov eax, 0x10; mov gs, ax; mov ecx, 0xc0000101; mov eax, 0x50000; xor edx, edx; wrmsr
    code = "b810000000" + "8ee8" + "b9010100c0" + "b800000500" + "31d2" + "0f30"
    # push 0x23; push 0x70000; push 2; push 0x1b; push 0x8100; iretq; there: mov ebx, gs:[0x40]; mov ecx, gs; int 0x40
    code += "6a23" + "6800000700" + "6a02" + "6a1b" + "6800810000" + "48cf"
    end = bare(code, more={TARGET: "658b1c2540000000" + "8ce9" + "cd40", 0x5_0040: "78563412"})
    assert (end.gpr[3], end.gpr[1]) == (0x1234_5678, 0)


def test_kernels_whose_gs_is_null_return_by_the_core():
    # xor eax, eax; mov gs, ax; mov ecx, 0xc0000101; mov eax, 0x50000; xor edx, edx; wrmsr
    code = "31c0" + "8ee8" + "b9010100c0" + "b800000500" + "31d2" + "0f30"
    end = bare(code + "e6f4", look=lambda vm: vm.vcpus[0].context.state.iret_intercepted)
    assert end.extra is False


def test_a_single_step_over_it_traps_behind_it():
    for intercepted in (False, True):
        end, _ = returned((TARGET, CODE0, 2, STACK, DATA0), intercepted=intercepted, flags=TF | 2)
        assert (end.vector, end.fault_rip, end.dr[6] & 0x4000) == (1, TARGET, 0x4000)
        end, _ = returned((TARGET, CODE0, TF | 2, STACK, DATA0), intercepted=intercepted, target="90cd40")
        assert (end.vector, end.fault_rip) == (1, TARGET + 1)
