"""What overcommit does to locks, measured on the lock guest: eight vCPUs, 2 µs held, 20 µs of exponential think time.

No pause-loop exiting, slices of 6 ms, five seeds. With two physical CPUs three vCPUs of four wait for a CPU: a queue's
next in line is one of them most of the time, and all behind it spin.
"""

from functools import cache
from statistics import median

import pytest

from aiovm.locks.runner import Experiment, Workload, measure

pytestmark = pytest.mark.timeout(600)  # a busy machine is slow, not stuck

SLICE = 6_000_000
SEEDS = range(5)
MS = 1_000_000
#: What is measured after which warm-up, ns. At 1:1 there is nothing to warm up; a convoy of tickets has to form.
AT_ONE_TO_ONE = Workload(duration_ns=20 * MS)
CONVOY = Workload(duration_ns=100 * MS, warmup_ns=200 * MS)
#: A holder that is never preempted makes the first preempted waiter rarer: the default warm-up, which is longer.
LATE_CONVOY = Workload(duration_ns=100 * MS)
NO_CONVOY = Workload(duration_ns=50 * MS, warmup_ns=50 * MS)


@cache
def measured(lock, pcpus, seed, workload, policy="fair"):
    found = measure(Experiment(lock, 8, pcpus, workload, policy=policy, slice_ns=SLICE, ple=False, seed=seed))
    assert found.status == 1, "the guest's own check: nobody was in the critical section with somebody else"
    return found


def alone(lock, seed):
    return measured(lock, 8, seed, AT_ONE_TO_ONE)


def efficiency(found):
    """Throughput a physical CPU, relative to a physical CPU for each vCPU."""
    return found.throughput / 2 / (alone(found.experiment.lock, found.experiment.seed).throughput / 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("lock", "twin"), [("ticket", "pvticket"), ("qspinlock", "pvqspinlock")])
def test_with_a_cpu_each_a_paravirtual_lock_is_as_good_as_its_twin(lock, twin, seed):
    assert alone(twin, seed).throughput == pytest.approx(alone(lock, seed).throughput, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_tickets_spin_themselves_to_death(seed):
    found = measured("ticket", 2, seed, CONVOY)
    assert found.spin_share >= 0.85
    assert efficiency(found) < 0.1
    assert SLICE <= found.wait_p99_ns <= 20 * SLICE
    assert found.lwp > found.lhp


@pytest.mark.parametrize("seed", SEEDS)
def test_halting_instead_of_spinning_cures_them(seed):
    found = measured("pvticket", 2, seed, CONVOY)
    assert efficiency(found) >= 0.7
    assert found.kicks > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_never_preempting_the_holder_cures_test_and_set(seed):
    found = measured("tas", 2, seed, NO_CONVOY, "never-preempt-holder")
    assert efficiency(found) >= 0.95
    assert found.lhp == 0


def test_and_does_not_cure_tickets():
    """It is the next in line who is missing, and he holds nothing."""
    found = [measured("ticket", 2, seed, LATE_CONVOY, "never-preempt-holder") for seed in SEEDS]
    assert median(efficiency(one) for one in found) < 0.5
    assert all(one.lhp == 0 for one in found)
