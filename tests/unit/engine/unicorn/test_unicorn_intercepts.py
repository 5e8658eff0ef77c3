"""Inline exits: each reaches its answer with RIP in the right place."""

import pytest
from core_machine import CODE, DATA, NOWHERE, Machine, code, start64

from aiovm.engine.base import Seg, Segment
from aiovm.engine.unicorn import budget
from aiovm.exits import BUDGET, GuestException, Hlt


def test_cpuid(make):
    m = make("b80d000000 b901000000 0fa2 f4")  # mov eax, 13; mov ecx, 1; cpuid; hlt
    assert m.run() == Hlt(False)
    assert m.seen("cpuid") == [(0x1000A, 13, 1)]
    assert [m.gpr[r] for r in (0, 3, 1, 2)] == [0x11, 0x22, 0x33, 0x44]
    assert m.state.rip == 0x1000D
    assert m.cells[0] == 13 * 64 // 256 + 2 * 600


def test_rdmsr(make):
    m = make("b91b000000 0f32 f4")  # mov ecx, 0x1b; rdmsr; hlt
    assert m.run() == Hlt(False)
    assert m.seen("rdmsr") == [(0x10005, 0x1B)]
    assert (m.gpr[0], m.gpr[2]) == (0x5566_7788, 0x1122_3344)
    assert m.state.rip == 0x10008


def test_a_refused_rdmsr_stays_where_it_is(make):
    m = make("b91b000000 0f32 f4")
    m.port.msr = None
    m.port.leave_on["rdmsr"] = GuestException(13, 0)
    assert m.run() == GuestException(13, 0)
    assert m.state.rip == 0x10005
    assert (m.gpr[0], m.gpr[2]) == (0, 0)


@pytest.mark.parametrize("refused", [False, True])
def test_wrmsr(make, refused):
    # mov ecx, 0x6e0; mov eax, 0x12345678; mov edx, 0x9abcdef0; wrmsr; hlt
    m = make("b9e0060000 b878563412 baf0debc9a 0f30 f4")
    if refused:
        m.port.msr = None
        m.port.leave_on["wrmsr"] = GuestException(13, 0)
    m.run()
    assert m.seen("wrmsr") == [(0x1000F, 0x6E0, 0x9ABC_DEF0_1234_5678)]
    assert m.state.rip == (0x1000F if refused else 0x10012)


def test_a_refused_wrmsr_may_have_changed_the_page_tables(make):
    # mov eax, [0x200000]; wrmsr; mov eax, [0x200000]; hlt
    m = make("a1 0000200000000000 0f30 a1 0000200000000000 f4")
    m.memory.write_u(DATA, 4, 0x5A5A)
    for at, value in ((0x5000, 0x6007), (0x6000, 0x7007), (0x7000, 0x87), (0x7008, 0x8007), (0x8000, DATA | 7)):
        m.memory.write_u(at, 8, value)

    def switch_tasks(_index, _value):
        m.state.cr3 = 0x5000
        m.state.rip += 2

    m.port.msr = None
    m.port.then["wrmsr"] = switch_tasks
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x5A5A


@pytest.mark.parametrize("instruction", ["0fa2", "0f32"])
def test_an_answer_that_is_none_is_an_error(make, instruction):
    m = make(instruction, "f4")
    m.port.on_cpuid = lambda _leaf, _subleaf: (1, 2, 3)
    m.port.on_rdmsr = lambda _index: "seven"
    with pytest.raises((TypeError, ValueError)):
        m.run()
    assert m.state.rip == CODE


