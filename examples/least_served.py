"""A policy of one's own: on each CPU the thread with the least CPU time so far is next."""

from pathlib import Path

from msgspec.structs import replace

from aiovm.policy.base import Policy
from aiovm.policy.thread import Pcpu, Thread
from aiovm.sim.lab import simulate
from aiovm.sim.scenario import load_scenario


class LeastServed(Policy):
    """Round robin's queues, another choice."""

    name = "least-served"

    def pick(self, pcpu: Pcpu, now: int) -> Thread | None:
        if not pcpu.queue:
            return super().pick(pcpu, now)
        chosen = min(pcpu.queue, key=lambda thread: (thread.ran_ns, thread.number))
        pcpu.queue.remove(chosen)
        return chosen


if __name__ == "__main__":
    scenario = load_scenario(Path(__file__).parent / "laboratory.toml")
    for policy in ("fair", "round-robin", "least_served:LeastServed"):
        result = simulate(replace(scenario, host=replace(scenario.host, policy=policy)))
        web = [vm for vm in result.vms if vm.name.startswith("web")]
        build = [vm for vm in result.vms if vm.name.startswith("build")]
        served, built = (sum(vm.throughput_ops_per_s for vm in vms) / 1000 for vms in (web, build))
        wait = web[0].wait_p99_ns / 1000
        print(f"{policy:26}web {served:4.0f}k/s, p99 wait {wait:6.0f} us;  build {built:3.0f}k/s")
