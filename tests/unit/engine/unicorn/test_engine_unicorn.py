"""The Unicorn engine: every exit reaches its answer with RIP in the right place; slices stop exactly; nothing is lost.

Each machine is tiny: 2 MiB of memory, identity page tables for 1 GiB at 0x1000, code at 0x10000, the stack below
0x20000. Programs are bytes with their mnemonics beside them. Everything runs with the C hook and its twin, with and
without pointers into the core.
"""

import ctypes
import random
import threading

import pytest

from aiovm.clock import new_cells
from aiovm.costs import Costs
from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.engine.unicorn import UnicornEngine, budget, proof
from aiovm.engine.unicorn import lib as unicorn_lib
from aiovm.errors import ConfigError, StateError
from aiovm.events import EventKind
from aiovm.exits import BUDGET, GuestException, Hlt, Interrupted, PauseLoop, SystemEvent
from aiovm.interrupt_return import interrupt_return
from aiovm.memory import GuestMemory, GuestPtr, SlotFlags

CODE, STACK, DATA = 0x10000, 0x20000, 0x30000
MMIO = 0x3000_0000  # inside the identity mapping, outside memory
NOWHERE = 0x4000_0000  # not mapped
LONG = 1 << 40  # a limit that no test reaches

ENGINES = [(native, pointers) for native in ([True] if budget.NATIVE else []) + [False] for pointers in (True, False)]
IDS = [f"{'native' if n else 'twin'}-{'pointers' if p else 'public'}" for n, p in ENGINES]

every_engine = pytest.mark.parametrize(("native", "pointers"), ENGINES, ids=IDS)


def code(*parts):
    """Hex with spaces to bytes."""
    return bytes.fromhex("".join(parts))


class Port:
    """Answers everything, notes (what, RIP, arguments), and leaves or raises where told."""

    def __init__(self):
        self.seen = []
        self.leave_on = {}
        self.raise_on = {}
        self.then = {}
        self.permitted = ()
        self.msr = 0x1122_3344_5566_7788
        self.engine = self.context = None

    def note(self, what, *arguments):
        self.seen.append((what, self.context.state.rip, *arguments))
        if what in self.then:
            self.then[what](*arguments)
        if what in self.raise_on:
            raise self.raise_on.pop(what)
        if what in self.leave_on:
            self.engine.leave(self.leave_on[what])

    def on_cpuid(self, leaf, subleaf):
        self.note("cpuid", leaf, subleaf)
        return 0x11, 0x22, 0x33, 0x44

    def on_rdmsr(self, index):
        self.note("rdmsr", index)
        return self.msr

    def on_wrmsr(self, index, value):
        self.note("wrmsr", index, value)
        return self.msr is not None

    def on_rdtsc(self):
        self.note("rdtsc")
        return 0x1234_5678_9ABC

    def on_in(self, port, size):
        self.note("in", port, size)
        return 0xA1B2_C3D4 & (1 << 8 * size) - 1

    def on_out(self, port, size, value):
        self.note("out", port, size, value)

    def on_mmio_read(self, gpa, size):
        self.note("read", gpa, size)
        return 0x8877_6655_4433_2211 >> 8 * (gpa & 7) & (1 << 8 * size) - 1

    def on_mmio_write(self, gpa, size, value):
        self.note("write", gpa, size, value)
        return True

    def on_hypercall(self, *numbers):
        self.note("hypercall", *numbers)
        return 0xFFFF_FFFF_FFFF_FFEA

    def on_cr_read(self, register):
        self.note("cr_read", register)
        return 0xB

    def on_cr_write(self, register, value):
        self.note("cr_write", register, value)
        if register in (0, 3, 4):
            setattr(self.context.state, f"cr{register}", value)
        return True

    def on_dr_read(self, register):
        self.note("dr_read", register)
        return 0xD0 + register

    def on_dr_write(self, register, value):
        self.note("dr_write", register, value)
        return True

    def on_load_tr(self, selector):
        self.note("load_tr", selector)
        return True

    def on_rsm(self):
        self.note("rsm")
        self.on_exception(6, None, 0)

    def on_io_permission(self, port, size):
        self.note("permission", port, size)
        return port in self.permitted

    def on_nmi_window(self):
        self.note("nmi_window", self.context.state.nmi_masked, self.context.state.interrupt_shadow)

    def on_step(self):
        self.note("step")

    def on_stepped(self):
        self.note("stepped")

    def on_exception(self, vector, error_code, address):
        self.note("exception", vector, error_code, address)
        if "exception" not in self.then:
            self.engine.leave(GuestException(vector, error_code, address))

    def on_soft_interrupt(self, vector, length, kind):
        self.note("int", vector, length, kind)
        self.engine.leave(GuestException(vector))

    def on_irq_window(self):
        self.note("window", self.context.state.rflags & 0x200, self.context.state.interrupt_shadow)
        if "window" not in self.then:
            self.context.request_irq_window(False)

    def on_hlt(self):
        self.note("hlt")
        self.engine.leave(Hlt(interrupts_enabled=bool(self.context.state.rflags & 0x200)))

    def on_pause_loop(self):
        self.note("pause_loop")
        self.engine.leave(PauseLoop(kernel_mode=True))


class Machine:
    """Memory, an engine, and CPUs in 64-bit mode at CPL 0."""

    def __init__(self, program=b"", *, native=None, pointers=None, cpus=1, at=CODE, **options):
        self.memory = GuestMemory()
        self.memory.set_region(0, 0, 2 << 20)
        self.memory.write_u(0x1000, 8, 0x2007)
        self.memory.write_u(0x2000, 8, 0x3007)
        for n in range(512):
            self.memory.write_u(0x3000 + 8 * n, 8, n << 21 | 0x87)
        self.memory.write(at, program)
        self.cells = new_cells()
        self.engine = UnicornEngine(self.memory, self.cells, costs=Costs(), native=native, pointers=pointers, **options)
        self.ports = [Port() for _ in range(cpus)]
        self.contexts = []
        for n, port in enumerate(self.ports):
            context = self.engine.create_context(n, port)
            port.engine, port.context = self.engine, context
            self.contexts.append(context)
            start64(context, at)
        self.port, self.context = self.ports[0], self.contexts[0]
        self.state = self.context.state

    @property
    def gpr(self):
        """The first CPU's registers, wherever they are now."""
        return self.state.gpr

    def run(self, limit=LONG):
        return self.context.run(limit)

    def seen(self, what):
        return [event[1:] for event in self.port.seen if event[0] == what]


def start64(context, rip, *, cpl=0):
    s = context.state
    s.cr3, s.cr4, s.efer, s.cr0 = 0x1000, 0x620, 0xD01, 0x8001_0033
    dpl = cpl << 13
    s.set_segment(Seg.CS, Segment(0x33 if cpl else 0x08, 0, 0xFFFF_FFFF, 0xAF_9B00 | dpl))
    s.set_segment(Seg.SS, Segment(0x2B if cpl else 0x10, 0, 0xFFFF_FFFF, 0xCF_9300 | dpl))
    for which in (Seg.DS, Seg.ES):
        s.set_segment(which, Segment(0x10, 0, 0xFFFF_FFFF, 0xCF_9300))
    s.gpr[4] = STACK
    s.rip = rip
    s.rflags = 2


@pytest.fixture(params=ENGINES, ids=IDS)
def make(request):
    """Builds machines on one kind of engine and frees them."""
    native, pointers = request.param
    built = []

    def build(*parts, **options):
        machine = Machine(code(*parts), native=native, pointers=pointers, **options)
        built.append(machine)
        return machine

    build.pointers = pointers
    yield build
    for machine in built:
        machine.engine.close()


