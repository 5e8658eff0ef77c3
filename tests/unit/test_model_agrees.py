"""Model locks beside the same locks in machine code, same parameters, a CPU for each vCPU.

The machine's CPUs see each other's stores up to an interleaving quantum (2 us) late, the model's at once: waits and
spinning may differ by that much, throughput may not.
"""

import pytest

from aiovm.locks.runner import Experiment, Workload, measure, report
from aiovm.sim.lab import simulate
from aiovm.sim.scenario import Features, HostSpec, LockBound, Ns, Scenario, VmSpec

DURATION = 12_000_000


@pytest.mark.parametrize("lock", ["ticket", "pvqspinlock"])
def test_throughput_and_spinning_agree_at_one_to_one(lock):
    workload = Workload(duration_ns=DURATION, warmup_ns=0)
    machine = measure(Experiment(lock, 4, 4, workload, ple=False, seed=1))
    row = report([machine], {lock: machine}).rows[0]
    model = simulate(
        Scenario(
            duration=Ns(DURATION),
            warmup=Ns(0),
            host=HostSpec(pcpus=4),
            features=Features(ple=False),
            vm=[VmSpec(vcpus=4, workload=LockBound(lock=lock, spin=512))],
        )
    )
    assert model.throughput == pytest.approx(row.throughput_ops_per_s, rel=0.05)
    # The guest reads its TSC once between "waiting" and the lock: an exit of 600 ns that the host counts as waiting.
    spinning = row.spin_share - row.throughput_ops_per_s * 600e-9 / 4
    assert model.spin_share == pytest.approx(spinning, abs=0.006)
    assert model.vms[0].wait_p99_ns == pytest.approx(row.wait_p99_ns, abs=2_500)
