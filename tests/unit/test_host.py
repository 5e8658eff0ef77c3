"""The host: who is on which CPU, when slices end, directed yield's three answers, steal time to the nanosecond."""

import asyncio
import gc
import itertools
import weakref

import pytest

from aiovm.clock import Alarm, VirtualClock
from aiovm.costs import Costs
from aiovm.errors import ConfigError, DeadlockError, StateError
from aiovm.loop import Host, run
from aiovm.policy.base import Policy
from aiovm.policy.fair import Fair
from aiovm.policy.thread import ThreadState
from aiovm.trace import Kind, ListSink, Tracer

MS = 1_000_000


class Guest:
    """A vCPU's stand-in: works for so long, blocks for so long, and notes what the host tells it."""

    def __init__(self, host, name, log=None):
        self.host = host
        self.name = name
        self.log = [] if log is None else log
        self.thread = host.add_thread(self, 0)
        self.wanted = 0
        self.came_off = []

    def now(self):
        return self.host.clock.now()

    # what the host says

    def sched_in(self, pcpu, now):
        self.log.append((now, self.name, "in", pcpu))

    def sched_out(self, *, preempted, now):
        self.log.append((now, self.name, "preempted" if preempted else "blocked", self.thread.pcpu_index))

    def need_resched(self):
        self.wanted += 1

    def holds_lock(self):
        return False

    def describe(self):
        return f"{self.name} {self.thread.state.value}"

    # what the guest does

    async def start(self):
        self.host.wake(self.thread)
        await self.thread.alarm

    async def work(self, ns, step=100_000):
        """Compute for ``ns`` of CPU time, in slices of ``step``; make way when asked."""
        while ns:
            n = min(ns, step)
            await self.thread.alarm.until(self.now() + n)
            ns -= n
            if self.thread.resched and self.host.preempt(self.thread):
                self.came_off.append(self.now())
                await self.thread.alarm

    async def sleep(self, ns):
        self.host.block(self.thread)
        await Alarm(self.host.clock).until(self.now() + ns)
        self.host.wake(self.thread)
        await self.thread.alarm

    def stop(self):
        self.host.retire(self.thread)


def free(**options):
    """Costs without a context switch, so that times are round."""
    return Costs(context_switch_ns=0, **options)


def host_of(pcpus, policy=None, **options):
    return Host(pcpus, policy=Policy(jitter=0) if policy is None else policy, costs=free(), **options)


async def together(*coroutines):
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)


# ---- making a host ---------------------------------------------------------------------------------------------


def test_a_host_has_a_cpu_and_the_loops_clock():
    async def main():
        with pytest.raises(ConfigError, match="at least one physical CPU"):
            Host(0)
        host = Host(3)
        loop = asyncio.get_running_loop()
        assert host.clock is loop.clock
        assert [p.index for p in host.pcpus] == [0, 1, 2]
        assert host.describe() == "no threads"
        assert (host.register_machine("a"), host.register_machine("b")) == (0, 1)
        assert isinstance(host.policy, Fair)

    run(main())


def test_the_quantum_is_the_clocks_lookahead():
    async def main():
        return Host(1, costs=Costs(quantum_ns=777)).clock.lookahead

    assert run(main()) == 777


def test_a_stall_names_the_hosts_threads():
    async def main():
        host = host_of(1)
        Guest(host, "a")
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="a blocked"):
        run(main())


def test_a_stall_names_the_threads_of_every_host():
    async def main():
        hosts = [host_of(1), host_of(1), host_of(1)]
        Guest(hosts[0], "a")
        Guest(hosts[1], "b")
        await asyncio.Event().wait()
        del hosts

    with pytest.raises(DeadlockError, match=r"at 0 ns: a blocked; b blocked$"):
        run(main())


def test_a_loop_does_not_keep_its_hosts():
    async def main():
        host = weakref.ref(host_of(1))
        gc.collect()
        return host()

    assert run(main()) is None