# ---- plain running -----------------------------------------------------------------------------------------------


def test_code_is_charged_by_its_bytes(make):
    m = make("90" * 100, "f4")  # nop * 100; hlt
    assert m.run() == Hlt(False)
    assert m.cells[0] == 101 * 64 // 256 + 600
    assert m.state.rip == 0x10065


def test_a_slice_stops_before_the_block_that_would_start_at_its_limit(make):
    m = make("90" * 38, "eb00" * 10, "f4")  # ten blocks of a 2-byte jmp +0
    assert m.run(12) is BUDGET
    assert m.cells[0] == 12  # 40 bytes: 10 ns; then two bytes a block: 0.5 ns
    assert m.state.rip == 0x10030
    assert m.run(12) is BUDGET  # no block fits any more
    assert m.state.rip == 0x10030


def test_a_slice_of_at_least_one_ns_makes_progress(make):
    m = make("eb00" * 20, "f4")
    rips = []
    while m.run(m.cells[0] + 1) is BUDGET:
        rips.append(m.state.rip)
    assert rips == sorted(set(rips))
    assert m.cells[0] == 10 + 600


def test_real_mode_runs_in_the_same_engine(make):
    m = make("b8ffff 40 40 f4")  # mov ax, 0xffff; inc ax; inc ax; hlt
    m.context.reset(init=False)
    m.state.set_segment(Seg.CS, Segment(0x1000, 0x10000, 0xFFFF, 0x9B00))
    m.state.rip = 0
    m.gpr[0] = 0xAAAA_0000
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0xAAAA_0001
    assert m.state.rip == 6


def test_protected_mode_runs_in_the_same_engine(make):
    m = make("b8ffffffff 40 a300000300 f4")  # mov eax, -1; inc eax; mov [0x30000], eax; hlt
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    m.state.set_segment(Seg.CS, Segment(8, 0, 0xFFFF_FFFF, 0xCF_9B00))
    m.state.set_segment(Seg.DS, Segment(16, 0, 0xFFFF_FFFF, 0xCF_9300))
    m.state.set_segment(Seg.SS, Segment(16, 0, 0xFFFF_FFFF, 0xCF_9300))
    m.state.rip = CODE
    m.memory.write_u(DATA, 4, 7)
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 4) == 0
    assert m.state.long_mode is False


# ---- inline exits --------------------------------------------------------------------------------------------------


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
    m.context.write_msr(0xC000_0100, 0x7FFF_1234_5678)
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
        (0xC000_0080, 0xD01),
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
    m.context.write_msr(index, value)
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
    m.context.write_msr(0xC000_0103, 7)
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


# ---- ports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "size", "value"),
    [("ee", 1, 0x44), ("66ef", 2, 0x3344), ("ef", 4, 0x1122_3344)],
    ids=["out dx, al", "out dx, ax", "out dx, eax"],
)
def test_out(make, instruction, size, value):
    m = make("baf8030000 b844332211", instruction, "f4")  # mov edx, 0x3f8; mov eax, 0x11223344; out
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0x3F8, size, value)]
    assert m.state.rip == 0x1000B + len(instruction) // 2


@pytest.mark.parametrize(
    ("instruction", "size", "rax"),
    [("ec", 1, 0x9999_9999_1122_33D4), ("66ed", 2, 0x9999_9999_1122_C3D4), ("ed", 4, 0xA1B2_C3D4)],
    ids=["in al, dx", "in ax, dx", "in eax, dx"],
)
def test_in_merges_as_the_width_says(make, instruction, size, rax):
    m = make("ba60000000", instruction, "f4")  # mov edx, 0x60; in
    m.gpr[0] = 0x9999_9999_1122_3344
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("in")] == [(0x60, size)]
    assert m.gpr[0] == rax


def test_immediate_ports(make):
    m = make("b021 e680 e471 f4")  # mov al, 0x21; out 0x80, al; in al, 0x71; hlt
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0x80, 1, 0x21)]
    assert [e[1:] for e in m.seen("in")] == [(0x71, 1)]


def test_string_output_is_one_access_a_time(make):
    m = make("bae9000000 be00000300 b903000000 f36e f4")  # mov edx, 0xe9; mov esi, 0x30000; mov ecx, 3; rep outsb; hlt
    m.memory.write(DATA, b"abc")
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0xE9, 1, 0x61), (0xE9, 1, 0x62), (0xE9, 1, 0x63)]


def test_string_input(make):
    m = make("ba60000000 bf00000300 b902000000 f36d f4")  # mov edx, 0x60; mov edi, 0x30000; mov ecx, 2; rep insd; hlt
    assert m.run() == Hlt(False)
    assert m.memory.read(DATA, 8) == bytes.fromhex("d4c3b2a1 d4c3b2a1")


@pytest.mark.parametrize(("instruction", "kind"), [("ee", "out"), ("ec", "in")])
def test_a_port_access_that_leaves_stops_exactly_behind_it(make, instruction, kind):
    m = make("baf4000000", instruction, "ffc1 ffc1 f4")  # mov edx, 0xf4; out/in; inc ecx; inc ecx; hlt
    m.state.set_dr(0, 0x1234)
    m.state.set_dr(6, 0xFFFF_0FF0)
    m.state.set_dr(7, 0x400)
    m.port.leave_on[kind] = SystemEvent("debug-exit", 3)
    assert m.run() == SystemEvent("debug-exit", 3)
    assert m.state.rip == 0x10006
    assert m.gpr[1] == 0
    assert m.gpr[0] & 0xFF == (0xD4 if kind == "in" else 0)
    assert [m.state.get_dr(n) for n in (0, 6, 7)] == [0x1234, 0xFFFF_0FF0, 0x400]
    assert m.cells[0] == 11 * 64 // 256 + 600
    assert m.seen("exception") == []
    assert m.run() == Hlt(False)
    assert m.gpr[1] == 2


@pytest.mark.parametrize("instruction", ["ee", "ec", "66ef", "ed"])
def test_ports_of_a_program_without_permission(make, instruction):
    m = make("baf8030000", instruction, "ffc1")  # mov edx, 0x3f8; out/in; inc ecx
    start64(m.context, CODE, cpl=3)
    m.gpr[0] = 0x1122_3344_5566_7788
    assert m.run() == GuestException(13, 0, 0)
    assert m.state.rip == 0x10005
    assert (m.gpr[0], m.gpr[1]) == (0x1122_3344_5566_7788, 0)
    assert m.seen("in") == m.seen("out") == []
    assert [m.state.get_dr(n) for n in (0, 7)] == [0, 0x400]


def test_ports_of_a_program_with_permission(make):
    m = make("baf8030000 ee ffc1 cc")
    start64(m.context, CODE, cpl=3)
    m.port.permitted = (0x3F8,)
    assert m.run() == GuestException(3)
    assert [e[1:] for e in m.seen("permission")] == [(0x3F8, 1)]
    assert len(m.seen("out")) == 1
    assert m.gpr[1] == 1


def test_string_output_that_leaves_goes_on_where_it_was(make):
    m = make("bae9000000 be00000300 b903000000 f36e f4")
    m.memory.write(DATA, b"abc")
    m.port.leave_on["out"] = SystemEvent("x")
    left = []
    while (exit_ := m.run()) == SystemEvent("x"):
        left.append((m.gpr[1], m.gpr[6]))
    assert exit_ == Hlt(False)
    assert left[:2] == [(2, DATA + 1), (1, DATA + 2)]
    assert [e[3] for e in m.seen("out")] == [0x61, 0x62, 0x63]


