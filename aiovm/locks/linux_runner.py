"""Run Linux under a load that contends for its spinlocks, and count what the host sees of them.

One measurement is one machine: an unmodified kernel whose only process is ``guests/linux/contend.c``. That calls the
kernel from a thread on each vCPU and says through an I/O port when a load's window begins and ends, so the counters
are read at that moment and the guest's console has no part in it.

Three kinds of spinlock come out of one kernel, chosen as an administrator would (``kvm_spinlock_init`` in
``arch/x86/kernel/kvm.c`` of Linux 6.1); its log must say the words, or the comparison would compare nothing:

=============  ======================================  ===============================================================
pvqspinlock    by itself                               a queue whose waiters halt after 32768 PAUSEs; unlock kicks
qspinlock      ``nopvspin`` on the command line        a queue whose waiters spin
tas            a host that does not offer PV_UNHALT    no queue: whoever is running and quick takes it
=============  ======================================  ===============================================================
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm import guests
from aiovm.devices.window import Window
from aiovm.errors import ConfigError, InternalError, TimeoutExpired
from aiovm.loaders import Module, read_image
from aiovm.loaders.cpio import Archive
from aiovm.locks.counters import read_counters
from aiovm.locks.linux_result import LinuxLockReport, LinuxLockRow
from aiovm.loop import Host, run, run_wall
from aiovm.paravirt import DEFAULT_FEATURES, KvmFeature
from aiovm.policy import by_name
from aiovm.policy.thread import ThreadState
from aiovm.sinks import open_sinks
from aiovm.trace import HashSink, Tracer
from aiovm.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["LINUX_LOCKS", "LOADS", "LinuxExperiment", "LinuxMeasurement", "LoadWindow", "linux_measure", "linux_report"]

#: What the kernel's log says of each.
LINUX_LOCKS: Final = {
    "pvqspinlock": "PV spinlocks enabled",
    "qspinlock": 'PV spinlocks disabled, forced by "nopvspin" parameter',
    "tas": "PV spinlocks disabled, no host support",
}
#: In the order of the guest's numbers.
LOADS: Final = ("directory", "futex", "files", "pipe", "memory")
_PORT, _PORT_LENGTH = 0x580, 12
_MS = 1_000_000
_PATIENCE_S = 600


@dataclass(frozen=True, slots=True)
class LinuxExperiment:
    """One boot and what is measured in it. ``entries``: of the directory, which says how long its lock is held."""

    kernel: Path
    lock: str
    vcpus: int
    pcpus: int
    ple: bool
    loads: tuple[str, ...] = ("directory",)
    entries: int = 200
    warmup_ns: int = 60 * _MS
    duration_ns: int = 200 * _MS
    wall: bool = False
    memory: int = 128 << 20
    policy: str = "fair"
    slice_ns: int = 6 * _MS
    seed: int = 0
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.lock not in LINUX_LOCKS:
            raise ConfigError(f"Linux has no lock called {self.lock!r}; there are {', '.join(LINUX_LOCKS)}")
        for load in self.loads:
            if load not in LOADS:
                raise ConfigError(f"no load is called {load!r}; there are {', '.join(LOADS)}")
        if not 2 <= self.vcpus <= 255:
            raise ConfigError(f"{self.vcpus} vCPUs: with fewer than 2 nobody contends, and a machine has 255 at most")
        if not 1 <= self.pcpus <= self.vcpus:
            raise ConfigError(f"{self.pcpus} physical CPUs for {self.vcpus} vCPUs: 1 to as many as vCPUs")
        if not 3 <= self.entries <= 9999:
            raise ConfigError(f"bad number of directory entries {self.entries}: 3 to 9999")
        for ns in (self.warmup_ns, self.duration_ns):
            if ns % _MS or not _MS <= ns <= 1000 * 1000 * _MS:
                raise ConfigError(f"bad duration {ns} ns: whole milliseconds, 1ms to 1000s")

    @property
    def cmdline(self) -> str:
        """The kernel's, with the words that it hands on to the load."""
        return (
            f"console=ttyS0 panic=-1{' nopvspin' if self.lock == 'qspinlock' else ''} contend={','.join(self.loads)} "
            f"workers={self.vcpus} entries={self.entries} warmup={self.warmup_ns // _MS} "
            f"duration={self.duration_ns // _MS}"
        )


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """One load's window: what the vCPUs did in it, together."""

    load: str
    elapsed_ns: int
    calls: int
    steal_ns: int
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class LinuxMeasurement:
    """A window for each load, and the hash of the trace from the first of them on."""

    experiment: LinuxExperiment
    windows: tuple[LoadWindow, ...]
    trace_hash: str