def test_a_host_is_made_on_a_running_loop():
    with pytest.raises(StateError, match="running event loop"):
        Host(1)


@pytest.mark.wall
async def test_on_another_loop_the_host_makes_a_wall_clock():
    assert Host(1).clock.is_virtual is False


def test_the_same_seed_chooses_the_same():
    async def main(seed):
        return [Host(1, seed=seed).random.random() for _ in range(2)]

    assert len({tuple(run(main(s))) for s in (1, 1, 2)}) == 2


# ---- wake, dispatch, block -------------------------------------------------------------------------------------


def test_a_woken_thread_runs_after_the_context_switch():
    async def main():
        host = Host(2, costs=Costs(context_switch_ns=1_500))
        a = Guest(host, "a")
        assert a.thread.state is ThreadState.BLOCKED
        assert a.thread.pcpu_index == -1
        host.wake(a.thread)
        assert a.thread.state is ThreadState.RUNNING
        await a.thread.alarm
        assert (a.now(), a.log) == (1_500, [(1_500, "a", "in", 0)])
        a.stop()
        return a.thread.state, host.pcpus[0].current

    assert run(main()) == (ThreadState.BLOCKED, None)


def test_waking_a_thread_that_is_not_blocked_does_nothing():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")
        for guest in (a, a, b, b):
            host.wake(guest.thread)
        assert (a.thread.state, b.thread.state) == (ThreadState.RUNNING, ThreadState.READY)
        assert host.pcpus[0].queue == [b.thread]
        assert host.pcpus[0].load == 2

    run(main())


def test_threads_spread_over_idle_cpus_in_order_and_return_to_their_own():
    async def main():
        host = host_of(3)
        guests = [Guest(host, n) for n in "abc"]
        for guest in guests:
            host.wake(guest.thread)
        assert [g.thread.pcpu_index for g in guests] == [0, 1, 2]
        for guest in guests[1:]:
            await guest.thread.alarm
            host.block(guest.thread)
        host.wake(guests[2].thread)
        assert guests[2].thread.pcpu_index == 2
        host.wake(guests[1].thread)
        assert guests[1].thread.pcpu_index == 1

    run(main())


def test_a_blocked_threads_cpu_goes_to_the_next():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        host.wake(b.thread)
        await Alarm(host.clock).until(40)
        host.block(a.thread)
        assert (a.thread.state, b.thread.state) == (ThreadState.BLOCKED, ThreadState.RUNNING)
        assert host.pcpus[0].current is b.thread
        assert host.pcpus[0].switches == 2

    run(main())


def test_an_idle_cpu_takes_from_the_longest_queue():
    async def main():
        host = host_of(2)
        a, b, c, d = (Guest(host, n) for n in "abcd")
        for guest in (a, b, c, d):
            host.wake(guest.thread)
        assert [t.number for t in host.pcpus[0].queue + host.pcpus[1].queue] == [2, 3]
        await Alarm(host.clock).until(10)
        host.block(b.thread)  # its own queue holds d
        assert host.pcpus[1].current is d.thread
        host.block(d.thread)  # now empty: c comes over
        assert host.pcpus[1].current is c.thread
        assert c.thread.pcpu_index == 1

    run(main())


def test_only_a_running_thread_can_block_or_be_preempted():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")
        with pytest.raises(StateError, match="thread 0 is blocked, not running"):
            host.block(a.thread)
        host.wake(a.thread)
        host.wake(b.thread)
        with pytest.raises(StateError, match="thread 1 is ready, not running"):
            host.preempt(b.thread)

    run(main())


# ---- slices ------------------------------------------------------------------------------------------------------


def test_a_slice_ends_only_when_somebody_waits():
    async def main():
        host = host_of(1)
        a = Guest(host, "a")
        await a.start()
        await a.work(50 * MS)
        assert (a.wanted, a.came_off, a.now()) == (0, [], 50 * MS)

    run(main())


