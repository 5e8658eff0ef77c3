"""The Unicorn engine: slices stop exactly, CPUs keep what is theirs, kicks and errors lose nothing."""

import gc
import random
import threading

import pytest
from core_machine import CODE, DATA, ENGINES, LONG, Machine, code, every_engine, start64

from aiovm.engine.base import Seg, Segment
from aiovm.engine.unicorn import core
from aiovm.errors import StateError
from aiovm.exits import BUDGET, Hlt, Interrupted, SystemEvent

# ---- plain running ---------------------------------------------------------------------------------------------------


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


# ---- one instruction at a time ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({}, True),
        ({"cr4": 0x630}, True),  # PSE, which says nothing under PAE
        ({"cr4": 0x20_0620}, False),  # SMAP
        ({"pkru": 4}, False),
        ({"cr0": 0x8000_0033}, False),  # WP
        ({"efer": 0x501}, False),  # NXE
    ],
)
def test_who_has_the_same_translations_finds_them_where_he_begins(make, monkeypatch, change, shares):
    m = make("ffc0 ebfc", cpus=2)  # inc eax; jmp back
    for name, value in change.items():
        setattr(m.contexts[1].state, name, value)
    for context in m.contexts:
        context.run(m.cells[0] + 20)
    flushes = []
    monkeypatch.setattr(m.engine.core, "flush_tlb", lambda: flushes.append(None))
    for context in m.contexts * 2:
        context.run(m.cells[0] + 20)
    assert len(flushes) == (0 if shares else 4)


def test_pse_counts_without_pae(make, monkeypatch):
    m = make("ffc0 ebfc", cpus=2)
    for context, cr4 in zip(m.contexts, (0x600, 0x610), strict=True):
        context.state.efer, context.state.cr0, context.state.cr4 = 0, 0x33, cr4
        context.state.set_segment(Seg.CS, Segment(0x08, 0, 0xFFFF_FFFF, 0xCF_9B00))
        context.run(m.cells[0] + 20)
    flushes = []
    monkeypatch.setattr(m.engine.core, "flush_tlb", lambda: flushes.append(None))
    for context in m.contexts * 2:
        context.run(m.cells[0] + 20)
    assert len(flushes) == 4


def test_flags_of_a_context_that_is_not_loaded_are_right(make):
    m = make("31c0 f9 90 eb00 f4", cpus=2)  # xor eax, eax; stc; nop; jmp +0; hlt
    assert m.contexts[0].run(1) is BUDGET  # lazily computed flags, in mid-program
    start64(m.contexts[1], 0x10006)
    assert m.contexts[1].run(LONG) == Hlt(False)
    assert m.contexts[0].state.rflags == 0x47  # CF, PF, ZF
    assert m.contexts[1].state.rflags == 0x2


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


@pytest.mark.parametrize("closed", [True, False])
def test_a_core_that_nobody_closed_is_freed_with_its_machine(closed, monkeypatch):
    """Once in either case: freeing a core twice corrupts the heap."""
    freed = []
    monkeypatch.setattr(core.lib, "uc_close", freed.append)
    opened = core.Core(pointers=True)
    handle = opened.handle
    if closed:
        opened.close()
        assert freed == [handle]
    del opened
    gc.collect()
    assert freed == [handle]
    monkeypatch.undo()
    core.lib.uc_close(handle)
