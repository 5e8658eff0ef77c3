"""The PAUSE-loop window and the directed yield's choice (``virt/kvm/kvm_main.c``)."""

from dataclasses import dataclass

import pytest

from aiovm.spin import PleParams, PleWindow, SpinOptions, on_spin


@dataclass
class V:
    """A vCPU to choose from; ready unless told otherwise."""

    ready: bool = True
    preempted: bool = True
    preempted_in_kernel: bool = True
    blocking: bool = False
    in_spin_loop: bool = False
    dy_eligible: bool = False
    runnable: bool = False
    interrupt: bool = False
    ipi_from: int = -1

    def dy_runnable(self):
        return self.runnable

    def dy_has_pending_interrupt(self):
        return self.interrupt

    def has_ipi_from(self, index):
        return index == self.ipi_from


class Host:
    """Answers ``yield_to`` from a list and notes who was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, index):
        self.asked.append(index)
        return self.answers.pop(0) if self.answers else 1


# ---- the window ------------------------------------------------------------------------------------------------


def test_vmx_defaults():
    p = PleParams()
    assert (p.gap, p.window, p.grow, p.shrink, p.window_max) == (128, 4096, 2, 0, 0xFFFFFFFF)


def test_window_doubles_and_snaps_back():
    ple = PleWindow()
    seen = [ple.window]
    for _ in range(2):
        ple.grow()
        seen.append(ple.window)
    ple.sched_in()
    assert [*seen, ple.window] == [4096, 8192, 16384, 4096]


def test_window_shrinks_by_division_to_its_base():
    ple = PleWindow(PleParams(shrink=2))
    ple.window = 16384
    seen = []
    for _ in range(3):
        ple.sched_in()
        seen.append(ple.window)
    assert seen == [8192, 4096, 4096]


def test_window_stops_at_its_maximum():
    ple = PleWindow()
    for _ in range(40):
        ple.grow()
    assert ple.window == 0xFFFFFFFF


@pytest.mark.parametrize(("grow", "expected"), [(0, 4096), (1, 5000), (4096, 9096), (10000, 15000)])
def test_growth_factor_resets_multiplies_or_adds(grow, expected):
    ple = PleWindow(PleParams(grow=grow))
    ple.window = 5000
    ple.grow()
    assert ple.window == expected


@pytest.mark.parametrize(("shrink", "expected"), [(0, 4096), (1, 20000), (4096, 15904), (30000, 4096)])
def test_shrink_factor_resets_divides_or_subtracts(shrink, expected):
    ple = PleWindow(PleParams(shrink=shrink))
    ple.window = 20000
    ple.sched_in()
    assert ple.window == expected


# ---- the choice ------------------------------------------------------------------------------------------------


def test_worked_trace_of_the_sheet():
    """§13.3: a spinner is passed over once, then taken."""
    v = [V(), V(), V(in_spin_loop=True), V(ready=False, preempted=False)]
    host = Host()
    assert on_spin(v, 0, 1, host) == (1, 1, 3)
    assert v[2].dy_eligible
    assert on_spin(v, 0, 1, host) == (2, 1, 1)
    assert not v[2].dy_eligible
    assert host.asked == [1, 2]


def test_a_lone_vcpu_yields_to_nobody():
    v = [V(dy_eligible=True)]
    assert on_spin(v, 0, 0, Host()) == (-1, 0, 0)
    assert v[0].dy_eligible  # not even looked at


def test_scan_starts_behind_the_last_boosted_and_wraps():
    host = Host(0, 0, 0)
    assert on_spin([V(), V(), V(), V()], 3, 1, host).target == -1
    assert host.asked == [2, 0, 1]


def test_target_is_an_index_not_an_offset():
    assert on_spin([V(), V(), V(), V()], 0, 2, Host()).target == 3


def test_spinner_is_marked_while_it_asks_and_not_after():
    v = [V(dy_eligible=True), V()]
    seen = []

    def yield_to(index):
        seen.append((index, v[0].in_spin_loop))
        return 1

    on_spin(v, 0, 0, yield_to)
    assert seen == [(1, True)]
    assert (v[0].in_spin_loop, v[0].dy_eligible) == (False, False)


def test_three_refusals_end_the_scan():
    host = Host(-3, -3, -3)
    assert on_spin([V() for _ in range(6)], 0, 0, host) == (-1, 3, 3)
    assert host.asked == [1, 2, 3]


def test_a_zero_answer_costs_no_refusal():
    host = Host(0, -3, 0, -3, 0, 1)
    assert on_spin([V() for _ in range(8)], 0, 0, host) == (6, 6, 6)


@pytest.mark.parametrize(
    ("candidate", "taken"),
    [
        (V(), True),
        (V(ready=False), False),
        (V(blocking=True), False),
        (V(blocking=True, runnable=True), True),
        (V(preempted_in_kernel=False), False),
        (V(preempted_in_kernel=False, interrupt=True), True),
        (V(preempted=False, preempted_in_kernel=False), True),
        (V(in_spin_loop=True), False),
        (V(in_spin_loop=True, dy_eligible=True), True),
    ],
)
def test_filters(candidate, taken):
    assert on_spin([V(), candidate], 0, 0, Host()).target == (1 if taken else -1)


@pytest.mark.parametrize(
    "candidate",
    [
        V(in_spin_loop=True, ready=False),
        V(in_spin_loop=True, blocking=True),
        V(in_spin_loop=True, preempted_in_kernel=False),
    ],
)
def test_only_who_passes_the_other_filters_is_toggled(candidate):
    on_spin([V(), candidate], 0, 0, Host())
    assert not candidate.dy_eligible


def test_filters_can_be_off():
    spinning, in_user = V(in_spin_loop=True), V(preempted_in_kernel=False)
    assert on_spin([V(), spinning], 0, 0, Host(), SpinOptions(eligibility_filter=False)).target == 1
    assert not spinning.dy_eligible
    assert on_spin([V(), in_user], 0, 0, Host(), SpinOptions(kernel_mode_filter=False)).target == 1


# ---- history ---------------------------------------------------------------------------------------------------


def test_before_2011_a_spinner_yields_to_nobody():
    host = Host()
    vcpus = [V(), V(), V()]
    outcome = on_spin(vcpus, 0, 0, host, SpinOptions(directed=False))
    assert (outcome.target, outcome.tries, outcome.probes) == (-1, 0, 0)
    assert host.asked == []


def test_before_2019_a_woken_vcpu_was_no_candidate():
    woken = V(preempted=False, interrupt=True)
    assert on_spin([V(), woken], 0, 0, Host(), SpinOptions(boost_woken=False)).target == -1
    assert on_spin([V(), woken], 0, 0, Host(), SpinOptions()).target == 1


def test_before_2013_running_vcpus_were_asked_too():
    running = V(ready=False, preempted=False)
    host = Host(0)
    assert on_spin([V(), running], 0, 0, host, SpinOptions(ready_filter=False)).tries == 1
    assert on_spin([V(), running], 0, 0, host, SpinOptions()).tries == 0


def test_before_2013_a_lone_spinner_asked_everybody():
    vcpus = [V() for _ in range(8)]
    assert on_spin(vcpus, 0, 0, Host(*[-1] * 8), SpinOptions(undercommit_check=False)).tries == 7
    assert on_spin(vcpus, 0, 0, Host(*[-1] * 8), SpinOptions()).tries == 3


def test_a_vcpu_preempted_at_cpl_3_with_an_interrupt_is_boosted_since_5_13():
    v = [V(), V(preempted_in_kernel=False, interrupt=True)]
    assert on_spin(v, 0, 0, Host(1)).target == 1
    assert on_spin(v, 0, 0, Host(1), SpinOptions(boost_interrupted=False)).target == -1


@pytest.mark.parametrize(
    ("candidate", "target"),
    [
        (V(preempted=False), -1),
        (V(preempted=False, ipi_from=0), 1),
        (V(preempted=False, ipi_from=2), -1),
        (V(preempted_in_kernel=False, interrupt=True), -1),
        (V(preempted_in_kernel=False, ipi_from=0), 1),
        (V(), 1),
    ],
)
def test_ipi_aware_looks_for_whom_the_spinner_waits(candidate, target):
    assert on_spin([V(), candidate], 0, 0, Host(1), SpinOptions(ipi_aware=True)).target == target
