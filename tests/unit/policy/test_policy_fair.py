"""The fair policy: virtual runtimes, the floor, sleepers' credit, next and skip buddies (kernel/sched/fair.c 4.19)."""

import random

import pytest

from aiovm.policy.base import Requeue
from aiovm.policy.fair import Fair
from aiovm.policy.thread import Pcpu, Thread, ThreadState

MS = 1_000_000


def thread(number, vruntime=0, pcpu=0):
    return Thread(number, 0, None, None, state=ThreadState.READY, pcpu_index=pcpu, vruntime=vruntime)


def fair(pcpus=1, **options):
    p = Fair(**options)
    p.attach(tuple(Pcpu(n) for n in range(pcpus)), random.Random(1))
    return p


def run_on(p, number, t, since=0):
    p.pcpus[number].current = t
    t.pcpu_index = number
    t.started = since
    t.state = ThreadState.RUNNING
    return t


def queue(p, number, *threads, why=Requeue.PREEMPTED):
    for t in threads:
        t.pcpu_index = number
        p.enqueue(t, p.pcpus[number], why, 0)


def wake(p, number, t, now=0):
    p.woke(t, p.pcpus[number], now)
    t.pcpu_index = number
    p.enqueue(t, p.pcpus[number], Requeue.WAKE, now)


def test_defaults_are_4_19s():
    p = Fair()
    assert (p.name, p.slice_ns, p.wakeup_granularity, p.sleeper_credit) == ("fair", 6 * MS, 1 * MS, 3 * MS)


def test_the_least_runtime_is_next_and_equals_go_by_arrival():
    p = fair()
    a, b, c, d = thread(0, 30 * MS), thread(1, 10 * MS), thread(2, 20 * MS), thread(3, 10 * MS)
    queue(p, 0, a, b, c, d)
    assert [p.pick(p.pcpus[0], 0) for _ in range(5)] == [b, d, c, a, None]


def test_noise_below_a_granularity_does_not_change_the_turns():
    p = fair(pcpus=2)
    a, b = thread(0, 6 * MS + 999_999), thread(1, 6 * MS)
    queue(p, 0, a, b)
    assert p.pick(p.pcpus[0], 0) is a
    c, d = thread(2, 6 * MS + 1_000_001), thread(3, 6 * MS)
    queue(p, 1, c, d)
    assert p.pick(p.pcpus[1], 0) is d


def test_running_costs_runtime():
    p = fair()
    a = thread(0)
    p.ran(a, 6 * MS)
    p.ran(a, 1)
    assert a.vruntime == 6_000_001


def test_a_sleeper_starts_at_most_its_credit_below_the_floor():
    p = fair()
    run_on(p, 0, thread(0, 100 * MS))
    sleeper, napper = thread(1, 5 * MS), thread(2, 99 * MS)
    wake(p, 0, sleeper)
    wake(p, 0, napper)
    assert sleeper.vruntime == 97 * MS
    assert napper.vruntime == 99 * MS


def test_the_floor_knows_what_the_running_thread_has_used_of_its_slice():
    p = fair()
    run_on(p, 0, thread(0, 100 * MS), since=10 * MS)
    sleeper = thread(1)
    wake(p, 0, sleeper, now=15 * MS)
    assert sleeper.vruntime == 102 * MS


def test_the_floor_never_falls():
    p = fair()
    run_on(p, 0, thread(0, 100 * MS))
    wake(p, 0, thread(1, 100 * MS))
    p.pcpus[0].current = None
    p.pcpus[0].queue.clear()
    sleeper = thread(2)
    wake(p, 0, sleeper)
    assert sleeper.vruntime == 97 * MS


def test_a_sleeper_does_not_hoard_on_an_idle_cpu_either():
    p = fair()
    p.ran(run_on(p, 0, thread(0, 90 * MS)), 10 * MS)
    p.pcpus[0].current = None
    sleeper = thread(1, 2 * MS)
    p.woke(sleeper, p.pcpus[0], 0)  # runs at once: it never comes to a queue
    assert sleeper.vruntime == 97 * MS


def test_runtime_is_taken_along_relative_to_the_queues_floors():
    p = fair(2)
    run_on(p, 0, thread(0, 100 * MS))
    run_on(p, 1, thread(1, 500 * MS))
    t = thread(2, 101 * MS, pcpu=0)
    wake(p, 1, t)
    assert t.vruntime == 501 * MS
    p.remove(t)
    wake(p, 0, t)
    assert t.vruntime == 101 * MS