class _Meter:
    """The I/O port of ``contend.c``: +0 a window begins (the load's number), +4 it ends (calls), +8 all is done."""

    def __init__(self, vm: Vm, on_begin: Callable[[], None]) -> None:
        self._vm = vm
        self._on_begin = on_begin
        self._open: tuple[str, dict[str, int]] | None = None
        self.windows: list[LoadWindow] = []
        vm.ports.register(_PORT, _PORT_LENGTH, Window(_PORT_LENGTH, lambda *_: 0, self._write))

    def _write(self, offset: int, _size: int, value: int, now: int) -> None:
        if offset == 0 and value < len(LOADS):
            self._on_begin()
            self._open = LOADS[value], self._read(now)
        elif offset == 4 and self._open is not None:
            load, before = self._open
            self._open = None
            found = {name: after - before[name] for name, after in self._read(now).items()}
            self.windows.append(LoadWindow(load, found.pop("now"), value, found.pop("steal"), found))
        elif offset == 8:
            self._vm.end("done", 0)

    def _read(self, now: int) -> dict[str, int]:
        threads = [v.thread for v in self._vm.vcpus]
        waiting = sum(max(now - t.ready_since, 0) for t in threads if t.state is ThreadState.READY)
        steal = waiting + sum(t.run_delay for t in threads)
        return {"now": now, "steal": steal, **read_counters(self._vm.vcpus)}


def linux_measure(experiment: LinuxExperiment) -> LinuxMeasurement:
    """Boot one kernel and measure its loads."""
    e = experiment
    image = read_image(e.kernel, "the kernel ")
    tracer, digest = Tracer(), HashSink()

    def begin() -> None:
        if not tracer.on:  # the boot is not what anybody wants to look at
            tracer.add(digest)
            if e.trace is not None:
                open_sinks(tracer, e.trace)

    async def main() -> tuple[LoadWindow, ...]:
        host = Host(e.pcpus, policy=by_name(e.policy, slice_ns=e.slice_ns), seed=e.seed, trace=tracer)
        features = DEFAULT_FEATURES & ~KvmFeature.PV_UNHALT if e.lock == "tas" else DEFAULT_FEATURES
        async with Vm(host, vcpus=e.vcpus, memory=e.memory, ple=e.ple, features=features) as vm:
            meter = _Meter(vm, begin)
            vm.load(image, name=e.kernel.name, cmdline=e.cmdline, modules=[_initrd()])
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await vm.run()
            except TimeoutError:
                raise TimeoutExpired(f"the load is not done after {_PATIENCE_S} s: {vm.describe()}") from None
            _check_log(e, vm.console.text)
            if len(meter.windows) != len(e.loads):
                raise InternalError(f"the guest measured {len(meter.windows)} of {len(e.loads)} loads")
            return tuple(meter.windows)

    try:
        windows = run_wall(main()) if e.wall else run(main())
        return LinuxMeasurement(e, windows, digest.hexdigest())
    finally:
        tracer.close()


def _initrd() -> Module:
    archive = Archive()
    archive.add("init", 0o100755, guests.linux_path("contend").read_bytes())
    return Module(archive.packed(), "contend")


def _check_log(experiment: LinuxExperiment, log: str) -> None:
    words = LINUX_LOCKS[experiment.lock]
    if words not in log:
        raise ConfigError(
            f"{experiment.kernel}: this kernel has no {experiment.lock}: its log lacks {words!r} "
            "(it needs CONFIG_PARAVIRT_SPINLOCKS)"
        )


def linux_report(measurements: Sequence[LinuxMeasurement]) -> LinuxLockReport:
    """Rows: the locks side by side, for each load and circumstance."""
    rates = {
        (*_circumstance(m, w), m.experiment.lock): w.calls * 1e9 / w.elapsed_ns for m in measurements for w in m.windows
    }
    order = list(dict.fromkeys(key[:-1] for key in rates))
    found = [(m, w) for m in measurements for w in m.windows]
    found.sort(key=lambda pair: order.index(_circumstance(*pair)))
    rows = []
    for m, w in found:
        e, circumstance = m.experiment, _circumstance(m, w)
        rate, native = rates[*circumstance, e.lock], rates.get((*circumstance, "qspinlock"))
        rows.append(
            LinuxLockRow(
                lock=e.lock,
                load=w.load,
                vcpus=e.vcpus,
                pcpus=e.pcpus,
                ple=e.ple,
                clock="wall" if e.wall else "virtual",
                elapsed_ns=w.elapsed_ns,
                calls=w.calls,
                calls_per_s=round(rate, 3),
                relative=round(rate / native, 6) if native else None,
                steal_share=round(w.steal_ns / (w.elapsed_ns * e.vcpus), 6),
                **w.counters,
            )
        )
    digest = HashSink()
    for m in measurements:
        digest.write(bytes.fromhex(m.trace_hash))
    wall = any(m.experiment.wall for m in measurements)
    return LinuxLockReport(rows=rows, trace_hash=None if wall else digest.hexdigest())


def _circumstance(measurement: LinuxMeasurement, window: LoadWindow) -> tuple[str, int, bool]:
    return window.load, measurement.experiment.pcpus, measurement.experiment.ple