# ---- MMIO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "rax", "accesses"),
    [
        ("8a042500000030", 0x9999_9999_9999_9911, [(MMIO, 1)]),  # mov al, [MMIO]
        ("668b042500000030", 0x9999_9999_9999_2211, [(MMIO, 2)]),
        ("8b042500000030", 0x4433_2211, [(MMIO, 4)]),
        ("488b042500000030", 0x8877_6655_4433_2211, [(MMIO, 4), (MMIO + 4, 4)]),
        ("0fb6042503000030", 0x44, [(MMIO + 3, 1)]),  # movzx eax, byte [MMIO + 3]
    ],
)
def test_mmio_reads(make, instruction, rax, accesses):
    m = make(instruction, "f4")
    m.gpr[0] = 0x9999_9999_9999_9999
    assert m.run() == Hlt(False)
    assert m.gpr[0] == rax
    assert [e[1:] for e in m.seen("read")] == accesses
    assert m.state.rip == CODE + len(code(instruction)) + 1


@pytest.mark.parametrize(
    ("instruction", "accesses"),
    [
        ("88042500000030", [(MMIO, 1, 0x88)]),
        ("6689042500000030", [(MMIO, 2, 0x7788)]),
        ("89042500000030", [(MMIO, 4, 0x5566_7788)]),
        ("4889042500000030", [(MMIO, 4, 0x5566_7788), (MMIO + 4, 4, 0x1122_3344)]),
    ],
)
def test_mmio_writes(make, instruction, accesses):
    m = make(instruction, "f4")
    m.gpr[0] = 0x1122_3344_5566_7788
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == accesses


def test_mmio_that_leaves_ends_the_slice_at_the_next_block(make):
    m = make("89042500000030 eb00 ffc1 f4")  # mov [MMIO], eax; jmp +0; inc ecx; hlt
    m.port.leave_on["write"] = SystemEvent("reset")
    assert m.run() == SystemEvent("reset")
    assert m.state.rip == 0x10009
    assert m.gpr[1] == 0
    assert m.run() == Hlt(False)
    assert m.gpr[1] == 1


def test_after_an_exit_from_mmio_a_debug_exception_is_the_guests(make):
    m = make("89042500000030 eb00 90 90 f4")
    m.port.leave_on["write"] = SystemEvent("reset")
    assert m.run() == SystemEvent("reset")
    m.state.rflags = 0x102  # TF: single step
    exit_ = m.run()
    assert exit_.vector == 1
    assert m.seen("exception")[0][0] == 0x1000A


def test_a_store_to_read_only_memory_is_mmio(make):
    m = make("c704250000400078563412 8b042500004000 f4")  # mov dword [0x400000], 0x12345678; mov eax, [0x400000]; hlt
    m.memory.set_region(1, 0x40_0000, 0x1000, flags=SlotFlags.READONLY)
    m.memory.load_rom(0x40_0000, b"\x99\0\0\0")
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == [(0x40_0000, 4, 0x1234_5678)]
    assert m.gpr[0] == 0x99
    assert m.memory.read_u(0x40_0000, 4) == 0x99


def test_an_unaligned_store_to_read_only_memory_comes_byte_by_byte(make):
    m = make("66c70425010040003412 f4")  # mov word [0x400001], 0x1234; hlt
    m.memory.set_region(1, 0x40_0000, 0x1000, flags=SlotFlags.READONLY)
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == [(0x40_0001, 1, 0x34), (0x40_0002, 1, 0x12)]
    assert m.memory.read(0x40_0000, 4) == bytes(4)


def test_memory_may_come_and_go(make):
    m = make("8b042500004000 f4")  # mov eax, [0x400000]; hlt
    assert m.run() == Hlt(False)
    assert len(m.seen("read")) == 1
    m.memory.set_region(1, 0x40_0000, 0x1000)
    m.memory.write_u(0x40_0000, 4, 0xCAFE)
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0xCAFE
    m.memory.set_region(1, 0, 0)
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert len(m.seen("read")) == 2


# ---- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "cpl", "error"),
    [
        ("a1 0000004000000000", 0, 0),  # mov eax, [0x40000000]
        ("a3 0000004000000000", 0, 2),  # mov [0x40000000], eax
        ("a1 0000004000000000", 3, 4),
        ("a3 0000004000000000", 3, 6),
    ],
)
def test_a_page_fault_brings_address_and_error_code(make, instruction, cpl, error):
    m = make(instruction)
    start64(m.context, CODE, cpl=cpl)
    m.state.cr2 = 0x5555
    assert m.run() == GuestException(14, error, NOWHERE)
    assert m.state.rip == CODE
    assert m.state.cr2 == 0x5555  # storing CR2 is the port's business
    assert m.state.cpl == cpl


def test_a_page_fault_at_a_fetch(make):
    m = make("b800000040 ffe0")  # mov eax, 0x40000000; jmp rax
    assert m.run() == GuestException(14, 0x10, NOWHERE)
    assert m.state.rip == NOWHERE


def test_reserved_bits_in_a_page_table_entry(make):
    m = make("a1 0000200000000000")  # mov eax, [0x200000]
    m.memory.write_u(0x3008, 8, 1 << 45 | 0x87)
    assert m.run() == GuestException(14, 9, 0x20_0000)


def test_a_page_that_is_paged_in_is_read_after_all(make):
    m = make("a1 0000004000000000 f4")
    m.memory.write_u(DATA, 4, 0xBEEF)
    m.memory.write_u(0x4000, 8, DATA & ~0x1F_FFFF | 0x87)

    def page_in(*_):
        m.memory.write_u(0x2008, 8, 0x4007)
        m.state.gpr[3] += 1

    m.port.then["exception"] = page_in
    assert m.run() == Hlt(False)
    assert m.gpr[3] == 1
    assert m.gpr[0] == m.memory.read_u(0, 4)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("0f0b", GuestException(6)),  # ud2
        ("f7f1", GuestException(0)),  # div ecx, 0
        ("b834120000 8ed8", GuestException(13, 0x1234)),  # mov eax, 0x1234; mov ds, ax
        ("48b80000000000000080 8b00", GuestException(13, 0)),  # mov rax, 1 << 63; mov eax, [rax]
        ("0faa", GuestException(6)),  # rsm
        ("0f33", GuestException(13, 0)),  # rdpmc
        ("fb 0f01c8", GuestException(6)),  # sti; monitor
    ],
)
def test_exceptions(make, instruction, expected):
    m = make(instruction)
    exit_ = m.run()
    assert exit_ == expected


def test_user_mode_may_not(make):
    for instruction in ("f4", "0f20c0", "0f30", "fa", "0f01f8", "0f33"):  # hlt; mov rax, cr0; wrmsr; cli; swapgs; rdpmc
        m = make(instruction)
        start64(m.context, CODE, cpl=3)
        assert m.run() == GuestException(13, 0)
        assert m.state.rip == CODE


def test_successive_page_faults_are_not_double_faults(make):
    m = make("a1 0000004000000000")
    for _ in range(5):
        assert m.run() == GuestException(14, 0, NOWHERE)


def test_code_outside_memory_is_no_instruction(make):
    m = make("b800000030 ffe0")  # mov eax, MMIO; jmp rax
    assert m.run() == GuestException(6, None, 0)
    assert m.state.rip == MMIO
    m.state.rip = CODE + 5
    m.gpr[0] = CODE + 5
    assert m.run(m.cells[0] + 100) is BUDGET  # and the engine is as good as new