def test_a_waking_thread_preempts_when_behind_by_more_than_the_granularity():
    p = fair()
    current = run_on(p, 0, thread(0, 10 * MS), since=5 * MS)
    assert p.wakeup_preempts(thread(1, 10 * MS), current, 6 * MS) is False
    assert p.wakeup_preempts(thread(1, 10 * MS), current, 6 * MS + 1) is True
    assert p.wakeup_preempts(thread(1, 9 * MS - 1), current, 5 * MS) is True


def test_the_next_buddy_is_picked_unless_that_is_unfair():
    p = fair()
    a, b = thread(0, 0), thread(1, 1 * MS)
    queue(p, 0, a, b)
    p.yield_to(b, 0)
    assert p.pick(p.pcpus[0], 0) is b
    queue(p, 0, thread(2, 1 * MS + 1))
    p.yield_to(p.pcpus[0].queue[1], 0)
    assert p.pick(p.pcpus[0], 0) is a


def test_the_buddy_is_forgotten_after_one_choice():
    p = fair()
    a, b, c = thread(0, 0), thread(1, 100), thread(2, 50)
    queue(p, 0, a, b, c)
    p.yield_to(b, 0)
    assert [p.pick(p.pcpus[0], 0) for _ in range(3)] == [b, a, c]


def test_who_yields_is_passed_over_once():
    p = fair()
    queue(p, 0, thread(1, 1 * MS), thread(2, 90 * MS))
    yielder = thread(0, 0)
    queue(p, 0, yielder, why=Requeue.YIELDED)
    assert p.pick(p.pcpus[0], 0).number == 1
    assert p.pick(p.pcpus[0], 0) is yielder


def test_who_yields_far_behind_the_others_is_picked_again():
    p = fair()
    queue(p, 0, thread(1, 1 * MS + 1))
    yielder = thread(0, 0)
    queue(p, 0, yielder, why=Requeue.YIELDED)
    assert p.pick(p.pcpus[0], 0) is yielder


@pytest.mark.parametrize(("deboost", "group", "first"), [(False, 0, 0), (True, 0, 1), (True, 1, 0)])
def test_a_deboosted_yielder_gives_way_to_its_sibling(deboost, group, first):
    p = Fair(deboost=deboost)
    p.attach([Pcpu(0)], random.Random(0))
    sibling = thread(1, 20 * MS)
    sibling.group = group
    queue(p, 0, sibling)
    p.yield_to(sibling, 0)
    yielder = thread(0, 0)
    queue(p, 0, yielder, why=Requeue.YIELDED)
    assert yielder.vruntime == (19 * MS if first else 0)
    assert p.pick(p.pcpus[0], 0).number == first


def test_who_yields_to_nobody_goes_on():
    p = fair()
    yielder = thread(0)
    queue(p, 0, yielder, why=Requeue.YIELDED)
    assert p.pick(p.pcpus[0], 0) is yielder


def test_a_buddy_that_left_is_ignored():
    p = fair()
    a, b = thread(0, 0), thread(1, 10)
    queue(p, 0, a, b)
    p.yield_to(b, 0)
    p.remove(b)
    assert p.pick(p.pcpus[0], 0) is a


def test_an_idle_cpu_pulls_who_waits_longest_from_the_longest_queue():
    p = fair(3)
    run_on(p, 1, thread(9, 400 * MS))
    run_on(p, 2, thread(8, 100 * MS))
    a, b, c = thread(0, 402 * MS), thread(1, 401 * MS), thread(2, 100 * MS)
    a.ready_since, b.ready_since, c.ready_since = 10, 20, 5
    queue(p, 1, a, b)
    queue(p, 2, c)
    assert p.pick(p.pcpus[0], 30) is a
    assert p.pcpus[1].queue == [b]


def test_a_pulled_threads_runtime_is_rebased():
    p = fair(2)
    run_on(p, 0, thread(9, 400 * MS))
    t = thread(0, 402 * MS)
    queue(p, 0, t)
    assert p.pick(p.pcpus[1], 0) is t
    assert t.vruntime == 2 * MS


def test_a_pulled_buddy_is_nobodys_buddy():
    p = fair(2)
    run_on(p, 0, thread(9))
    a, b = thread(0), thread(1)
    queue(p, 0, a)
    p.yield_to(a, 0)
    assert p.pick(p.pcpus[1], 0) is a
    a.pcpu_index = 1
    queue(p, 0, b)
    queue(p, 0, a)  # back again: it has no claim any more
    b.vruntime = a.vruntime - 1
    assert p.pick(p.pcpus[0], 0) is b


def test_nothing_waits_anywhere():
    p = fair(2)
    assert p.pick(p.pcpus[0], 0) is None
