"""Four vCPUs on two physical CPUs: what that does to a ticket lock, and to one that halts instead of spinning."""

from aiovm.locks.runner import Experiment, Workload, measure, report
from aiovm.units import format_ns

LOCKS = ("ticket", "pvticket")
workload = Workload(duration_ns=50_000_000)

# PLE off: nothing but the lock's own manners helps. The same guest at 1:1 is what efficiency is relative to.
alone = {lock: measure(Experiment(lock, vcpus=4, pcpus=4, workload=workload, ple=False, seed=1)) for lock in LOCKS}
crowded = [measure(Experiment(lock, vcpus=4, pcpus=2, workload=workload, ple=False, seed=1)) for lock in LOCKS]

for row in report(crowded, alone).rows:
    print(
        f"{row.lock:9} {row.vcpus}:{row.pcpus}  efficiency {row.efficiency:.2f}  spinning {row.spin_share:4.0%}  "
        f"p99 wait {format_ns(row.wait_p99_ns)}  kicks {row.kicks}"
    )