@pytest.mark.parametrize(
    ("instruction", "vector", "length", "kind"),
    [
        ("cd80", 0x80, 2, EventKind.SOFT_INT),
        ("cc", 3, 1, EventKind.SOFT_EXC),
        ("cd03", 3, 2, EventKind.SOFT_INT),
        ("cd0e", 14, 2, EventKind.SOFT_INT),
        ("66cd80", 0x80, 3, EventKind.SOFT_INT),
        ("f1", 1, 1, EventKind.ICEBP),
    ],
)
def test_software_interrupts(make, instruction, vector, length, kind):
    m = make("90", instruction)
    assert m.run() == GuestException(vector)
    assert m.seen("int") == [(0x10001, vector, length, kind)]


def test_into(make):
    m = make("ce f4")  # into, in 32-bit code
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    for which, flags in ((Seg.CS, 0xCF_9B00), (Seg.DS, 0xCF_9300), (Seg.SS, 0xCF_9300)):
        m.state.set_segment(which, Segment(8, 0, 0xFFFF_FFFF, flags))
    m.state.rip = CODE
    m.state.rflags = 0x802  # OF
    assert m.run() == GuestException(4)
    assert m.seen("int") == [(0x10000, 4, 1, EventKind.SOFT_EXC)]


# ---- IRET ------------------------------------------------------------------------------------------------------------


def returning(make, *parts, words=None):
    """A machine that intercepts IRET, does it in Python, and has a frame (RIP, CS, RFLAGS, RSP, SS) on its stack."""
    m = make(*parts)
    m.memory.write_u(DATA + 8, 8, 0x00AF_9B00_0000_FFFF)
    m.memory.write_u(DATA + 0x10, 8, 0x00CF_9300_0000_FFFF)
    m.state.gdt = DescriptorTable(DATA, 0x17)
    for at, word in enumerate(words or (CODE + 2, 8, 0x46, STACK + 0x100, 0x10)):
        m.memory.write_u(STACK + 8 * at, 8, word)
    m.state.iret_intercepted = True

    def on_interrupt_return(width):
        m.port.note("iret", width)
        assert interrupt_return(m.state, m.memory, width) is None
        return True

    m.port.on_interrupt_return = on_interrupt_return
    return m


@pytest.mark.parametrize(("code", "stack"), [(0x00AF_9B00, 0x10), (0x00AF_FB00, 0x13)])
def test_an_iret_that_loses_no_base_is_the_cores_where_c_can_tell(make, code, stack):
    level = stack & 3
    m = returning(make, "48cf 90 0fa2 f4", words=(CODE + 2, 8 | level, 0x46, STACK + 0x100, stack))  # ...; cpuid
    m.memory.write_u(DATA + 8, 8, code << 32 | 0xFFFF)
    m.memory.write_u(DATA + 0x10, 8, (0x00CF_9300 | level << 13) << 32 | 0xFFFF)
    m.port.leave_on["cpuid"] = Interrupted()
    assert m.run() == Interrupted()
    assert (m.gpr[4], m.state.rflags, m.state.cpl) == (STACK + 0x100, 0x46, level)
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])


def test_an_iret_and_what_follows_are_charged_once(make):
    m = returning(make, "48cf f4")  # iretq; hlt
    assert m.run() == Hlt(False)
    assert (m.state.rip, m.gpr[4], m.state.rflags) == (CODE + 3, STACK + 0x100, 0x46)
    assert m.cells[0] == 600  # three bytes of code: no whole nanosecond
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])
    assert m.state.iret_intercepted


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("48cf", (CODE + 2, 0xB, 0x46, STACK + 0x100, 0x13)),  # to CPL 3, with a GS of CPL 0
        ("48cf", (CODE + 2, 8, 0x46, STACK + 0x100, 0)),  # another stack segment
        ("4048cf", (CODE + 3, 8, 0x46, STACK + 0x100, 0x10)),  # a prefix more
        ("48cf", (CODE + 2, 8, 0x146, STACK + 0x100, 0x10)),  # into a single step
    ],
)
def test_other_irets_are_pythons(make, instruction, words):
    m = returning(make, instruction, "90 f4", words=words)
    m.state.set_segment(Seg.GS, Segment(0x10, 0x1234_0000, 0xFFFF_FFFF, 0xC0_9300))
    for at, entry in ((8, 0x00AF_9B00_0000_FFFF), (0x10, 0x00CF_9300_0000_FFFF)):
        m.memory.write_u(DATA + at, 8, entry | (words[1] & 3) << 45)
    m.run()
    assert m.state.cpl == words[1] & 3
    assert m.state.selector(Seg.SS) == words[4]
    if words[2] == 0x46:
        assert m.seen("iret") == [(CODE, 8)]
    else:  # whosever it is
        assert m.seen("exception") == [(CODE + 3, 1, None, 0)]


def test_an_interrupt_that_waits_is_taken_behind_the_iret_that_sets_if(make):
    m = returning(make, "48cf 90 f4", words=(CODE + 2, 8, 0x246, STACK + 0x100, 0x10))
    m.context.request_irq_window(True)
    assert m.run() == Hlt(True)
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])
    if m.engine.pointers:
        assert m.seen("window") == [(CODE + 2, 0x200, False)]


@pytest.mark.parametrize("at", [MMIO, MMIO + 0xFF0])
def test_nobody_looks_at_a_device_for_an_iret(make, at):
    m = returning(make, "48cf f4")
    m.gpr[4] = at
    m.port.on_interrupt_return = lambda width: m.engine.leave(GuestException(13, 0)) or False
    assert m.run() == GuestException(13, 0)
    assert m.seen("read") == []
    assert m.cells[0] == 0


def test_irets_without_end_take_time(make):
    m = returning(make, "48cf", words=(CODE, 8, 2, STACK, 0x10))  # to itself, with its own frame
    assert m.run(1000) is BUDGET
    assert m.cells[0] == 1000
    assert m.state.rip == CODE
    assert m.state.iret_intercepted


def test_an_iret_is_stepped_over(make):
    m = returning(make, "48cf 90 f4")
    m.context.stepping = True
    m.port.leave_on["stepped"] = Interrupted()
    assert m.run() == Interrupted()
    assert m.state.rip == CODE + 2
    m.context.stepping = False
    assert m.run() == Hlt(False)


# ---- system calls ----------------------------------------------------------------------------------------------------


def system_calls(m):
    m.context.write_msr(0xC000_0081, 0x0023_0010 << 32)  # STAR: kernel 0x10, user 0x23
    m.context.write_msr(0xC000_0082, 0x11000)  # LSTAR
    m.context.write_msr(0xC000_0084, 0x4_7700)  # FMASK: TF, IF, DF, NT, AC, ...
    m.context.write_msr(0x174, 0x10)
    m.context.write_msr(0x175, 0x18000)
    m.context.write_msr(0x176, 0x11000)


def test_syscall_enters_the_kernel(make):
    m = make("0f05")
    m.memory.write(0x11000, code("f4"))
    start64(m.context, CODE, cpl=3)
    system_calls(m)
    m.state.rflags = 0x646  # DF, IF, ZF, PF
    assert m.run() == Hlt(False)
    assert m.state.rip == 0x11001
    assert (m.gpr[1], m.gpr[11]) == (0x10002, 0x646)
    assert m.state.rflags == 0x46
    assert m.state.cpl == 0
    assert m.state.segment(Seg.CS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xA0_9B00)
    assert m.state.segment(Seg.SS) == Segment(0x18, 0, 0xFFFF_FFFF, 0xC0_9300)
    assert m.gpr[4] == STACK


def test_a_segments_flags_are_the_descriptors_and_no_part_of_its_limit(make):
    m = make("8ed8 f4")  # mov ds, eax; hlt
    m.memory.write_u(DATA + 8, 8, 0x00DF_9300_0000_FFFF)
    m.state.gdt = DescriptorTable(DATA, 0xF)
    m.gpr[0] = 8
    assert m.run() == Hlt(False)
    assert m.state.segment(Seg.DS) == Segment(8, 0, 0xFFFF_FFFF, 0xD0_9300)
    assert m.state.selector(Seg.DS) == 8