def test_two_threads_take_turns_of_a_slice():
    async def main():
        host = host_of(1)
        log = []
        a, b = Guest(host, "a", log), Guest(host, "b", log)

        async def life(guest):
            await guest.start()
            await guest.work(11 * MS)
            guest.stop()

        await together(life(a), life(b))
        return log

    assert run(main()) == [
        (0, "a", "in", 0),
        (6 * MS, "a", "preempted", 0),
        (6 * MS, "b", "in", 0),
        (12 * MS, "b", "preempted", 0),
        (12 * MS, "a", "in", 0),
        (17 * MS, "a", "blocked", 0),
        (17 * MS, "b", "in", 0),
        (22 * MS, "b", "blocked", 0),
    ]


def test_a_slice_that_is_over_ends_as_soon_as_somebody_comes():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")

        async def late():
            await Alarm(host.clock).until(10_050_000)
            await b.start()
            b.stop()

        async def early():
            await a.start()
            await a.work(20 * MS)
            a.stop()

        await together(early(), late())
        return a.came_off

    assert run(main()) == [10_100_000]


def test_when_the_other_leaves_the_slice_no_longer_counts():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        host.wake(b.thread)
        await a.work(2 * MS)
        b.stop()
        await a.work(20 * MS)
        assert a.wanted == 0
        # Nothing is left to wait for either: time stands where the work ended.
        a.stop()
        assert host.clock.horizon() == 1 << 62

    run(main())


def test_preempting_with_nobody_waiting_gives_a_new_slice():
    async def main():
        host = host_of(1)
        a = Guest(host, "a")
        await a.start()
        await a.work(5 * MS)
        a.thread.resched = True
        assert host.preempt(a.thread) is False
        assert (a.thread.state, a.thread.resched) == (ThreadState.RUNNING, False)
        assert a.thread.slice_end == 11 * MS

    run(main())


def test_a_policy_may_ask_for_patience_at_a_slices_end():
    asked = []

    class Patient(Policy):
        def may_preempt(self, current, now):
            asked.append(now)
            return 300_000 if len(asked) < 3 else 0

    async def main():
        host = host_of(1, Patient(jitter=0))
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        host.wake(b.thread)
        with pytest.raises(TimeoutError):  # nobody drives b: a comes off and stays off
            async with asyncio.timeout(0.007):
                await a.work(8 * MS)
        return a.came_off

    assert run(main()) == [6_600_000]
    assert asked == [6 * MS, 6_300_000, 6_600_000]


def test_jitter_varies_slices_within_its_share():
    async def main():
        host = host_of(1, Policy(slice_ns=1_000, jitter=100), seed=3)
        a = Guest(host, "a")
        return {host.policy.slice_of(a.thread, host.pcpus[0]) for _ in range(2_000)}

    slices = run(main())
    assert (min(slices), max(slices)) == (900, 1_100)


# ---- wake-up preemption --------------------------------------------------------------------------------------------


def test_a_waking_thread_that_is_behind_preempts():
    async def main():
        host = host_of(1, Fair(jitter=0))
        a, b = Guest(host, "a"), Guest(host, "b")

        async def sleeper():
            await b.start()
            await b.sleep(4 * MS)
            first = b.now()
            b.stop()
            return first

        async def worker():
            await a.start()
            await a.work(10 * MS)
            a.stop()

        task = asyncio.create_task(sleeper())
        await asyncio.sleep(0.001)
        await worker()
        return await task, a.came_off

    assert run(main()) == (4 * MS, [4 * MS])


def test_a_waking_thread_that_is_not_behind_waits_for_the_slices_end():
    async def main():
        host = host_of(1, Fair(jitter=0))
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        b.thread.vruntime = 20 * MS
        host.wake(b.thread)
        assert not a.thread.resched
        await a.work(6 * MS + 1)
        return a.wanted

    assert run(main()) == 1


# ---- directed yield ------------------------------------------------------------------------------------------------


