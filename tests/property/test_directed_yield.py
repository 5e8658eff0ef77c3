"""Whatever the vCPUs' states: a spinner never picks itself, stores an index, and asks only who passed the filters."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from aiovm.halt_poll import LINUX_4_6, LINUX_6_16, adapt, begin
from aiovm.spin import PleParams, PleWindow, SpinOptions, on_spin


@dataclass
class V:
    ready: bool
    preempted: bool
    preempted_in_kernel: bool
    blocking: bool
    in_spin_loop: bool
    dy_eligible: bool
    runnable: bool
    interrupt: bool

    def dy_runnable(self):
        return self.runnable

    def dy_has_pending_interrupt(self):
        return self.interrupt


VCPUS = st.lists(st.builds(V, *[st.booleans()] * 8), min_size=1, max_size=9)
OPTIONS = st.builds(SpinOptions, eligibility_filter=st.booleans(), kernel_mode_filter=st.booleans())


@given(VCPUS, OPTIONS, st.data())
def test_directed_yield(vcpus, options, data):
    n = len(vcpus)
    me = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(0, n - 1))
    answers = data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n))
    before = [v.dy_eligible for v in vcpus]
    asked = []

    def yield_to(index):
        asked.append(index)
        return answers[index]

    outcome = on_spin(vcpus, me, last, yield_to, options)

    assert me not in asked
    assert len(asked) == len(set(asked)) == outcome.tries <= outcome.probes <= n - 1
    assert [(i - last - 1) % n for i in asked] == sorted((i - last - 1) % n for i in asked)
    assert sum(answers[i] < 0 for i in asked) <= 3
    if outcome.target >= 0:
        assert asked[-1] == outcome.target
        assert answers[outcome.target] > 0
    else:
        assert all(answers[i] <= 0 for i in asked)
    for i in asked:
        v = vcpus[i]
        assert v.ready
        assert not v.blocking or v.runnable
        if options.kernel_mode_filter:
            assert not v.preempted or v.preempted_in_kernel or v.interrupt
        if options.eligibility_filter:
            assert not v.in_spin_loop or before[i]
    for i, v in enumerate(vcpus):
        if i != me and not (options.eligibility_filter and v.in_spin_loop):
            assert v.dy_eligible == before[i]
    if n > 1:
        assert not vcpus[me].in_spin_loop
        assert not vcpus[me].dy_eligible


@given(VCPUS.filter(lambda v: len(v) > 1), st.data())
def test_a_spinner_refused_once_is_taken_the_second_time(vcpus, data):
    for v in vcpus:
        v.ready, v.preempted_in_kernel, v.blocking, v.in_spin_loop, v.dy_eligible = True, True, False, True, False
    last = data.draw(st.integers(0, len(vcpus) - 1))
    assert on_spin(vcpus, 0, last, lambda _: 1).target == -1
    assert on_spin(vcpus, 0, last, lambda _: 1).target > 0


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.lists(st.booleans(), max_size=40))
def test_ple_window_stays_between_base_and_maximum(base, grow, shrink, moves):
    ple = PleWindow(PleParams(window=base, grow=grow, shrink=shrink))
    for up in moves:
        if up:
            ple.grow()
        else:
            ple.sched_in()
        assert base <= ple.window <= 0xFFFF_FFFF


@given(st.sampled_from([LINUX_4_6, LINUX_6_16]), st.lists(st.integers(0, 10**7), max_size=60), st.integers(0, 10**6))
def test_halt_poll_window_stays_within_its_limit(params, blocks, limit):
    window = 0
    for block in blocks:
        window = begin(window, limit)
        assert 0 <= window <= limit
        window = adapt(window, block, limit, params)
        assert window == 0 or params.capped or window >= min(10_000, limit)
