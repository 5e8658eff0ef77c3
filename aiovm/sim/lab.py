"""Run a scenario: build its host and machines, let the warm-up pass, measure, report.

    result = simulate(parse_scenario(text), seed=3)

The host, the vCPUs and the clock are the ones that run real machine code. What is measured begins at the end of the
warm-up; CPU time, waiting and idling up to that moment are taken off to the nanosecond.

What is built, and what runs at the end of the warm-up, stays to the end: the garbage collector need not look at it
again and again (``gc.freeze``). With 10,000 vCPUs it did for a fifth of the time.
"""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import TYPE_CHECKING

from aiovm.costs import Costs
from aiovm.halt_poll import LINUX_6_16, HaltPollParams
from aiovm.loop import Host, run
from aiovm.policy import by_name
from aiovm.policy.thread import ThreadState
from aiovm.sim.machine import SimMachine
from aiovm.sim.meter import Meter
from aiovm.sim.result import SimResult, VmResult
from aiovm.sim.workloads import install
from aiovm.spin import PleParams
from aiovm.stats import jain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.exits import Exit
    from aiovm.policy.thread import Thread
    from aiovm.sim.scenario import Scenario, VmSpec
    from aiovm.trace import Tracer

__all__ = ["Laboratory", "ran", "simulate", "waited"]

#: A window that never changes.
_FIXED_POLL = HaltPollParams(grow=0, shrink=1, limit_ns=0, grow_start_ns=0)
#: How often a progress callback is called in a run.
_STEPS = 50


class _Guest:
    """One machine with its workload and counts."""

    def __init__(self, host: Host, spec: VmSpec, number: int, scenario: Scenario) -> None:
        features = scenario.features if spec.features is None else spec.features
        self.name = spec.name if spec.count == 1 else f"{spec.name}{number}"
        self.machine = SimMachine(
            host,
            vcpus=spec.vcpus,
            ple=features.ple,
            spin_options=features.spin_options,
            kick_yields=features.kick_yields,
            halt_poll_ns=features.halt_poll,
            halt_poll_params=LINUX_6_16 if features.halt_poll_dynamic else _FIXED_POLL,
            ple_params=PleParams() if features.ple_grows else PleParams(grow=0),
        )
        if not features.halt_poll_dynamic:
            for vcpu in self.machine.vcpus:
                vcpu.halt_poll_ns = features.halt_poll
        self.meter = Meter(spec.vcpus)
        install(self.machine, spec.workload, self.meter)
        self._before: list[int] = []

    def _counts(self, now: int) -> list[int]:
        machine = self.machine
        stats = [v.stat for v in machine.vcpus]
        for context in machine.contexts:
            context.settle()
        return [
            sum(ran(v.thread, now) for v in machine.vcpus),
            sum(waited(v.thread, now) for v in machine.vcpus),
            sum(c.spin_ns for c in machine.contexts),
            machine.holder_preemptions,
            machine.waiter_preemptions,
            sum(s.exits for s in stats),
            sum(s.pause_exits for s in stats),
            sum(s.directed_yield_attempted for s in stats),
            sum(s.directed_yield_successful for s in stats),
            sum(v.thread.ignored_yields for v in machine.vcpus),
            sum(s.kicks for s in stats),
            sum(s.halt_exits for s in stats),
            sum(s.halt_attempted_poll for s in stats),
            sum(s.halt_successful_poll for s in stats),
            sum(c.state.rip for c in machine.contexts),
        ]

    def begin(self, now: int) -> None:
        """The warm-up is over."""
        self.meter.reset()
        self._before = self._counts(now)

    def operations(self) -> int:
        """Guest operations so far."""
        return sum(c.state.rip for c in self.machine.contexts)

    def report(self, now: int, elapsed: int) -> VmResult:
        """What happened since :meth:`begin`."""
        counts = [after - before for after, before in zip(self._counts(now), self._before, strict=True)]
        cpu, steal, spin, lhp, lwp, exits, ple, tried, won, ignored, kicks, halts, polled, caught, _ = counts
        meter, vcpus = self.meter, len(self.machine.vcpus)
        return VmResult(
            name=self.name,
            vcpus=vcpus,
            throughput_ops_per_s=sum(meter.ops) * 1_000_000_000 / elapsed,
            wait_p50_ns=meter.percentile(50),
            wait_p99_ns=meter.percentile(99),
            wait_max_ns=meter.longest,
            spin_share=spin / cpu if cpu else 0.0,
            cpu_share=cpu / (elapsed * vcpus),
            steal_share=steal / (elapsed * vcpus),
            fairness=jain(meter.ops),
            holder_preemptions=lhp,
            waiter_preemptions=lwp,
            exits=exits,
            ple_exits=ple,
            yields_tried=tried,
            yields_won=won,
            yields_ignored=ignored,
            kicks=kicks,
            halts=halts,
            polls_tried=polled,
            polls_won=caught,
        )