def test_yield_to_when_both_are_alone_on_their_cpus():
    async def main():
        host = host_of(2)
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        await b.start()
        assert host.yield_to(a.thread, b.thread) == -1
        assert (a.thread.resched, b.thread.resched) == (False, False)
        assert (a.thread.state, b.thread.state) == (ThreadState.RUNNING, ThreadState.RUNNING)

    run(main())


def test_yield_to_a_thread_that_runs():
    async def main():
        host = host_of(2)
        a, b, c = (Guest(host, n) for n in "abc")
        for guest in (a, b, c):
            host.wake(guest.thread)
        assert c.thread.pcpu_index == 0
        assert host.yield_to(a.thread, b.thread) == 0
        assert (a.thread.resched, a.wanted, b.wanted) == (False, 0, 0)

    run(main())


def test_yield_to_a_thread_that_sleeps_or_never_ran():
    async def main():
        host = host_of(1)
        a, b, c, d = (Guest(host, n) for n in "abcd")
        for guest in (a, b, c):
            host.wake(guest.thread)
        host.retire(c.thread)
        assert host.yield_to(a.thread, c.thread) == 0
        assert host.yield_to(a.thread, d.thread) == 0
        assert a.thread.resched is False

    run(main())


@pytest.mark.parametrize("policy", [Policy, Fair])
def test_yield_to_a_ready_thread_makes_it_the_next(policy):
    async def main():
        host = host_of(1, policy(jitter=0))
        a, b, c, d = (Guest(host, n) for n in "abcd")
        await a.start()
        for guest in (b, c, d):
            host.wake(guest.thread)
        await a.work(100_000)
        assert host.yield_to(a.thread, c.thread) == 1
        assert a.thread.resched is True
        assert a.thread.state is ThreadState.RUNNING  # until its slice's end
        assert host.preempt(a.thread, yielded=True) is True
        assert host.pcpus[0].current is c.thread
        assert a.thread.state is ThreadState.READY

    run(main())


@pytest.mark.parametrize("policy", [Policy, Fair])
def test_yield_to_a_thread_in_another_queue_reschedules_that_cpu(policy):
    async def main():
        host = host_of(2, policy(jitter=0))
        a, b, c, d = (Guest(host, n) for n in "abcd")
        for guest in (a, b, c, d):
            host.wake(guest.thread)
        assert d.thread.pcpu_index == 1
        await Alarm(host.clock).until(100)
        assert host.yield_to(a.thread, d.thread) == 1
        assert (a.thread.resched, b.thread.resched, b.wanted) == (True, True, 1)
        assert host.preempt(b.thread) is True
        assert host.pcpus[1].current is d.thread

    run(main())


def run_queue_locks(pcpus, **costs):
    """A host with a thread running on each CPU; ends of yields that begin at the given times, by pairs of CPUs."""
    host = Host(pcpus, policy=Policy(jitter=0), costs=Costs(**costs))
    threads = [Guest(host, str(n)).thread for n in range(pcpus)]
    for thread in threads:
        host.wake(thread)
    return host, lambda me, target, at: host.lock_queues(threads[me], threads[target], at)


def test_a_yield_waits_for_the_locks_of_both_queues():
    async def main():
        _, ends = run_queue_locks(6, yield_ns=500)
        assert ends(0, 1, 1_000) == 1_500
        assert ends(2, 3, 1_100) == 1_600  # other queues
        assert ends(4, 1, 1_100) == 2_000  # behind the first
        assert ends(1, 1, 1_200) == 2_500
        assert ends(5, 4, 1_300) == 2_500  # the third holds 4's lock while it waits for 1's
        assert ends(0, 1, 2_500) == 3_000  # everybody is done

    run(main())


def test_a_cpu_switches_when_it_has_its_queues_lock():
    async def main():
        host, ends = run_queue_locks(2, yield_ns=500, context_switch_ns=1_500)
        late = Guest(host, "late")
        host.wake(late.thread)
        assert ends(1, 0, 0) == 500
        host.block(host.pcpus[0].current)
        await late.thread.alarm
        assert host.clock.now() == 2_000

    run(main())


