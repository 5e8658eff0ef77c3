"""What the processor checks and the core does not: lengths of instructions, and what CPUID does not offer."""

import pytest
from bare import CODE, CODE0, END, STACK0, UD, bare, fault

# ---- instruction lengths ---------------------------------------------------------------------------------------------


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


# ---- what CPUID does not offer, and lengths --------------------------------------------------------------------------


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