def test_the_place_of_the_tables_is_one_value(make):
    m = make("f4")
    seen = {m.state.tables}
    for name, value in (("cr0", 0x33), ("cr3", 0x9000), ("cr4", 0x20), ("efer", 0x500)):
        setattr(m.state, name, value)
        seen.add(m.state.tables)
    for name in ("gdt", "idt"):
        for table in (DescriptorTable(0x1234_0000, 0), DescriptorTable(0x1234_0000, 0x7F)):
            setattr(m.state, name, table)
            seen.add(m.state.tables)
    assert len(seen) == 9
    m.state.gpr[0], m.state.rip, m.state.cr2 = 1, 2, 3
    m.state.rflags = 0x46
    assert m.state.tables in seen


def test_sysret_returns(make):
    m = make("0f05 cc")  # syscall; int3
    m.memory.write(0x11000, code("480f07"))  # sysretq
    start64(m.context, CODE, cpl=3)
    system_calls(m)
    m.state.rflags = 0x246
    assert m.run() == GuestException(3)
    assert m.state.rip == 0x10002
    assert m.state.cpl == 3
    assert m.state.rflags & 0x200
    assert (m.state.segment(Seg.CS).selector, m.state.segment(Seg.SS).selector) == (0x33, 0x2B)


def test_syscall_is_undefined_when_it_is_turned_off(make):
    m = make("0f05")
    system_calls(m)
    m.state.efer = 0xD00
    assert m.run() == GuestException(6)
    assert m.state.rip == CODE
    assert m.gpr[1] == 0


def test_syscall_is_undefined_outside_64_bit_code(make):
    m = make("0f05")
    system_calls(m)
    m.state.set_segment(Seg.CS, Segment(8, 0, 0xFFFF_FFFF, 0xCF_9B00))
    assert m.run() == GuestException(6)
    assert m.state.rip == CODE


@pytest.mark.parametrize("long", [True, False])
def test_sysenter(make, long):
    m = make("0f34")
    m.memory.write(0x11000, code("f4"))
    if long:
        start64(m.context, CODE, cpl=3)
    else:
        m.context.reset(init=False)
        m.state.cr0 = 0x11
        m.state.set_segment(Seg.CS, Segment(0x1B, 0, 0xFFFF_FFFF, 0xCF_FB00))
        m.state.set_segment(Seg.SS, Segment(0x23, 0, 0xFFFF_FFFF, 0xCF_F300))
        m.state.rip = CODE
    system_calls(m)
    m.state.rflags = 0x202
    assert m.run() == Hlt(False)
    assert (m.state.rip, m.gpr[4], m.state.cpl) == (0x11001, 0x18000, 0)
    assert m.state.segment(Seg.CS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xA0_9B00 if long else 0xC0_9B00)
    assert m.state.segment(Seg.SS).selector == 0x18
    assert m.state.rflags == 2


def test_sysenter_without_a_kernel_segment_faults(make):
    m = make("0f34")
    assert m.run() == GuestException(13, 0)
    assert m.state.rip == CODE


# ---- PAUSE -----------------------------------------------------------------------------------------------------------

SPIN = "f390 ebfc"  # pause; jmp -4


def test_a_pause_costs_its_time_and_is_stepped_over(make):
    m = make("f390" * 3, "f4")
    assert m.run() == Hlt(False)
    assert m.seen("pause_loop") == []
    assert m.cells[0] == 7 * 64 // 256 + 3 * 70 + 600
    assert m.engine.budget.struct.pauses == 3


def test_a_pause_loop_is_reported_when_its_window_closes(make):
    m = make(SPIN)
    m.context.ple_window = 1_000
    assert m.run() == PauseLoop(True)
    # One turn is 70 ns and one for the code: the 16th PAUSE begins more than 1,000 ns after the first.
    assert m.engine.budget.struct.pauses == 16
    assert m.cells[0] == 16 * 71 - 1 + 600
    assert m.seen("pause_loop") == [(0x10002,)]
    assert m.run() == PauseLoop(True)  # a new loop begins behind the report
    assert m.engine.budget.struct.pauses == 32


def test_pauses_far_apart_are_no_loop(make):
    m = make("f390", "90" * 300, "e9cdfeffff")  # pause; 75 ns of nops; jmp back
    m.context.ple_window = 1_000
    assert m.run(50_000) is BUDGET
    assert m.engine.budget.struct.pauses > 300
    assert m.seen("pause_loop") == []


def test_pause_loops_outside_the_kernel_are_not_reported(make):
    m = make(SPIN)
    start64(m.context, CODE, cpl=3)
    m.context.ple_window = 1_000
    assert m.run(50_000) is BUDGET
    assert m.seen("pause_loop") == []


def test_without_a_window_pause_loops_run_on(make):
    m = make(SPIN)
    assert m.run(50_000) is BUDGET
    assert m.seen("pause_loop") == []
    assert m.engine.budget.struct.pauses == 705  # 71 ns each


# ---- interrupt windows -----------------------------------------------------------------------------------------------


def test_the_window_waits_for_sti_and_its_shadow():
    m = Machine(code("90 90 fb 90 90 f4"))  # nop; nop; sti; nop; nop; hlt
    m.context.request_irq_window(True)
    assert m.run() == Hlt(True)
    assert m.seen("window") == [(0x10004, 0x200, False)]


def test_the_window_is_not_open_while_interrupts_are_off(make):
    m = make("eb00" * 2000, "f4")
    m.context.request_irq_window(True)
    exits = []
    while (exit_ := m.run()) is BUDGET:
        exits.append(exit_)
    assert exit_ == Hlt(False)
    assert m.seen("window") == []


def test_a_window_that_is_open_already_comes_before_the_first_instruction(make):
    m = make("ffc1 f4")
    m.state.rflags = 0x202
    m.context.request_irq_window(True)
    m.port.then["window"] = lambda *_: setattr(m.state, "rip", 0x10002) or m.context.request_irq_window(False)
    assert m.run() == Hlt(True)
    assert m.seen("window") == [(0x10000, 0x200, False)]
    assert m.gpr[1] == 0


def test_no_window_ever_opens_in_a_shadow(make):
    # again: sti; a nop of seven bytes; cli; inc ebx; jmp again
    m = make("fb 0f1f8000000000 fa ffc3 ebf3")
    chance = random.Random(1)
    for _ in range(400):
        m.context.request_irq_window(True)
        m.run(m.cells[0] + chance.randint(1, 9))
        if len(m.seen("window")) >= 20:
            break
    windows = m.seen("window")
    assert len(windows) >= 20
    # The window is between STI's successor and CLI.
    assert set(windows) == {(0x10008, 0x200, False)}


def test_a_window_can_be_asked_for_in_the_middle_of_a_slice(make):
    m = make("e680", "eb00" * 3000, "f4")  # out 0x80, al; blocks; hlt
    m.state.rflags = 0x202
    m.port.then["out"] = lambda *_: m.context.request_irq_window(True)
    while m.run() is BUDGET:
        pass
    windows = m.seen("window")
    assert len(windows) == 1
    assert windows[0][0] == 0x10002  # behind the OUT


def test_a_window_that_is_no_longer_wanted_does_not_open(make):
    m = make("90 f4")
    m.state.rflags = 0x202
    m.context.request_irq_window(True)
    m.context.request_irq_window(False)
    assert m.run() == Hlt(True)
    assert m.seen("window") == []