def test_msrs_that_the_core_holds_are_read_without_an_exit_and_written_with_one(make):
    m = make("b9000100c0 0f32 0f30 f4")  # mov ecx, 0xc0000100 (FS.base); rdmsr; wrmsr; hlt
    m.context.msr_writer(0xC000_0100)(0x7FFF_1234_5678)
    assert m.run() == Hlt(False)
    assert m.seen("rdmsr") == []
    assert m.seen("wrmsr") == [(0x10007, 0xC000_0100, 0x7FFF_1234_5678)]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x174, 0x10),
        (0x175, 0xFFFF_8000_0000_0000),
        (0x176, 0xFFFF_8000_0000_1000),
        (0x277, 0x0007_0406_0007_0406),
        (0xC000_0081, 0x0023_0010_0000_0000),
        (0xC000_0082, 0xFFFF_8000_0000_2000),
        (0xC000_0083, 0xFFFF_8000_0000_3000),
        (0xC000_0084, 0x47700),
        (0xC000_0101, 0xFFFF_8880_0000_0000),
        (0xC000_0102, 0x1000),
        (0xC000_0103, 3),
    ],
)
def test_the_cores_msrs_keep_what_is_stored(index, value):
    m = Machine()
    m.context.msr_writer(index)(value)
    assert m.context.read_msr(index) == value
    m.engine.load(m.context)
    assert m.context.read_msr(index) == value


def test_rdtsc_and_rdtscp(make):
    m = make("0f31 89c6 0f01f9 f4")  # rdtsc; mov esi, eax; rdtscp; hlt
    assert m.run() == Hlt(False)
    assert m.seen("rdtsc") == [(0x10000,), (0x10004,)]
    assert m.seen("rdmsr") == [(0x10004, 0xC000_0103)]
    assert (m.gpr[0], m.gpr[2], m.gpr[6]) == (0x5678_9ABC, 0x1234, 0x5678_9ABC)
    assert m.gpr[1] == 0x5566_7788  # TSC_AUX, 32 bits
    assert m.state.rip == 0x10008
    # The rest of a block is a block of its own after an exit in its middle: 8 + 6 + 1 bytes are charged.
    assert m.cells[0] == 15 * 64 // 256 + 2 * 12 + 600


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_rf_ends_with_the_first_block(native):
    m = Machine(code("eb00", "9c 5b f4"), native=native, pointers=True)  # jmp; pushfq; pop rbx; hlt
    m.state.rflags = 0x1_0002
    assert m.run() == Hlt(False)
    assert (m.gpr[3], m.state.rflags) == (2, 2)
    m.engine.close()


#: Stores RDTSC's and then RDTSCP's value: rdtsc; shl rdx, 32; or rax, rdx; mov rsi, rax; rdtscp; and again; hlt
READ_TWICE = ("0f31 48c1e220 4809d0 4889c6", "0f01f9 48c1e220 4809d0 4889c7", "f4")