def test_a_saved_host_knows_who_holds_its_queues_locks():
    async def main():
        host, ends = run_queue_locks(2)
        ends(0, 1, 0)
        for pcpu in host.pcpus:
            host.retire(pcpu.current)
        other = Host(2, policy=Policy(jitter=0))
        assert other.restore(host.save())
        assert other.lock_queues(Guest(other, "a").thread, Guest(other, "b").thread, 0) == 500
        waker = Guest(other, "c").thread
        other.wake(waker)
        assert other.lock_queues(waker, waker, 0) == 1_000

    run(main())


def test_is_single_task():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")
        await a.start()
        assert host.is_single_task(a.thread) is True
        host.wake(b.thread)
        assert host.is_single_task(a.thread) is False

    run(main())


# ---- steal time and accounting -------------------------------------------------------------------------------------


def test_steal_is_the_time_ready_and_not_running():
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")

        async def first():
            await a.start()
            await a.work(7 * MS)
            a.stop()

        async def second():
            await Alarm(host.clock).until(1_234_567)
            await b.start()
            await b.work(8 * MS)
            b.stop()

        await together(first(), second())
        return a.thread.run_delay, b.thread.run_delay, a.now()

    # b waits from 1,234,567 to 6 ms and 1 ms more while a ends; a waits for b's slice.
    assert run(main()) == (6 * MS, 6 * MS - 1_234_567 + 1 * MS, 15 * MS)


def test_sleeping_is_not_stolen():
    async def main():
        host = host_of(1)
        a = Guest(host, "a")
        await a.start()
        await a.sleep(50 * MS)
        await a.work(1 * MS)
        a.stop()
        return a.thread.run_delay, a.thread.ran_ns

    assert run(main()) == (0, MS)


def test_busy_and_idle_add_up():
    async def main():
        host = Host(2, policy=Fair(jitter=100), seed=5, costs=Costs(context_switch_ns=1_500))
        guests = [Guest(host, n) for n in "abcde"]

        async def life(guest, n):
            await guest.start()
            for _ in range(3):
                await guest.work((n + 1) * 700_000)
                await guest.sleep((5 - n) * 300_000)
            guest.stop()

        await together(*(life(g, n) for n, g in enumerate(guests)))
        busy = [p.busy_ns for p in host.pcpus]
        assert sum(busy) == sum(g.thread.ran_ns for g in guests)
        assert all(b <= host.clock.now() for b in busy)
        work = sum(3 * (n + 1) * 700_000 for n in range(5))
        assert sum(busy) == work + 1_500 * sum(p.switches for p in host.pcpus)
        # No CPU idles while somebody waits: whoever waited had both CPUs busy.
        assert sum(g.thread.run_delay for g in guests) > 0

    run(main())


def test_two_threads_never_share_a_cpu():
    async def main():
        trace, sink = Tracer(), ListSink()
        trace.add(sink)
        host = Host(2, policy=Fair(), seed=9, trace=trace, costs=free())
        guests = [Guest(host, n) for n in "abcde"]

        async def life(guest):
            await guest.start()
            for _ in range(4):
                await guest.work(host.random.randint(1, 9) * MS)
                await guest.sleep(host.random.randint(1, 4) * MS)
            guest.stop()

        await together(*map(life, guests))
        trace.flush()
        on = {}
        for record in sink.of(Kind.SCHED_IN, Kind.SCHED_OUT):
            if record.kind is Kind.SCHED_IN:
                assert record.a not in on
                on[record.a] = record.vcpu
            else:
                assert on.pop(record.a) == record.vcpu
        assert on == {}
        reasons = {r.b for r in sink.of(Kind.SCHED_OUT)}
        assert reasons == {0, 1}
        for thread in host.threads:
            delays = [r.b for r in sink.of(Kind.SCHED_IN) if r.vcpu == thread.number]
            assert sum(delays) == thread.run_delay
        wakes = sink.of(Kind.WAKE)
        assert len(wakes) == 5 * 5
        assert {r.a for r in wakes} == {-1}

    run(main())