def test_a_limit_that_is_lowered_while_a_window_is_asked_for_holds(make):
    m = make("e680", "eb00" * 4000, "f4")

    def lower(*_):
        m.cells[1] = m.cells[0] + 100

    m.port.then["out"] = lower
    m.context.request_irq_window(True)
    assert m.run() is BUDGET
    assert 700 <= m.cells[0] <= 702


# ---- slices ----------------------------------------------------------------------------------------------------------

#: outer: mov ecx, 40; inner: lock inc qword [0x30000]; add [0x30008], rcx; call f; pause; dec ecx; jnz inner;
#: dec esi; jnz outer; hlt; f: push rax; inc qword [0x30010]; xadd [0x30018], rax; pop rax; ret
WORK = code(
    "b928000000",
    "f048ff042500000300",
    "48010c2508000300",
    "e80d000000",
    "f390",
    "ffc9",
    "75e4",
    "ffce",
    "75db",
    "f4",
    "90909090",
    "50",
    "48ff042510000300",
    "480fc1042518000300",
    "58",
    "c3",
)


def work(native, pointers, seed, rounds):
    """Run WORK in slices of random lengths; every stop, and the end state."""
    m = Machine(WORK, native=native, pointers=pointers)
    m.gpr[6] = rounds
    m.gpr[0] = 3
    chance = random.Random(seed)
    stops = []
    while (exit_ := m.run(m.cells[0] + chance.choice((1, 2, 3, 7, 20, 90, 300, 5_000)))) is BUDGET:
        stops.append((m.cells[0], m.state.rip, m.engine.budget.struct.frac))
    assert exit_ == Hlt(False)
    end = m.memory.read(DATA, 32), m.cells[0], list(m.gpr), m.state.rflags
    m.engine.close()
    return stops, end


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_hook_and_its_twin_stop_at_the_same_blocks_on_every_path(seed):
    results = [work(native, pointers, seed, 12) for native, pointers in ENGINES]
    assert len(results[0][0]) > 30
    for other in results[1:]:
        assert other == results[0]


def test_time_does_not_depend_on_the_slices():
    ends = [work(None, None, seed, 12)[1] for seed in range(4)]
    assert all(end == ends[0] for end in ends)


# ---- one instruction at a time -------------------------------------------------------------------------------------


def test_stepping_asks_around_each_instruction(make):
    m = make("ffc0 ffc0 eb00 ffc3 f4")  # inc eax; inc eax; jmp +0; inc ebx; hlt
    m.context.stepping = True
    assert m.run() == Hlt(False)
    assert [rip for rip, *_ in m.seen("step")] == [0x10000, 0x10002, 0x10004, 0x10006, 0x10008]
    assert [rip for rip, *_ in m.seen("stepped")] == [0x10002, 0x10004, 0x10006, 0x10008]
    assert (m.gpr[0], m.gpr[3]) == (2, 1)


def test_a_step_can_stop_before_its_instruction(make):
    m = make("ffc0 ffc0 f4")
    m.context.stepping = True
    m.port.then["step"] = lambda: m.state.rip == 0x10002 and m.engine.leave(SystemEvent("breakpoint"))
    assert m.run() == SystemEvent("breakpoint")
    assert (m.state.rip, m.gpr[0]) == (0x10002, 1)
    m.context.stepping = False
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 2


def test_accesses_are_noted_while_watching(make):
    m = make("8b042500000300 89042508000300 90 f4")  # mov eax, [0x30000]; mov [0x30008], eax; nop; hlt
    m.context.stepping = m.context.watching = True
    taken = []
    m.port.then["stepped"] = lambda: taken.append(list(m.context.take_accesses()))
    assert m.run() == Hlt(False)
    assert taken == [[(DATA, 4, False)], [(DATA + 8, 4, True)], []]


@every_engine
def test_read_modify_write_happens_once_across_thousands_of_stops(native, pointers):
    m = Machine(WORK, native=native, pointers=pointers)
    m.gpr[6] = 60
    m.gpr[0] = 3
    stops = 0
    while m.run(m.cells[0] + 5) is BUDGET:
        stops += 1
    m.engine.close()
    assert stops > 5_000
    assert m.memory.read_u(DATA, 8) == 60 * 40
    assert m.memory.read_u(DATA + 8, 8) == 60 * 40 * 41 // 2
    assert m.memory.read_u(DATA + 16, 8) == 60 * 40
    assert m.memory.read_u(DATA + 24, 8) == 60 * 40 * 3


def test_a_limit_lowered_in_mid_slice_takes_effect_at_the_next_block(make):
    m = make("e680", "eb00" * 100, "f4")  # out 0x80, al; blocks

    def lower(*_):
        m.cells[1] = m.cells[0]

    m.port.then["out"] = lower
    assert m.run() is BUDGET
    assert m.cells[0] in (600, 601)
    assert m.state.rip <= 0x10004


# ---- stale code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["write", "pointer", "rom", "integer"])
def test_code_that_the_host_changes_is_seen(make, how):
    m = make("b801000000 f4")  # mov eax, 1; hlt
    assert m.run() == Hlt(False)
    for value in (2, 3):
        patch = bytes([value])
        if how == "write":
            m.memory.write(CODE + 1, patch)
        elif how == "pointer":
            assert GuestPtr(m.memory, CODE, 16).write(1, patch)
        elif how == "rom":
            m.memory.load_rom(CODE + 1, patch)
        else:
            m.memory.write_u(CODE + 1, 4, value)
        m.state.rip = CODE
        assert m.run() == Hlt(False)
        assert m.gpr[0] == value


def test_the_second_page_of_a_block_is_watched_too(make):
    m = make("90" * 0x20, "b801000000 f4", at=0x10FF0)  # the mov lies behind the page's end
    assert m.run() == Hlt(False)
    m.memory.write(0x11011, b"\x07")
    m.state.rip = 0x10FF0
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 7


def test_code_that_the_guest_changes_is_seen(make):
    m = make("b801000000 c6042501000100 09 48ffce 75ee f4")  # mov eax, 1; mov byte [0x10001], 9; dec rsi; jnz; hlt
    m.gpr[6] = 2
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 9


def test_stores_to_data_throw_no_translations_away(make, monkeypatch):
    m = make("ffc0 ebfc")  # inc eax; jmp back
    m.run(100)
    flushes = []
    real = unicorn_lib.uc_ctl_0
    monkeypatch.setattr(unicorn_lib, "uc_ctl_0", lambda uc, what: flushes.append(what) or real(uc, what))
    m.memory.write(DATA, bytes(5_000))
    m.run(200)
    assert unicorn_lib.CTL_TB_FLUSH not in flushes
    m.memory.write(CODE + 0x800, b"\0")
    m.run(300)
    assert flushes.count(unicorn_lib.CTL_TB_FLUSH) == 1


@pytest.mark.parametrize("reload", ["", "0f20d9 0f22d9"], ids=["", "cr3"])  # mov rcx, cr3; mov cr3, rcx
@pytest.mark.parametrize("page", ["0300", "4300"], ids=["same", "alias"])  # 0x30000, and the same page at 0x430000
def test_code_in_a_page_that_was_data_first_is_watched_under_each_of_its_names(make, page, reload):
    m = make(
        f"c60425 0100{page} 05",  # mov byte [page + 1], 5
        "bb00000300 bd00010300 ffd3 ffd5",  # mov ebx, 0x30000; mov ebp, 0x30100; call rbx; call rbp
        reload,
        f"c60425 0100{page} 06 c60425 0101{page} 07",  # mov byte [page + 1], 6; mov byte [page + 0x101], 7
        "ffd3 ffd5 f4",  # call rbx; call rbp; hlt
    )
    m.memory.write_u(0x3010, 8, 0x87)  # 0x400000 is physical 0
    m.memory.write(DATA, code("b001 c3"))  # mov al, 1; ret
    m.memory.write(DATA + 0x100, code("b201 c3"))  # mov dl, 1; ret
    assert m.run() == Hlt(False)
    assert (m.gpr[0] & 0xFF, m.gpr[2] & 0xFF) == (6, 7)