def ran(thread: Thread, now: int) -> int:
    """CPU time that ``thread`` had up to ``now`` (ns)."""
    return thread.ran_ns + (now - thread.started if thread.state is ThreadState.RUNNING else 0)


def waited(thread: Thread, now: int) -> int:
    """Time that ``thread`` was ready and had no CPU, up to ``now`` (ns): steal."""
    return thread.run_delay + (now - thread.ready_since if thread.state is ThreadState.READY else 0)


class Laboratory:
    """A scenario, built; on a running virtual loop. ``progress`` is called with the share that is done."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        seed: int | None = None,
        trace: Tracer | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.scenario = scenario
        self.seed = scenario.seed if seed is None else seed
        spec = scenario.host
        policy = by_name(spec.policy, slice_ns=int(spec.slice), jitter=spec.jitter, **spec.options)
        costs = replace(Costs(), **scenario.costs)
        self.host = Host(spec.pcpus, policy=policy, costs=costs, seed=self.seed, trace=trace)
        self.guests = [_Guest(self.host, vm, n, scenario) for vm in scenario.vm for n in range(vm.count)]
        self._progress = progress

    async def run(self) -> SimResult:
        """Run it and report."""
        scenario, host = self.scenario, self.host
        tasks = [task for guest in self.guests for task in guest.machine.launch()]
        try:
            gc.freeze()
            await self._pass(0, scenario.warmup, tasks)
            gc.freeze()
            start = host.clock.now()
            for guest in self.guests:
                guest.begin(start)
            busy = self._busy(start)
            switches = sum(p.switches for p in host.pcpus)
            await self._pass(scenario.warmup, scenario.duration, tasks)
            now = host.clock.now()
            elapsed = now - start
            return SimResult(
                scenario=scenario.name,
                seed=self.seed,
                duration_ns=elapsed,
                pcpus=len(host.pcpus),
                policy=scenario.host.policy,
                busy_share=(self._busy(now) - busy) / (elapsed * len(host.pcpus)),
                switches=sum(p.switches for p in host.pcpus) - switches,
                operations=sum(guest.operations() for guest in self.guests),
                vms=[guest.report(now, elapsed) for guest in self.guests],
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gc.unfreeze()

    def _busy(self, now: int) -> int:
        return sum(p.busy_ns + (now - p.current.started if p.current else 0) for p in self.host.pcpus)

    async def _pass(self, since: int, duration: int, tasks: Sequence[asyncio.Task[Exit]]) -> None:
        """Let ``duration`` ns pass from ``since`` on; a machine that fails ends the run."""
        total = self.scenario.warmup + self.scenario.duration
        for step in range(1, _STEPS + 1):
            at = since + duration * step // _STEPS
            timer = asyncio.ensure_future(asyncio.sleep((at - self.host.clock.now()) / 1_000_000_000))
            await asyncio.wait([timer])
            for task in tasks:
                if task.done() and task.exception() is not None:
                    task.result()
            if self._progress is not None:
                self._progress(at / total)


def simulate(
    scenario: Scenario,
    *,
    seed: int | None = None,
    trace: Tracer | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimResult:
    """Run ``scenario`` from its beginning, in virtual time; ``seed`` instead of its own."""

    async def main() -> SimResult:
        return await Laboratory(scenario, seed=seed, trace=trace, progress=progress).run()

    return run(main())
