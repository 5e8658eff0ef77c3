"""What a simulation reports, as values: the same scenario and seed give the same JSON everywhere."""

from __future__ import annotations

import msgspec

__all__ = ["SimResult", "VmResult"]


class VmResult(msgspec.Struct, frozen=True):
    """One machine, over the measured time. Shares are of the CPU time it had, but ``steal`` of its vCPUs' time."""

    name: str
    vcpus: int
    throughput_ops_per_s: float
    wait_p50_ns: int
    wait_p99_ns: int
    wait_max_ns: int
    spin_share: float
    cpu_share: float
    steal_share: float
    fairness: float
    holder_preemptions: int
    waiter_preemptions: int
    exits: int
    ple_exits: int
    yields_tried: int
    yields_won: int
    #: Of those won: the scheduler picked the spinner again.
    yields_ignored: int
    kicks: int
    halts: int
    polls_tried: int
    polls_won: int


class SimResult(msgspec.Struct, frozen=True):
    """One run. ``busy_share``: of the physical CPUs' time."""

    scenario: str
    seed: int
    duration_ns: int
    pcpus: int
    policy: str
    busy_share: float
    switches: int
    operations: int
    vms: list[VmResult]

    @property
    def throughput(self) -> float:
        """Operations a second, all machines."""
        return sum(vm.throughput_ops_per_s for vm in self.vms)

    @property
    def spin_share(self) -> float:
        """Of all CPU time that guests had."""
        given = sum(vm.cpu_share for vm in self.vms)
        return sum(vm.spin_share * vm.cpu_share for vm in self.vms) / given if given else 0.0
