"""The base policy: one queue a CPU, first in first out, fixed slices."""

import random

import pytest

from aiovm.errors import ConfigError
from aiovm.policy.base import Policy, Requeue
from aiovm.policy.thread import Pcpu, Thread, ThreadState


def thread(number, pcpu=-1):
    return Thread(number, 0, None, None, state=ThreadState.READY, pcpu_index=pcpu)


def policy(pcpus, **options):
    p = Policy(**options)
    p.attach(tuple(Pcpu(n) for n in range(pcpus)), random.Random(1))
    return p


def queue(p, number, *threads):
    for t in threads:
        t.pcpu_index = number
        p.enqueue(t, p.pcpus[number], Requeue.WAKE, 0)


def test_its_name_and_defaults():
    p = Policy()
    assert (p.name, p.slice_ns, p.jitter, p.conserving) == ("round-robin", 6_000_000, 100, True)


@pytest.mark.parametrize("options", [{"slice_ns": 0}, {"slice_ns": -1}, {"jitter": -1}, {"jitter": 1000}])
def test_senseless_slices_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1 ns"):
        Policy(**options)


def test_first_in_first_out():
    p = policy(1)
    a, b, c = (thread(n) for n in range(3))
    queue(p, 0, a, b, c)
    assert [p.pick(p.pcpus[0], 0) for _ in range(4)] == [a, b, c, None]


def test_an_empty_queue_takes_from_the_longest_and_the_lowest_of_equals():
    p = policy(4)
    a, b, c, d, e = (thread(n) for n in range(5))
    queue(p, 1, a)
    queue(p, 2, b, c)
    queue(p, 3, d, e)
    assert p.pick(p.pcpus[0], 0) is b
    assert p.pick(p.pcpus[0], 0) is d
    assert p.pick(p.pcpus[0], 0) is a


def test_a_waking_thread_goes_back_to_its_idle_cpu():
    p = policy(3)
    assert p.select_pcpu(thread(0, pcpu=2), 0) is p.pcpus[2]


def test_else_to_the_first_idle_one():
    p = policy(3)
    p.pcpus[0].current = thread(8)
    p.pcpus[2].current = thread(9)
    assert p.select_pcpu(thread(0, pcpu=2), 0) is p.pcpus[1]
    assert p.select_pcpu(thread(1), 0) is p.pcpus[1]


def test_else_to_the_least_loaded_and_its_own_of_equals():
    p = policy(3)
    for n, pcpu in enumerate(p.pcpus):
        pcpu.current = thread(10 + n)
    queue(p, 0, thread(1))
    assert p.select_pcpu(thread(0, pcpu=0), 0) is p.pcpus[1]
    assert p.select_pcpu(thread(0, pcpu=2), 0) is p.pcpus[2]
    assert p.select_pcpu(thread(0), 0) is p.pcpus[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_crowd_knows_what_asking_every_cpu_would_tell(seed):
    p = policy(70)
    source = random.Random(seed)
    for number in range(600):
        pcpu = p.pcpus[source.randrange(70)]
        change = source.randrange(6)
        if change < 2:
            pcpu.queue.append(thread(number))
        elif change == 2:
            pcpu.queue[:] = [thread(number)] * source.randrange(4)
        elif change == 3:
            del pcpu.queue[:1]
        else:
            pcpu.current = thread(number) if change == 4 else None
        loads = [len(c.queue) + (c.current is not None) for c in p.pcpus]
        queues = [len(c.queue) for c in p.pcpus]
        idle = [c.index for c in p.pcpus if c.current is None]
        own = source.randrange(70)
        assert [c.load for c in p.pcpus] == loads
        assert p.crowd.first_idle == (idle[0] if idle else -1)
        assert p.crowd.longest_queue == (queues.index(max(queues)) if any(queues) else -1)
        assert p.crowd.least_loaded(own) == (own if loads[own] == min(loads) else loads.index(min(loads)))
        assert p.crowd.least_loaded(-1) == loads.index(min(loads))


def test_the_directed_yields_target_is_next():
    p = policy(1)
    a, b, c = (thread(n) for n in range(3))
    queue(p, 0, a, b, c)
    p.yield_to(c, 0)
    assert [p.pick(p.pcpus[0], 0) for _ in range(3)] == [c, a, b]


def test_a_thread_can_be_taken_out():
    p = policy(2)
    a, b = thread(0), thread(1)
    queue(p, 1, a, b)
    p.remove(a)
    assert p.pcpus[1].queue == [b]


def test_it_never_preempts_for_a_wakeup_and_always_at_a_slices_end():
    p = policy(1)
    assert p.wakeup_preempts(thread(0), thread(1), 10**12) is False
    assert p.may_preempt(thread(0), 0) == 0


def test_slices_without_jitter_are_fixed():
    p = policy(1, slice_ns=1_234, jitter=0)
    assert {p.slice_of(thread(0), p.pcpus[0]) for _ in range(50)} == {1_234}


def test_slices_with_jitter_repeat_for_the_same_seed():
    lengths = []
    for _ in range(2):
        p = policy(1, slice_ns=1_000_000, jitter=200)
        lengths.append([p.slice_of(thread(0), p.pcpus[0]) for _ in range(100)])
    assert lengths[0] == lengths[1]
    assert len(set(lengths[0])) > 50
    assert all(800_000 <= n <= 1_200_000 for n in lengths[0])


def test_why_a_thread_comes_to_a_queue():
    assert [why.value for why in Requeue] == ["wake", "preempted", "yielded"]


def test_load_counts_the_running_thread():
    pcpu = Pcpu(0)
    assert pcpu.load == 0
    pcpu.queue.append(thread(0))
    assert pcpu.load == 1
    pcpu.current = thread(1)
    assert pcpu.load == 2


def test_threads_and_cpus_compare_by_identity():
    assert thread(0) != thread(0)
    assert Pcpu(0) != Pcpu(0)