def write_address(machine, address):
    """What the core's TLB holds for stores to a page: the address, with low bits that send them through slow code."""
    tables = (ctypes.c_uint64 * 6).from_address(machine.engine.budget.struct.tlb)
    supervisor = 2
    mask, entries = tables[2 * supervisor], tables[2 * supervisor + 1]
    return ctypes.c_uint64.from_address(entries + (address >> 6 & mask) + 8).value


@pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")
def test_stores_to_executable_pages_without_code_run_free():
    m = Machine(code("c6042500000300 09 c6042510000300 09 c6042500010100 09 f4"), native=True)
    assert m.run() == Hlt(False)  # mov byte [0x30000], 9; mov byte [0x30010], 9; mov byte [0x10100], 9; hlt
    assert write_address(m, DATA) == DATA
    assert write_address(m, CODE) & 0xFFF
    m.engine.close()


@pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")
@pytest.mark.parametrize(("name", "value"), [("CLASS_TLB_FILL", 0x50), ("TLB_CODE", 32)])
def test_a_tlb_that_lies_elsewhere_is_left_alone(monkeypatch, name, value):
    monkeypatch.setattr(budget, name, value)
    m = Machine(code("c6042500000300 09 f4"), native=True)
    assert not m.engine.budget.struct.cpu
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 1) == 9


# ---- several CPUs ----------------------------------------------------------------------------------------------------


def test_contexts_keep_their_registers_and_fractions(make):
    # movq xmm0, rax; fld1; again: inc rbx; movq rcx, xmm0; dec esi; jnz again; fistp qword [rdi]; hlt
    program = "66480f6ec0 d9e8 48ffc3 66480f7ec1 ffce 75f4 df3f f4"
    m = make(program, cpus=2)
    for n, context in enumerate(m.contexts):
        g = context.state.gpr
        g[0], g[6], g[7], g[8 + n] = 0x1111 * (n + 1), 300 + 50 * n, DATA + 8 * n, 0xAAAA_0000 + n
    running, time = [0, 1], [0, 0]
    while running:
        for n in list(running):
            m.cells[0] = time[n]
            exit_ = m.contexts[n].run(time[n] + 3)
            time[n] = m.cells[0]
            if exit_ is not BUDGET:
                assert exit_ == Hlt(False)
                running.remove(n)
    for n, context in enumerate(m.contexts):
        g = context.state.gpr
        assert g[3] == 300 + 50 * n
        assert g[1] == 0x1111 * (n + 1)
        assert g[8 + n] == 0xAAAA_0000 + n
        assert m.memory.read_u(DATA + 8 * n, 8) == 1
        # Alone, it takes the same time to the nanosecond: the fraction is kept.
        alone = make(program)
        alone.gpr[0], alone.gpr[6], alone.gpr[7] = 1, 300 + 50 * n, DATA
        assert alone.run() == Hlt(False)
        assert time[n] == alone.cells[0]


def test_stores_of_one_are_seen_by_the_other(make):
    m = make("c604250000030007 f4", cpus=2)  # mov byte [0x30000], 7; hlt
    m.memory.write(0x11000, code("8a042500000300 f4"))  # mov al, [0x30000]; hlt
    start64(m.contexts[1], 0x11000)
    assert m.contexts[0].run(LONG) == Hlt(False)
    assert m.contexts[1].run(LONG) == Hlt(False)
    assert m.contexts[1].state.gpr[0] == 7


def test_contexts_with_other_page_tables_see_other_memory(make):
    m = make("a1 0000200000000000 f4", cpus=2)  # mov eax, [0x200000]; hlt
    m.memory.write_u(DATA, 4, 0x11)
    m.memory.write(0x5000, m.memory.read(0x1000, 0x3000))  # a second set: 0x5000, 0x6000, 0x7000
    m.memory.write_u(0x5000, 8, 0x6007)
    m.memory.write_u(0x6000, 8, 0x7007)
    m.memory.write_u(0x7008, 8, 0x8007)
    m.memory.write_u(0x8000, 8, DATA | 7)  # 0x200000 leads to DATA
    m.contexts[1].state.cr3 = 0x5000
    seen = []
    for _ in range(3):
        for context in m.contexts:
            context.state.rip = CODE
            context.state.gpr[0] = 0
            assert context.run(LONG) == Hlt(False)
            seen.append(context.state.gpr[0])
    assert seen == [0x4433_2211, 0x11] * 3


def test_a_page_table_that_the_host_changes_is_seen_after_a_flush(make):
    m = make("a1 0000200000000000 f4")
    assert m.run() == Hlt(False)
    m.memory.write_u(DATA, 4, 0x77)
    m.memory.write_u(0x3008, 8, 0x8007)
    m.memory.write_u(0x8000, 8, DATA | 7)
    m.context.flush_tlb()
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x77


def test_flags_of_a_context_that_is_not_loaded_are_right(make):
    m = make("31c0 f9 90 eb00 f4", cpus=2)  # xor eax, eax; stc; nop; jmp +0; hlt
    assert m.contexts[0].run(1) is BUDGET  # lazily computed flags, in mid-program
    start64(m.contexts[1], 0x10006)
    assert m.contexts[1].run(LONG) == Hlt(False)
    assert m.contexts[0].state.rflags == 0x47  # CF, PF, ZF
    assert m.contexts[1].state.rflags == 0x2


# ---- the state ------------------------------------------------------------------------------------------------------


def test_reset(make):
    m = make()
    s = m.state
    m.engine.signature = 0x306C4
    s.gpr[5], s.cr2, s.rflags = 5, 6, 0xCD7
    s.set_dr(0, 1)
    m.context.write_msr(0xC000_0082, 0x1000)
    m.context.reset(init=False)
    assert [s.gpr[n] for n in range(16)] == [0, 0, 0x306C4] + [0] * 13
    assert (s.rip, s.rflags) == (0xFFF0, 2)
    assert (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) == (0x6000_0010, 0, 0, 0, 0)
    assert s.segment(Seg.CS) == Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B00)
    for which in (Seg.DS, Seg.ES, Seg.SS, Seg.FS, Seg.GS):
        assert s.segment(which) == Segment(0, 0, 0xFFFF, 0x9300)
    assert s.segment(Seg.LDTR) == Segment(0, 0, 0xFFFF, 0x8200)
    assert s.segment(Seg.TR) == Segment(0, 0, 0xFFFF, 0x8B00)
    assert s.gdt == s.idt == DescriptorTable(0, 0xFFFF)
    assert [s.get_dr(n) for n in (0, 1, 2, 3, 6, 7)] == [0, 0, 0, 0, 0xFFFF_0FF0, 0x400]
    assert (s.cpl, s.interrupt_shadow, s.long_mode) == (0, False, False)
    assert m.context.read_msr(0xC000_0082) == 0


