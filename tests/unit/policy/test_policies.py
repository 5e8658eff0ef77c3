"""Policies by name, and each one's own promise, seen from who ran where and when."""

import asyncio
from itertools import pairwise

import pytest

from aiovm.engine.model import Cell
from aiovm.errors import ConfigError
from aiovm.loop import Host, run
from aiovm.policy import POLICIES, by_name
from aiovm.policy.base import Policy
from aiovm.sim.machine import SimMachine
from aiovm.trace import Kind, ListSink, Tracer

MS = 1_000_000


class Handing(Policy):
    def __init__(self, **options):
        super().__init__(**options)


class Mine(Policy):
    """One of the user's own."""

    name = "mine"


def watch(policy, machines, *, pcpus, ms=60, program=None):
    """Run compute-bound machines; [(pcpu, vcpu, start, end)] and the host."""
    tracer, records = Tracer(), ListSink()
    tracer.add(records)

    def busy(_):
        for _ in range(ms):
            yield MS

    async def main():
        host = Host(pcpus, seed=3, policy=policy, trace=tracer)
        built = [SimMachine(host, vcpus=n, ple=False) for n in machines]
        for machine in built:
            for index in range(len(machine.vcpus)):
                machine.start(index, program or busy)
        tasks = [t for machine in built for t in machine.launch()]
        await asyncio.sleep(ms / 1000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return host

    host = run(main())
    tracer.flush()
    spans, since = [], {}
    for record in records.records:
        if record.kind is Kind.SCHED_IN:
            since[record.vcpu] = record.now, record.a
        elif record.kind is Kind.SCHED_OUT:
            start, pcpu = since.pop(record.vcpu)
            spans.append((pcpu, record.vcpu, start, record.now))
    return spans, host


# ---- names -----------------------------------------------------------------------------------------------------


def test_every_policy_has_its_name():
    assert set(POLICIES) == {
        "fair",
        "round-robin",
        "never-preempt-holder",
        "gang",
        "relaxed-gang",
        "balance",
        "micro-slice",
        "random",
    }
    for name in POLICIES:
        policy = by_name(name, slice_ns=123_456, jitter=0)
        assert (policy.name, policy.slice_ns, policy.jitter) == (name, 123_456, 0)


def test_ones_own_policy_comes_from_a_module():
    assert by_name(f"{__name__}:Mine").name == "mine"
    assert by_name(f"{__name__}:Handing", slice_ns=5).slice_ns == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nice", {}, "no policy is called 'nice'"),
        ("nowhere:Mine", {}, "nowhere"),
        ("aiovm.policy:Nothing", {}, "Nothing"),
        ("aiovm.errors:ConfigError", {}, "does not derive"),
        (":", {}, "policy ':'"),
        ("fair", {"colour": 1}, "no option 'colour'"),
        ("fair", {"slice_ns": 0}, "a slice of 0 ns"),
        ("fair", {"jitter": 1000}, "jitter of 1000"),
    ],
)
def test_what_is_wrong_is_said(name, options, message):
    with pytest.raises(ConfigError, match=message):
        by_name(name, **options)


# ---- promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves_and_no_cpu_runs_two(name):
    spans, host = watch(by_name(name, slice_ns=2 * MS), [3, 3, 2], pcpus=3, ms=120)
    assert {vcpu for _, vcpu, _, _ in spans} == set(range(8))
    assert all(thread.ran_ns > 0 for thread in host.threads)
    for pcpu in range(3):
        own = sorted((start, end) for p, _, start, end in spans if p == pcpu)
        assert all(a[1] <= b[0] for a, b in pairwise(own))


def test_the_fair_policy_keeps_compute_bound_threads_within_two_slices():
    _, host = watch(by_name("fair", slice_ns=3 * MS), [4, 4], pcpus=2, ms=240)
    by_cpu = {}
    for thread in host.threads:
        by_cpu.setdefault(thread.pcpu_index, []).append(thread.ran_ns)
    assert all(max(ran) - min(ran) <= 2 * 3.3 * MS for ran in by_cpu.values())


