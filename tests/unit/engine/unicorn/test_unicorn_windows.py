"""PAUSE loops and interrupt windows: where they open, and where not."""

import random

from core_machine import CODE, Machine, code, start64

from aiovm.exits import BUDGET, Hlt, PauseLoop

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
