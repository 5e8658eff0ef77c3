"""Run the lock guest on overcommitted vCPUs and read what happened to its locks.

One measurement is one machine on one virtual clock. The guest counts operations and waits; the host adds what only it
can see, by looking at the guest's "outside / waiting / holding" word: where the CPU time went (at the end of every
slice), and in which state a vCPU was preempted. Only the guest's measuring window counts, on both sides.

*Warm-up.* A FIFO lock under overcommit has two regimes: for some slices nobody is preempted in the queue and all is
well; then somebody is, everybody queues up behind him, and it stays like that (a convoy). The second is the steady
state, so the default warm-up lasts until it is reached: ``WARMUP_ROUNDS`` rounds in which every vCPU gets its slice.
With a physical CPU for each vCPU there is nothing to wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm import guests
from aiovm.clock import VirtualClock
from aiovm.costs import Costs
from aiovm.errors import ConfigError, InternalError
from aiovm.locks.counters import read_counters
from aiovm.locks.layout import DISTRIBUTIONS, LOCKS, LockLayout, Phase
from aiovm.locks.result import LockReport, LockRow
from aiovm.loop import Host, run
from aiovm.policy import by_name
from aiovm.stats import jain
from aiovm.trace import HashSink, Kind, Tracer
from aiovm.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiovm.vcpu import Vcpu

__all__ = ["WARMUP_ROUNDS", "Experiment", "Measurement", "Workload", "measure", "report"]

WARMUP_ROUNDS: Final = 12
#: What the guest writes to the debug-exit port, as process status: all is well, its own check failed, bad options.
_OK: Final = 1
_BROKEN: Final = 3
_REFUSED: Final = 5


@dataclass(frozen=True, slots=True)
class Workload:
    """What each vCPU does, again and again: think, take one of ``nlocks`` locks, hold it. Times in ns.

    ``spin``: PAUSEs before a paravirtual lock halts. ``warmup_ns`` None: by itself (see the module's text).
    """

    hold_ns: int = 2_000
    think_ns: int = 20_000
    hold_dist: str = "fixed"
    think_dist: str = "exp"
    nlocks: int = 1
    spin: int = 512
    duration_ns: int = 200_000_000
    warmup_ns: int | None = None

    def __post_init__(self) -> None:
        if self.duration_ns < 1_000_000:
            raise ConfigError(f"bad duration {self.duration_ns} ns: at least 1ms")
        if not 1 <= self.nlocks <= 64:
            raise ConfigError(f"bad number of locks {self.nlocks}: 1 to 64")
        for name in (self.hold_dist, self.think_dist):
            if name not in DISTRIBUTIONS:
                raise ConfigError(f"bad distribution {name!r}: {', '.join(DISTRIBUTIONS)}")
        if self.hold_ns < 0 or self.think_ns < 0 or self.spin < 1:
            raise ConfigError("times must not be negative, and a lock spins at least once")

    def text(self) -> str:
        """The workload in a phrase, for titles."""
        return f"{self.hold_ns} ns held, {self.think_ns} ns {self.think_dist} think time, {self.nlocks} lock(s)"


@dataclass(frozen=True, slots=True)
class Experiment:
    """One measurement: a lock on ``vcpus`` over ``pcpus``, and everything that it depends on."""

    lock: str
    vcpus: int
    pcpus: int
    workload: Workload = Workload()
    policy: str = "fair"
    slice_ns: int = 6_000_000
    ple: bool = True
    seed: int = 0
    trace: str | None = None
    native: bool | None = None
    #: By how much CPUs may run apart; less is finer and slower.
    quantum_ns: int = Costs().quantum_ns

    def __post_init__(self) -> None:
        if self.lock not in LOCKS:
            raise ConfigError(f"no lock is called {self.lock!r}; there are {', '.join(LOCKS)}")
        if not 1 <= self.vcpus <= 255:
            raise ConfigError(f"a machine has 1 to 255 vCPUs, not {self.vcpus}")
        if not 1 <= self.pcpus <= self.vcpus:
            raise ConfigError(f"{self.pcpus} physical CPUs for {self.vcpus} vCPUs: 1 to as many as vCPUs")

    @property
    def warmup_ns(self) -> int:
        """How long the guest runs before it measures."""
        if self.workload.warmup_ns is not None:
            return self.workload.warmup_ns
        if self.pcpus == self.vcpus:
            return 0
        return WARMUP_ROUNDS * self.slice_ns * -(-self.vcpus // self.pcpus)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run showed; counters cover the measuring window."""

    experiment: Experiment
    status: int
    ops: int
    wait_p50_ns: int
    wait_p99_ns: int
    wait_max_ns: int
    fairness: float
    spin_share: float
    lhp: int
    lwp: int
    ple_exits: int
    yields_tried: int
    yields_won: int
    kicks: int
    halts: int
    trace_hash: str

    @property
    def throughput(self) -> float:
        """Operations a second."""
        return self.ops * 1_000_000_000 / self.experiment.workload.duration_ns


class _Meter:
    """The host's side of one run: looks at the guest's words when a slice ends and when a vCPU comes off."""

    def __init__(self, vm: Vm, layout: LockLayout) -> None:
        self._vm = vm
        self._layout = layout
        slot = vm.memory.map.find(layout.state_address(0))
        assert slot is not None
        self._bytes = slot.bytes_
        self._base = layout.state_address(0) - slot.base
        self._seen = [0] * len(vm.vcpus)
        self._begin = self._end = 0
        self._counters: dict[str, int] | None = None
        self.spent = [0, 0, 0]
        self.preempted = [0, 0, 0]
        for vcpu in vm.vcpus:
            vcpu.on_slice = self._slice
            vcpu.on_sched_out = self._sched_out
            vcpu.lock_probe = self._holds

    def _word(self, vcpu: Vcpu) -> int:
        value: int = self._bytes[self._base + 64 * vcpu.index]
        return value

    def _holds(self, vcpu: Vcpu) -> bool:
        return self._word(vcpu) == Phase.HOLDING

    def _slice(self, vcpu: Vcpu, start: int, end: int) -> None:
        word = self._word(vcpu)
        trace = self._vm.trace
        if trace.on:
            number = vcpu.thread.number
            trace.emit(start, Kind.ENTRY, number, vcpu.context.state.rip, end)
            if word != self._seen[vcpu.index]:
                self._seen[vcpu.index] = word
                trace.emit(end, Kind.LOCK, number, word, self._bytes[self._base + 64 * vcpu.index + 4])
        if self._counters is None:
            self._find_window(end)
        elif end < self._end:
            self.spent[word] += end - start

    def _find_window(self, now: int) -> None:
        params = self._layout.read_params(self._vm.memory.read)
        if params.measure_tsc and self._vm.tsc_to_ns(params.measure_tsc) <= now:
            self._begin, self._end = self._vm.tsc_to_ns(params.measure_tsc), self._vm.tsc_to_ns(params.end_tsc)
            self._counters = read_counters(self._vm.vcpus)
            self._vm.clock.call_at(self._end, self._close)

    def _sched_out(self, vcpu: Vcpu, preempted: bool) -> None:
        if preempted and self._begin and self._vm.clock.now() < self._end:
            self.preempted[self._word(vcpu)] += 1

    def _close(self) -> None:
        assert self._counters is not None
        after = read_counters(self._vm.vcpus)
        self._counters = {name: value - self._counters[name] for name, value in after.items()}

    def counters(self) -> dict[str, int]:
        """The vCPUs' counters over the window."""
        return self._counters or dict.fromkeys(read_counters(self._vm.vcpus), 0)


def measure(experiment: Experiment) -> Measurement:
    """Run one experiment in a fresh virtual world."""
    e, w = experiment, experiment.workload
    image = guests.path("locks").read_bytes()
    tracer = Tracer()
    digest = HashSink()
    tracer.add(digest)
    if e.trace is not None:
        from aiovm.sinks import open_sinks

        open_sinks(tracer, e.trace)
    cmdline = (
        f"lock={e.lock} cpus={e.vcpus} hold={w.hold_ns} think={w.think_ns} hold_dist={w.hold_dist} "
        f"think_dist={w.think_dist} nlocks={w.nlocks} spin={w.spin} duration={w.duration_ns} "
        f"warmup={e.warmup_ns} seed={e.seed & 0xFFFF_FFFF}"
    )

    said = bytearray()
    costs = Costs(quantum_ns=e.quantum_ns)

    async def main() -> Measurement:
        host = Host(e.pcpus, policy=by_name(e.policy, slice_ns=e.slice_ns), costs=costs, seed=e.seed, trace=tracer)
        async with Vm(host, vcpus=e.vcpus, ple=e.ple, native=e.native, console=said.extend) as vm:
            loaded = vm.load(image, name="locks.elf", cmdline=cmdline)
            layout = LockLayout(loaded.symbols)
            meter = _Meter(vm, layout)
            outcome = await vm.run()
            if outcome.status == _REFUSED:
                raise ConfigError(f"the lock guest refuses: {said.decode(errors='replace').strip()}")
            if outcome.status not in (_OK, _BROKEN):
                raise InternalError(f"the lock guest ended with status {outcome.status}")
            return _read(e, vm, layout, meter, outcome.status, tracer, digest)

    try:
        return run(main(), clock=VirtualClock())
    finally:
        tracer.close()


def _read(
    e: Experiment, vm: Vm, layout: LockLayout, meter: _Meter, status: int, tracer: Tracer, digest: HashSink
) -> Measurement:
    found = layout.read(vm.memory.read)

    def ns(tsc: int) -> int:
        return tsc * 1_000_000 // vm.tsc_khz

    tracer.flush()
    total = sum(meter.spent)
    return Measurement(
        experiment=e,
        status=status,
        ops=found.operations,
        wait_p50_ns=ns(found.waits.p50),
        wait_p99_ns=ns(found.waits.p99),
        wait_max_ns=ns(found.waits.longest),
        fairness=round(jain([c.ops_measured for c in found.cpus]), 6),
        spin_share=round(meter.spent[Phase.WAITING] / total, 6) if total else 0.0,
        lhp=meter.preempted[Phase.HOLDING],
        lwp=meter.preempted[Phase.WAITING],
        trace_hash=digest.hexdigest(),
        **meter.counters(),
    )


def report(measurements: Iterable[Measurement], baselines: dict[str, Measurement]) -> LockReport:
    """Rows for what was measured. ``baselines``: each lock with a physical CPU for each vCPU."""
    digest = HashSink()
    rows = []
    for m in measurements:
        base = baselines[m.experiment.lock]
        digest.write(bytes.fromhex(m.trace_hash))
        digest.write(bytes.fromhex(base.trace_hash))
        per_cpu = m.throughput / m.experiment.pcpus
        reference = base.throughput / base.experiment.pcpus
        rows.append(
            LockRow(
                lock=m.experiment.lock,
                vcpus=m.experiment.vcpus,
                pcpus=m.experiment.pcpus,
                throughput_ops_per_s=round(m.throughput, 3),
                efficiency=round(per_cpu / reference, 6) if reference else 0.0,
                spin_share=m.spin_share,
                wait_p50_ns=m.wait_p50_ns,
                wait_p99_ns=m.wait_p99_ns,
                wait_max_ns=m.wait_max_ns,
                fairness=m.fairness,
                lhp=m.lhp,
                lwp=m.lwp,
                ple_exits=m.ple_exits,
                yields_tried=m.yields_tried,
                yields_won=m.yields_won,
                kicks=m.kicks,
                halts=m.halts,
            )
        )
    return LockReport(rows=rows, trace_hash=digest.hexdigest())