def test_a_gang_runs_together_and_alone():
    spans, host = watch(by_name("gang", slice_ns=5 * MS, jitter=0), [3, 3], pcpus=3, ms=61)
    for start in {start for _, _, start, end in spans if start < end}:
        together = {vcpu // 3 for _, vcpu, s, e in spans if s <= start < e}
        assert len(together) == 1
    assert [sum(t.ran_ns for t in host.threads if t.group == g) for g in (0, 1)] == pytest.approx(
        [91.5 * MS, 91.5 * MS], rel=0.1
    )


def test_small_machines_share_a_row_and_wide_ones_take_several():
    _, host = watch(by_name("gang", slice_ns=5 * MS, jitter=0), [2, 2, 5], pcpus=4, ms=60)
    # Rows: two pairs side by side; four of the five; the fifth alone. 9 of 12 places are filled.
    busy = sum(p.busy_ns for p in host.pcpus)
    assert busy == pytest.approx(4 * 60 * MS * 9 / 12, rel=0.02)


def test_a_relaxed_gang_fills_what_a_strict_one_leaves_idle():
    strict = watch(by_name("gang", slice_ns=5 * MS), [4, 2], pcpus=4)[1]
    relaxed = watch(by_name("relaxed-gang", slice_ns=5 * MS), [4, 2], pcpus=4)[1]
    assert sum(p.busy_ns for p in strict.pcpus) < 0.8 * 4 * 60 * MS
    assert sum(p.busy_ns for p in relaxed.pcpus) == 4 * 60 * MS


def test_a_gang_whose_members_sleep_gives_its_turn_away():
    def sleepy(cpu):
        if cpu.index == 0:
            yield cpu.halt()
        for _ in range(100):
            yield MS

    _, host = watch(by_name("gang", slice_ns=20 * MS), [1, 1], pcpus=1, program=sleepy, ms=40)
    assert sum(p.busy_ns for p in host.pcpus) < MS  # both sleep


def test_balance_keeps_siblings_apart():
    spans, _ = watch(by_name("balance"), [4, 4], pcpus=4, ms=60)
    homes = {}
    for pcpu, vcpu, _, _ in spans:
        homes.setdefault((pcpu, vcpu // 4), set()).add(vcpu)
    assert all(len(vcpus) == 1 for vcpus in homes.values())


def test_micro_slices_are_short():
    spans, _ = watch(by_name("micro-slice", jitter=0), [2], pcpus=1, ms=3)
    assert max(end - start for _, _, start, end in spans[:-1]) <= 100_000


def test_a_holder_keeps_its_cpu_until_it_lets_go_or_patience_ends():
    def holder(hold):
        def program(cpu):
            if cpu.index == 0:
                yield MS
                cpu.lock_state = 2
                yield hold
                cpu.lock_state = 0
            yield 100 * MS

        return program

    def first_stay(hold):
        policy = by_name("never-preempt-holder", slice_ns=2 * MS, jitter=0)
        spans, _ = watch(policy, [2], pcpus=1, program=holder(hold), ms=20)
        return next(end for _, vcpu, _, end in spans if vcpu == 0)

    assert first_stay(1_600_000) == pytest.approx(1500 + 2_600_000, abs=1000)
    assert first_stay(50 * MS) == pytest.approx(1500 + 3 * MS, abs=1000)


def test_random_choice_is_seeded():
    runs = [[s[:2] for s in watch(by_name("random", slice_ns=MS), [4], pcpus=1, ms=20)[0]] for _ in range(2)]
    assert runs[0] == runs[1]
    assert [v for _, v in runs[0]] != [n % 4 for n in range(len(runs[0]))]


def test_random_still_honours_a_directed_yield():
    cell = Cell()

    def program(cpu):
        if cpu.index == 0:
            yield 1000
            yield cpu.sched_yield(2)
            yield 1000
        while not cell.value:
            yield 1000

    spans, _ = watch(by_name("random", slice_ns=5 * MS), [4], pcpus=1, program=program, ms=10)
    assert [vcpu for _, vcpu, _, _ in spans[:2]] == [0, 2]
