"""What model guests do all day: the programs behind a scenario's workloads.

Each is a few distributions and the lock kinds; what they are meant to resemble and where their figures come from is on
the page docs/paper-table.md. Times drawn from a distribution are truncated to whole nanoseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.engine.model.locks import Lock, Mcs, PreemptableTicket, Queued, TestAndSet, Ticket
from aiovm.engine.model.pvlocks import PvQueued, PvTicket
from aiovm.errors import ConfigError
from aiovm.sim.guest import TIMER_VECTOR, GuestKernel, Mutex
from aiovm.sim.scenario import Dbench, Ebizzy, KernelBuild, LockBound, TcpRr

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from aiovm.engine.model import ModelContext, Program
    from aiovm.sim.machine import SimMachine
    from aiovm.sim.meter import Meter
    from aiovm.sim.scenario import Workload

__all__ = ["draw", "install", "make_lock"]


def make_lock(spec: LockBound | KernelBuild | Dbench | Ebizzy, kernel: GuestKernel) -> Lock:
    """One lock of the kind that ``spec`` names."""
    preempted = kernel.is_preempted if spec.sees_preemption else None
    match spec.lock:
        case "tas":
            return TestAndSet(spec.line)
        case "ticket":
            return Ticket(spec.line)
        case "pticket":
            return PreemptableTicket()
        case "mcs":
            return Mcs()
        case "qspinlock":
            return Queued()
        case "pvticket":
            return PvTicket(spec.spin, spec.line)
        case "pvqspinlock":
            return PvQueued(spec.spin, steal=spec.steal, wait_early=spec.wait_early, preempted=preempted)
        case _:
            raise ConfigError(f"no lock is called {spec.lock!r}")


def draw(random: random.Random, kind: str, mean: int) -> Callable[[], int]:
    """A source of durations (ns) with this mean."""
    if kind == "fixed" or not mean:
        return lambda: mean
    if kind == "uniform":
        return lambda: random.randrange(2 * mean + 1)
    rate = 1 / mean
    return lambda: int(random.expovariate(rate))


def install(machine: SimMachine, workload: Workload, meter: Meter) -> None:
    """Give every CPU of ``machine`` its program."""
    kernel = (
        GuestKernel(machine, call_ns=workload.call, pv_flush=workload.pv_flush, pv_yield=workload.pv_yield)
        if (isinstance(workload, Ebizzy))
        else GuestKernel(machine)
    )
    match workload:
        case LockBound():
            locks = [make_lock(workload, kernel) for _ in range(workload.locks)]
            _start(machine, lambda cpu: _lock_bound(cpu, workload, locks, meter))
        case KernelBuild() | Dbench():
            locks = [make_lock(workload, kernel) for _ in range(workload.locks)]
            _start(machine, lambda cpu: _system_calls(cpu, workload, locks, meter))
        case Ebizzy():
            locks = [make_lock(workload, kernel) for _ in range(workload.locks)]
            mutex = Mutex()
            _start(machine, lambda cpu: _ebizzy(cpu, workload, kernel, mutex, locks, meter))
        case TcpRr():
            _start(machine, lambda cpu: _tcp_rr(cpu, workload, meter))


def _start(machine: SimMachine, program: Callable[[ModelContext], Program]) -> None:
    for index in range(len(machine.vcpus)):
        machine.start(index, program)


def _section(cpu: ModelContext, lock: Lock, hold: int, meter: Meter) -> Program:
    """One critical section; what the lock guests publish about it is kept as they do."""
    asked = cpu.now()
    cpu.lock_state = 1
    yield from lock.lock(cpu)
    cpu.lock_state = 2
    meter.waited(cpu.now() - asked)
    yield hold
    yield from lock.unlock(cpu)
    cpu.lock_state = 0


def _lock_bound(cpu: ModelContext, spec: LockBound, locks: list[Lock], meter: Meter) -> Program:
    think = draw(cpu.random, spec.think_dist, spec.think + spec.overhead)
    hold = draw(cpu.random, spec.hold_dist, spec.hold)
    only = locks[0] if len(locks) == 1 else None
    index = cpu.index
    while True:
        yield think()
        yield from _section(cpu, only or locks[cpu.random.randrange(len(locks))], hold(), meter)
        meter.ops[index] += 1


def _system_calls(cpu: ModelContext, spec: KernelBuild | Dbench, locks: list[Lock], meter: Meter) -> Program:
    """User code, then a system call with a few critical sections spread over it."""
    user = draw(cpu.random, "exp", spec.user)
    hold = draw(cpu.random, "exp", spec.hold)
    part = draw(cpu.random, "exp", spec.kernel // spec.sections)
    yield cpu.enable_interrupts()
    while True:
        cpu.user()
        yield user()
        cpu.kernel()
        for _ in range(spec.sections):
            yield part()
            yield from _section(cpu, locks[cpu.random.randrange(len(locks))], hold(), meter)
        meter.ops[cpu.index] += 1


def _ebizzy(
    cpu: ModelContext, spec: Ebizzy, kernel: GuestKernel, mutex: Mutex, locks: list[Lock], meter: Meter
) -> Program:
    user = draw(cpu.random, "exp", spec.user)
    part = draw(cpu.random, "exp", spec.kernel // max(1, spec.sections))
    hold = draw(cpu.random, "exp", spec.hold)
    everybody = range(len(kernel.machine.vcpus))
    yield cpu.enable_interrupts()
    while True:
        cpu.user()
        yield user()
        cpu.kernel()
        if spec.mutex:
            yield from mutex.lock(cpu)
        for _ in range(spec.sections):
            yield part()
            yield from _section(cpu, locks[cpu.random.randrange(len(locks))], hold(), meter)
        if not cpu.random.randrange(spec.flush_every):
            asked = cpu.now()
            yield from kernel.call_others(cpu, everybody)
            meter.waited(cpu.now() - asked)
        if spec.mutex:
            yield from mutex.unlock(cpu)
        meter.ops[cpu.index] += 1


def _tcp_rr(cpu: ModelContext, spec: TcpRr, meter: Meter) -> Program:
    """The transaction time that the client sees is the wait: wire time and the server's, asleep or not."""
    tick = 1_000_000_000 // spec.ticks if spec.ticks else 0
    next_tick = cpu.random.randrange(tick) if tick else 0
    arrival = cpu.now() + spec.wire if spec.clients else 0
    while True:
        due = min(t for t in (arrival, next_tick) if t)
        if cpu.now() < due:
            yield cpu.arm_timer(due, TIMER_VECTOR)
            yield cpu.wait_for_interrupt()
            continue
        if arrival and cpu.now() >= arrival:
            yield spec.service
            meter.waited(cpu.now() - arrival + spec.wire)
            meter.ops[cpu.index] += 1
            arrival = cpu.now() + spec.wire
        if tick and cpu.now() >= next_tick:
            yield 1_000
            next_tick += tick