def test_init_keeps_cache_bits_msrs_and_the_fpu(make):
    m = make("66480f6ec0 f4")  # movq xmm0, rax; hlt
    m.gpr[0] = 0x1234_5678
    assert m.run() == Hlt(False)
    m.context.write_msr(0xC000_0082, 0xABC0)
    m.state.cr0 = 0xC001_0033  # PG, CD... but not NW
    m.context.reset(init=True)
    s = m.state
    assert (s.cr0, s.cr3, s.cr4, s.efer) == (0x4000_0010, 0, 0, 0)
    assert (s.rip, s.rflags, s.gpr[0]) == (0xFFF0, 2, 0)
    assert s.segment(Seg.CS).base == 0xFFFF_0000
    assert m.context.read_msr(0xC000_0082) == 0xABC0
    m.memory.write(0x11000, code("66480f7ec0 f4"))  # movq rax, xmm0; hlt
    start64(m.context, 0x11000)
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0x1234_5678


def test_power_on_fpu_state(make):
    m = make("0fae1c2500000300 9bd93c2508000300 f4")  # stmxcsr [0x30000]; fstcw [0x30008]; hlt
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 4) == 0x1F80
    assert m.memory.read_u(DATA + 8, 2) == 0x37F


@pytest.mark.parametrize("loaded", [False, True])
def test_flags_round_trip(make, loaded):
    m = make("90")
    if loaded:
        m.engine.load(m.context)
    for value in (0x2, 0xCD7, 0x202, 0x10246, 0x3002, 0x24_0002):
        m.state.rflags = value
        assert m.state.rflags == value


def test_segments_and_tables_round_trip(make):
    m = make()
    for which in Seg:
        flags = 0x8200 if which == Seg.LDTR else 0x8B00 if which == Seg.TR else 0x9300
        value = Segment(0x20 + which, 0x1_2345_6000 + which, 0xFFFFF, flags)
        m.state.set_segment(which, value)
        assert m.state.segment(which) == value
    m.state.gdt, m.state.idt = DescriptorTable(0xFFFF_8000_0000_1000, 0x7F), DescriptorTable(0x2000, 0xFFF)
    assert m.state.gdt == DescriptorTable(0xFFFF_8000_0000_1000, 0x7F)
    assert m.state.idt == DescriptorTable(0x2000, 0xFFF)


def test_a_segment_describes_itself():
    s = Segment(0x33, 0, 0xFFFF_FFFF, 0xAF_FB00)
    assert (s.type, s.dpl, s.present, s.long, s.default_big) == (0xB, 3, True, True, False)
    assert Segment(0, 0, 0, 0x40_0000).default_big is True


def test_the_stack_segment_sets_the_privilege_level(make):
    m = make()
    m.state.set_segment(Seg.SS, Segment(0x2B, 0, 0xFFFF_FFFF, 0xCF_F300))
    assert m.state.cpl == 3
    m.state.cpl = 1
    assert m.state.cpl == 1


def test_virtual_8086_code_runs_at_cpl_3(make):
    m = make()
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    m.state.rflags = 0x2_0002
    assert m.state.cpl == 3


def test_the_shadow_can_be_set_and_cleared(make):
    m = make("ffc0 ffc0 f4")
    m.state.rflags = 0x202
    m.state.interrupt_shadow = True
    assert m.state.interrupt_shadow is True
    m.context.request_irq_window(True)
    assert m.run(m.cells[0] + 1) in (BUDGET, Hlt(True))
    assert all(rip >= 0x10002 for rip, *_ in m.seen("window"))


# ---- errors, kicks, ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "instruction"),
    [
        ("cpuid", "0fa2"),
        ("rdmsr", "0f32"),
        ("wrmsr", "0f30"),
        ("rdtsc", "0f31"),
        ("in", "ec"),
        ("out", "ee"),
        ("read", "8b042500000030"),
        ("write", "89042500000030"),
        ("hypercall", "0f01c1"),
        ("cr_write", "440f22c0"),
        ("cr_read", "440f20c0"),
        ("exception", "0f0b"),
        ("int", "cd80"),
        ("hlt", "f4"),
    ],
)
def test_a_python_error_in_an_answer_comes_out_and_the_engine_goes_on(make, what, instruction):
    m = make(instruction, "eb00 f4")
    m.port.raise_on[what] = StateError("from the port")
    with pytest.raises(StateError, match="from the port"):
        m.run()
    m.state.rip = CODE + len(code(instruction))
    assert m.run() == Hlt(False)


def test_an_error_in_a_system_call_comes_out(make):
    m = make("0f05 f4")
    m.state.efer = 0xD00
    m.port.raise_on["exception"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        m.run()
    m.state.rip = CODE + 2
    assert m.run() == Hlt(False)


def test_the_first_of_two_errors_counts(make):
    m = make("8b042500000030 89042500000030 eb00 f4")
    m.port.raise_on = {"read": ValueError("first"), "write": ValueError("second")}
    with pytest.raises(ValueError, match="first"):
        m.run()


def test_a_kick_before_a_slice_ends_it_before_it_begins(make):
    m = make("ffc0 f4")
    m.engine.kick()
    assert m.run() == Interrupted()
    assert (m.gpr[0], m.cells[0]) == (0, 0)
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 1


def test_a_kick_from_another_thread_ends_a_running_slice(make):
    m = make("ebfe", release_gil=True)  # jmp self

    def kick():
        while m.cells[0] < 10_000:
            pass
        m.engine.kick()

    kicker = threading.Thread(target=kick)
    kicker.start()
    exit_ = m.run()
    kicker.join()
    assert exit_ in (BUDGET, Interrupted())
    assert m.cells[0] >= 10_000
    assert m.state.rip == CODE


def test_a_kick_while_a_window_is_asked_for_is_not_lost(make):
    m = make("ebfe", release_gil=True)
    m.context.request_irq_window(True)
    stop = threading.Event()

    def kick():
        while m.cells[0] < 10_000:
            pass
        m.engine.kick()
        stop.set()

    kicker = threading.Thread(target=kick)
    kicker.start()
    while not stop.is_set():
        m.run()
    kicker.join()
    assert m.cells[0] >= 10_000


def test_leave_from_the_last_answer_wins_over_the_budget(make):
    m = make("f4")
    assert m.run(1) == Hlt(False)


def test_closing_twice_is_closing(make):
    m = make("f4")
    m.run()
    m.engine.close()
    m.engine.close()
    assert m.state.rip == 0x10001  # the state outlives the core


# ---- the proof and the paths ---------------------------------------------------------------------------------------


def test_the_layout_holds_for_this_build():
    assert proof.layout_holds.__wrapped__() is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CPU_TO_ENV", proof.CPU_TO_ENV + 8),
        ("ENV_END", proof.ENV_END + 8),
        ("CONTEXT_PAYLOAD", proof.CONTEXT_PAYLOAD + 8),
        ("_PROBES", ((proof._PROBES[0][0], proof._PROBES[0][1] + 8),)),
    ],
)
def test_another_layout_is_noticed(monkeypatch, name, value):
    monkeypatch.setattr(proof, name, value)
    assert proof.layout_holds.__wrapped__() is False


def test_another_version_is_not_trusted(monkeypatch):
    monkeypatch.setattr(unicorn_lib, "VERSION", (2, 1, 5))
    assert proof.layout_holds.__wrapped__() is False


def test_without_the_proof_the_public_path_is_taken(monkeypatch):
    monkeypatch.setattr(proof, "layout_holds", lambda: False)
    m = Machine(code("b80d000000 0fa2 f4"))
    assert m.engine.pointers is False
    assert m.run() == Hlt(False)
    assert m.gpr[3] == 0x22


def test_with_the_proof_pointers_are_used():
    m = Machine()
    assert m.engine.pointers is True
    assert m.engine.native is budget.NATIVE


def test_asking_for_the_hook_that_was_not_built(monkeypatch):
    monkeypatch.setattr(budget, "_budget", None)
    with pytest.raises(ConfigError, match="not built"):
        Machine(native=True)
    assert Machine(code("f4"), native=False).run() == Hlt(False)
