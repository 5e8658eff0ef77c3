"""Random scenarios under every policy: what holds at every moment, and what must add up at the end."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.loop import run
from aiovm.policy import POLICIES
from aiovm.policy.thread import ThreadState
from aiovm.sim.lab import Laboratory, ran, simulate, waited
from aiovm.sim.scenario import Dbench, Ebizzy, Features, HostSpec, LockBound, Ns, Scenario, TcpRr, VmSpec

US = 1000
LOCKS = ["tas", "ticket", "pticket", "pvticket", "mcs", "qspinlock", "pvqspinlock"]

workloads = st.one_of(
    st.builds(
        LockBound,
        lock=st.sampled_from(LOCKS),
        locks=st.integers(1, 3),
        hold=st.integers(0, 5 * US).map(Ns),
        think=st.integers(1 * US, 30 * US).map(Ns),
        spin=st.sampled_from([1, 16, 512]),
        steal=st.booleans(),
        wait_early=st.booleans(),
        sees_preemption=st.booleans(),
    ),
    st.builds(Dbench, lock=st.sampled_from(LOCKS), spin=st.sampled_from([4, 512])),
    st.builds(
        Ebizzy,
        lock=st.sampled_from(LOCKS),
        user=st.integers(5 * US, 50 * US).map(Ns),
        mutex=st.booleans(),
        pv_flush=st.booleans(),
        pv_yield=st.booleans(),
        spin=st.sampled_from([4, 512]),
    ),
    st.builds(TcpRr, ticks=st.sampled_from([0, 1000])),
)
flags = st.booleans()
features = st.builds(
    Features,
    ple=flags,
    ple_grows=flags,
    directed_yield=flags,
    ready_filter=flags,
    undercommit_check=flags,
    eligibility_filter=flags,
    kernel_mode_filter=flags,
    boost_woken=flags,
    kick_yields=flags,
    halt_poll=st.sampled_from([Ns(0), Ns(200 * US)]),
)
scenarios = st.builds(
    Scenario,
    seed=st.integers(0, 1000),
    warmup=st.just(Ns(0)),
    duration=st.just(Ns(1500 * US)),
    host=st.builds(
        HostSpec,
        pcpus=st.integers(1, 4),
        policy=st.sampled_from(sorted(POLICIES)),
        slice=st.sampled_from([Ns(20 * US), Ns(200 * US)]),
        jitter=st.sampled_from([0, 100]),
    ),
    features=features,
    vm=st.lists(st.builds(VmSpec, vcpus=st.integers(1, 5), workload=workloads), min_size=1, max_size=3),
)


def look(host):
    """What must hold whenever nobody is in the middle of a step."""
    placed = []
    for pcpu in host.pcpus:
        if pcpu.current is not None:
            assert pcpu.current.state is ThreadState.RUNNING
            assert pcpu.current.pcpu_index == pcpu.index
            placed.append(pcpu.current.number)
        for thread in pcpu.queue:
            assert thread.state is ThreadState.READY
            assert thread.pcpu_index == pcpu.index
            placed.append(thread.number)
        if host.policy.conserving and pcpu.current is None:
            assert not any(other.queue for other in host.pcpus), "somebody waits beside an idle CPU"
    awake = [t.number for t in host.threads if t.state is not ThreadState.BLOCKED]
    assert sorted(placed) == awake, "a thread is lost, or in two places"
    if host.policy.name == "gang":
        rows = {host.policy._row_of(p.current) for p in host.pcpus if p.current is not None and not p.current.resched}
        assert len(rows) <= 1, "two gangs at once"


@settings(max_examples=60, deadline=None)
@given(scenarios)
def test_everybody_is_in_one_place_and_time_adds_up(scenario):
    async def main():
        laboratory = Laboratory(scenario)
        host = laboratory.host
        seen = [0]

        def inspect():
            now = host.clock.now()
            assert now > seen[-1] or now == 0
            seen.append(now)
            look(host)
            host.clock.call_at(now + 1777, inspect)

        # First look once every CPU has begun.
        host.clock.call_at(1, inspect)
        end = {}

        def sum_up():
            now = host.clock.now()
            end["ran"] = [ran(t, now) for t in host.threads]
            end["waited"] = [waited(t, now) for t in host.threads]
            end["busy"] = [p.busy_ns + (now - p.current.started if p.current else 0) for p in host.pcpus]
            end["now"] = now

        host.clock.call_at(1_400 * US, sum_up)
        await laboratory.run()
        return end, len(seen)

    end, looks = run(main())
    assert looks > 500
    now = end["now"]
    assert sum(end["ran"]) == sum(end["busy"])
    assert all(0 <= busy <= now for busy in end["busy"])
    # The rest of a thread's time it slept.
    assert all(r >= 0 and w >= 0 and r + w <= now for r, w in zip(end["ran"], end["waited"], strict=True))
    asleep = {type(spec.workload) for spec in scenario.vm}
    if asleep <= {LockBound} and all(spec.workload.lock in ("tas", "ticket", "mcs") for spec in scenario.vm):
        assert all(r + w == now for r, w in zip(end["ran"], end["waited"], strict=True))


@settings(max_examples=10, deadline=None)
@given(scenarios)
def test_the_same_scenario_gives_the_same_result(scenario):
    assert simulate(scenario) == simulate(scenario)


def test_results_do_not_depend_on_what_ran_before():
    first = simulate(Scenario(warmup=Ns(0), duration=Ns(2_000 * US)))

    async def other():
        await asyncio.sleep(1)

    run(other())
    assert simulate(Scenario(warmup=Ns(0), duration=Ns(2_000 * US))) == first