def served(native, *parts, at=CODE, khz=2_000_000, ratio=1 << 48, offset=0):
    """A machine whose engine knows the counter, and whose port computes the same."""
    m = Machine(code(*parts), native=native, pointers=True, at=at)
    m.engine.serve_tsc(khz, None)
    m.context.set_tsc(ratio, offset)

    def answer():
        shared = m.engine.latest_tsc(m.cells[0] * khz // 1_000_000)
        return (shared * ratio >> 48) + offset & (1 << 64) - 1

    m.port.on_rdtsc = answer
    m.port.msr = 0x5_0000_0007  # TSC_AUX reads its low half
    m.context.msr_writer(0xC000_0103)(7)
    return m


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_the_engine_reads_the_counter_by_itself(native):
    m = served(native, *READ_TWICE)
    assert m.run() == Hlt(False)
    # Blocks of 26, 24 and 11 bytes, a quarter ns each, and 12 ns an RDTSC; two cycles a ns.
    assert (m.gpr[6], m.gpr[7], m.gpr[1]) == ((6 + 12) * 2, (12 + 24) * 2, 7)
    assert m.cells[0] == 15 + 24 + 600
    assert m.seen("hlt") == [(CODE + 26,)]
    m.engine.close()


@pytest.mark.parametrize(
    ("ratio", "offset"), [(1 << 47, 5), (3 << 48, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1), (0x1_2345_6789_ABCD, 99)]
)
def test_both_hooks_scale_and_move_the_counter_alike(ratio, offset):
    seen = []
    for native in {budget.NATIVE, False}:
        m = served(native, *READ_TWICE, ratio=ratio, offset=offset, khz=3_123_457)
        m.cells[0] = 1 << 61
        assert m.run(1 << 62) == Hlt(False)
        seen.append((m.gpr[6], m.gpr[7], m.cells[0]))
        m.engine.close()
    assert len(set(seen)) == 1


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_nobody_is_behind_what_somebody_has_seen(native):
    m = served(native, *READ_TWICE)
    assert m.engine.latest_tsc(1000) == 1000
    assert m.run() == Hlt(False)
    assert m.gpr[6] == m.gpr[7] == 1000
    assert m.engine.latest_tsc(999) == 1000
    m.engine.close()


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_a_slice_that_is_over_ends_at_rdtsc_too(native):
    m = served(native, "0f31" * 3, "f4")
    assert m.run(2) is BUDGET
    assert m.state.rip == CODE + 2
    assert m.cells[0] == 1 + 12
    m.engine.close()


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_prefixes_single_steps_and_page_ends_are_python_s(native):
    m = served(native, "48 0f31 f4")  # rex.w rdtsc; hlt
    assert m.run() == Hlt(False)
    assert m.state.rip == CODE + 4
    m.engine.close()
    m = served(native, "0f01f9 f4", at=CODE + 0xFFE)  # rdtscp, the last byte of it in the next page
    assert m.run() == Hlt(False)
    assert (m.state.rip, m.gpr[1]) == (CODE + 0x1002, 7)
    m.engine.close()
    m = served(native, "0f31 f4")
    m.state.rflags = 0x102  # TF
    assert m.run().vector == 1
    assert m.state.rip == CODE + 2
    assert m.gpr[0] == 12 * 2
    m.engine.close()


def test_rdtsc_at_the_very_end_of_what_is_mapped(make):
    m = make("0f31 f4", at=0x1F_FFFD)  # rdtsc; hlt; then nothing
    assert m.run() == Hlt(False)
    assert m.seen("rdtsc") == [(0x1F_FFFD,)]


def test_hlt_is_over_when_it_leaves(make):
    m = make("fb 90 f4 90")  # sti; nop; hlt; nop
    assert m.run() == Hlt(True)
    assert m.seen("hlt") == [(0x10003,)]


@pytest.mark.parametrize("instruction", ["0f01c1", "0f01d9"], ids=["vmcall", "vmmcall"])
def test_hypercalls(make, instruction):
    m = make(instruction, "f4")
    for register in (0, 1, 2, 3, 6):
        m.gpr[register] = 0xA_0000_0000 + register
    assert m.run() == Hlt(False)
    # RAX, RBX, RCX, RDX, RSI; CPL
    assert m.seen("hypercall") == [
        (0x10000, 0xA_0000_0000, 0xA_0000_0003, 0xA_0000_0001, 0xA_0000_0002, 0xA_0000_0006, 0)
    ]
    assert m.gpr[0] == 0xFFFF_FFFF_FFFF_FFEA
    assert m.state.rip == 0x10004


@pytest.mark.parametrize("prefix", ["", "3e"], ids=["plain", "prefixed"])
def test_a_hypercall_of_32_bit_code_has_32_bit_registers(make, prefix):
    m = make(prefix, "0f01c1 f4")
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    m.state.set_segment(Seg.CS, Segment(8, 0, 0xFFFF_FFFF, 0xCF_9B00))
    m.state.set_segment(Seg.SS, Segment(16, 0, 0xFFFF_FFFF, 0xCF_9300))
    m.state.rip = CODE
    for register in (0, 1, 2, 3, 6):
        m.gpr[register] = 0xA_0000_0000 + register
    assert m.run() == Hlt(False)
    assert m.seen("hypercall") == [(CODE, 0, 3, 1, 2, 6, 0)]
    assert m.gpr[0] == 0xFFFF_FFEA


def test_a_hypercall_says_who_calls(make):
    m = make("0f01c1 0f0b")
    start64(m.context, CODE, cpl=3)
    m.port.leave_on["exception"] = GuestException(6)
    assert m.run() == GuestException(6)
    assert m.seen("hypercall") == [(CODE, 0, 0, 0, 0, 0, 3)]


def test_cr8(make):
    m = make("b807000000 440f22c0 440f20c3 450f20c1 f4")  # mov eax, 7; mov cr8, rax; mov rbx, cr8; mov r9, cr8; hlt
    assert m.run() == Hlt(False)
    assert m.seen("cr_write") == [(0x10005, 8, 7)]
    assert m.seen("cr_read") == [(0x10009, 8), (0x1000D, 8)]
    assert (m.gpr[3], m.gpr[9]) == (0xB, 0xB)
    assert m.state.rip == 0x10012


def test_control_registers_are_written_by_the_port(make):
    # mov rax, cr3; mov cr3, rax; mov rax, cr4; or al, 0x80; mov cr4, rax; clts; hlt
    m = make("0f20d8 0f22d8 0f20e0 0c80 0f22e0 0f06 f4")
    m.state.cr0 |= 8
    assert m.run() == Hlt(False)
    assert m.seen("cr_write") == [
        (0x10003, 3, 0x1000),
        (0x1000B, 4, 0x6A0),
        (0x1000E, 0, 0x8001_0033),
    ]
    assert (m.state.cr3, m.state.cr4, m.state.cr0) == (0x1000, 0x6A0, 0x8001_0033)


def test_a_new_cr3_takes_effect_at_once(make):
    m = make("0f22d8 a1 0000200000000000 f4")  # mov cr3, rax; mov eax, [0x200000]; hlt
    m.memory.write_u(DATA, 4, 0x5A5A)
    m.memory.write(0x5000, m.memory.read(0x1000, 0x3000))
    m.memory.write_u(0x5000, 8, 0x6007)
    m.memory.write_u(0x6000, 8, 0x7007)
    m.memory.write_u(0x7008, 8, 0x8007)
    m.memory.write_u(0x8000, 8, DATA | 7)
    m.gpr[0] = 0x5000
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x5A5A


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
@pytest.mark.parametrize(
    ("load", "register", "asked"),
    [
        ("0f22d8", 0, False),  # mov cr3, rax
        ("0f22df", 7, False),  # mov cr3, rdi
        ("410f22db", 11, False),  # mov cr3, r11
        ("410f221b", 11, False),  # ModRM.mod means nothing here
        ("66 0f22d8", 0, True),  # another prefix
        ("48 41 0f22db", 11, True),  # two of them
    ],
)
def test_the_engine_loads_cr3_by_itself(native, load, register, asked):
    m = Machine(code(load, "90 a1 0000200000000000 f4"), native=native)  # ...; nop; mov eax, [0x200000]; hlt
    m.engine.serve_cr3(40)
    m.memory.write_u(DATA, 4, 0x5A5A)
    m.memory.write(0x5000, m.memory.read(0x1000, 0x3000))
    for at, value in ((0x5000, 0x6007), (0x6000, 0x7007), (0x7008, 0x8007), (0x8000, DATA | 7)):
        m.memory.write_u(at, 8, value)
    m.gpr[register] = 0x5000
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x5A5A
    assert m.state.cr3 == 0x5000
    assert bool(m.seen("cr_write")) is (asked or not native)
    length = len(code(load))
    assert m.cells[0] == length // 4 + 600 + (length % 4 + 11) // 4 + 600
    assert m.seen("hlt") == [(CODE + length + 11,)]
    m.engine.close()


@pytest.mark.parametrize("native", [True, False] if budget.NATIVE else [False])
def test_a_cr3_that_is_too_wide_and_a_single_step_are_the_ports(native):
    m = Machine(code("0f22d8 f4"), native=native)  # mov cr3, rax; hlt
    m.engine.serve_cr3(40)
    m.gpr[0] = 1 << 40
    m.port.on_cr_write = lambda register, value: m.engine.leave(GuestException(13, 0)) or False
    assert m.run() == GuestException(13, 0)
    assert (m.state.rip, m.state.cr3) == (CODE, 0x1000)
    del m.port.on_cr_write
    m.gpr[0] = 0x1000
    m.state.rflags = 0x102
    assert m.run() == GuestException(1, None, 0)
    assert m.seen("cr_write") == [(CODE, 3, 0x1000)]
    assert m.state.rip == CODE + 3
    m.engine.close()


def test_debug_and_task_registers(make):
    # mov rax, dr6; mov dr7, rax; mov ecx, 0x28; ltr cx; hlt
    m = make("0f21f0 0f23f8 b928000000 0f00d9 f4")
    assert m.run() == Hlt(False)
    assert m.seen("dr_read") == [(0x10000, 6)]
    assert m.seen("dr_write") == [(0x10003, 7, 0xD6)]
    assert m.seen("load_tr") == [(0x1000B, 0x28)]


def test_a_refused_cr8_stays_where_it_is(make):
    m = make("440f22c0 f4")
    m.port.on_cr_write = lambda register, value: m.engine.leave(GuestException(13, 0)) or False
    assert m.run() == GuestException(13, 0)
    assert m.state.rip == 0x10000


def test_cr8_at_a_pages_end_and_behind_prefixes(make):
    m = make("440f20c0 f4", at=0x1F_FFFB)  # mov rax, cr8; hlt in the last five bytes of memory
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0xB
    m = make("66666666 440f20c3 f4")
    assert m.run() == Hlt(False)
    assert m.gpr[3] == 0xB


#: The instruction; RAX and the eight bytes at DATA after it.
MOVBE = [
    ("0f38f003", 0x8897_A6B5, 0xF1E2_D3C4_B5A6_9788),  # movbe eax, [rbx]
    ("480f38f003", 0x8897_A6B5_C4D3_E2F1, 0xF1E2_D3C4_B5A6_9788),  # movbe rax, [rbx]
    ("660f38f003", 0x1122_3344_5566_8897, 0xF1E2_D3C4_B5A6_9788),  # movbe ax, [rbx]
    ("0f38f103", 0x1122_3344_5566_7788, 0xF1E2_D3C4_8877_6655),  # movbe [rbx], eax
    ("480f38f103", 0x1122_3344_5566_7788, 0x8877_6655_4433_2211),  # movbe [rbx], rax
    ("660f38f103", 0x1122_3344_5566_7788, 0xF1E2_D3C4_B5A6_8877),  # movbe [rbx], ax
]


@pytest.mark.parametrize(("instruction", "register", "stored"), MOVBE)
def test_movbe(make, instruction, register, stored):
    m = make(f"48b88877665544332211 bb00000300 {instruction} f4")  # mov rax, ...; mov ebx, DATA
    m.memory.write_u(DATA, 8, 0xF1E2_D3C4_B5A6_9788)
    assert m.run() == Hlt(False)
    assert m.gpr[0] == register
    assert m.memory.read_u(DATA, 8) == stored


def test_movbe_knows_no_registers(make):
    m = make("0f38f0c0")  # movbe eax, eax
    m.run()
    if make.pointers:  # else it is the core's, which takes EAX for memory
        assert m.seen("exception") == [(0x10000, 6, None, 0)]


def test_movbe_of_a_page_that_is_not_there(make):
    m = make("bb00000040 0f38f003")  # mov ebx, NOWHERE; movbe eax, [rbx]
    m.run()
    assert m.seen("exception") == [(0x10005, 14, 0, NOWHERE)]


@pytest.mark.parametrize(
    ("prepare", "instruction", "vector"),
    [
        ("48bb0000000000800000", "0f0113", 13),  # mov rbx, 1 << 47; lgdt [rbx]
        ("48bbffffffffff7f0000", "0f0113", 13),  # its last bytes
        ("48bc0000000000800000", "0f011424", 12),  # lgdt [rsp]
        ("48bc0000000000800000", "0f010424", 12),  # sgdt [rsp]
        ("48bb0000000000800000", "0f0103", 13),  # sgdt [rbx]
    ],
)
def test_an_operand_at_an_address_that_is_not_canonical(make, prepare, instruction, vector):
    m = make(prepare, instruction)
    m.run()
    assert m.seen("exception") == [(0x1000A, vector, 0, 0)]
    assert not m.seen("load_table")