def test_the_same_seed_gives_the_same_schedule():
    async def main(seed):
        host = Host(2, seed=seed)
        log = []

        async def life(guest, n):
            await guest.start()
            for _ in range(3):
                await guest.work(15 * MS + n)
                await guest.sleep(MS)
            guest.stop()

        await together(*(life(Guest(host, n, log), i) for i, n in enumerate("abcde")))
        return log

    assert run(main(1)) == run(main(1)) != run(main(2))


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_retire_from_each_state():
    async def main():
        host = host_of(1)
        a, b, c = (Guest(host, n) for n in "abc")
        for guest in (a, b, c):
            host.wake(guest.thread)
        host.retire(b.thread)  # READY
        assert (b.thread.state, host.pcpus[0].queue) == (ThreadState.BLOCKED, [c.thread])
        host.retire(a.thread)  # RUNNING: c follows
        assert host.pcpus[0].current is c.thread
        host.retire(b.thread)  # BLOCKED
        assert b.thread.state is ThreadState.BLOCKED
        host.retire(c.thread)
        assert (host.pcpus[0].current, host.pcpus[0].load) == (None, 0)

    run(main())


def test_a_retired_threads_alarm_does_not_ring_in_its_next_life():
    async def main():
        host = Host(1, policy=Policy(jitter=0), costs=Costs(context_switch_ns=1_000))
        a, b = Guest(host, "a"), Guest(host, "b")
        host.wake(a.thread)  # will ring at 1,000
        host.retire(a.thread)
        await Alarm(host.clock).until(5_000)
        await b.start()
        host.wake(a.thread)
        resumed = []

        async def life():
            await a.thread.alarm
            resumed.append((a.now(), a.thread.state))

        task = asyncio.create_task(life())
        await Alarm(host.clock).until(9_000)
        assert resumed == []
        host.block(b.thread)
        await task
        return resumed

    assert run(main()) == [(10_000, ThreadState.RUNNING)]


@pytest.mark.parametrize("when", ["running", "ready", "blocked"])
def test_a_cancelled_coroutine_gives_its_cpu_back(when):
    async def main():
        host = host_of(1)
        a, b = Guest(host, "a"), Guest(host, "b")

        async def life(guest):
            try:
                await guest.start()
                if when == "blocked":
                    await guest.sleep(500 * MS)
                await guest.work(100 * MS)
            finally:
                guest.stop()

        first = asyncio.create_task(life(b if when == "ready" else a))
        await Alarm(host.clock).until(1)
        second = asyncio.create_task(life(a if when == "ready" else b))
        await Alarm(host.clock).until(2 * MS)
        victim = second if when == "ready" else first
        victim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await victim
        assert a.thread.state is ThreadState.BLOCKED
        assert a.thread not in host.pcpus[0].queue
        other = first if when == "ready" else second
        if when == "blocked":
            other.cancel()
        else:
            await other
        await asyncio.gather(other, return_exceptions=True)
        assert host.pcpus[0].load == 0

    run(main())


def test_policies_may_arm_calls_and_ask_for_rescheduling():
    async def main():
        host = host_of(2)
        a = Guest(host, "a")
        await a.start()
        host.call_at(5_000, lambda: host.reschedule(host.pcpus[0]))
        host.call_at(6_000, lambda: host.reschedule(host.pcpus[1]))
        await a.work(10_000, step=1_000)
        return a.wanted

    assert run(main()) == 1


def test_a_clock_may_be_given():
    clock = VirtualClock()

    async def main():
        assert Host(1, clock=clock).clock is clock

    run(main(), clock=clock)


def test_thread_numbers_count_up():
    async def main():
        host = host_of(1)
        return [Guest(host, str(n)).thread.number for n in range(3)]

    assert run(main()) == list(itertools.islice(itertools.count(), 3))
