"""A machine of model guests: the same host, vCPU coroutine, local APIC and paravirtual calls, and no memory.

    machine = SimMachine(host, vcpus=8)
    machine.start(0, program)          # program(cpu) is a generator function, see aiovm.engine.model
    await machine.run()

Everything that a real machine's vCPU asks of its machine (:class:`aiovm.machine.Machine`) is answered here for guests
that have neither memory nor devices. Historic KVMs are replayed by options: ``kick_yields`` (KVM_HC_KICK_CPU also
yields to its target, 2019), ``spin_options`` and ``ple`` (pause-loop exits since 2009, directed yield 2011, its
eligibility filter 2012).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from aiovm.bus import Bus
from aiovm.clock import VirtualClock
from aiovm.cpuid import CpuidTable
from aiovm.engine.model import ModelContext, ModelEngine
from aiovm.errors import ConfigError
from aiovm.halt_poll import LINUX_6_16
from aiovm.kvmclock import KvmClock
from aiovm.lapic import Lapic
from aiovm.lapic_message import DeliveryMode
from aiovm.memory import GuestMemory
from aiovm.paravirt import DEFAULT_FEATURES
from aiovm.sim.port import SimPort
from aiovm.spin import PleParams, PleWindow, SpinOptions
from aiovm.trace import Kind
from aiovm.vcpu import MpState, Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.clock import Clock, Timer
    from aiovm.engine.base import Context, Engine
    from aiovm.engine.model import Program
    from aiovm.exits import Exit
    from aiovm.halt_poll import HaltPollParams
    from aiovm.lapic_message import IpiMessage
    from aiovm.loop import Host

__all__ = ["SimMachine"]

_MAX_VCPUS = 1024
_SPIV, _SOFTWARE_ENABLED = 0x0F0, 0x1FF


class SimMachine:
    """``vcpus`` model CPUs on ``host``, whose clock must be virtual."""

    runs_ahead = False
    wall_slice_ns = 0
    slice_waited = 0
    slice_runs = False

    def __init__(
        self,
        host: Host,
        *,
        vcpus: int,
        ple: bool = True,
        spin_options: SpinOptions | None = None,
        kick_yields: bool = True,
        halt_poll_ns: int = 200_000,
        halt_poll_params: HaltPollParams = LINUX_6_16,
        ple_params: PleParams | None = None,
    ) -> None:
        if not 1 <= vcpus <= _MAX_VCPUS:
            raise ConfigError(f"a model machine has 1 to {_MAX_VCPUS} vCPUs, not {vcpus}")
        if not isinstance(host.clock, VirtualClock):
            raise ConfigError("model guests run in virtual time only")
        self.host = host
        self.number = host.register_machine(self)
        self.clock: Clock = host.clock
        self.costs = host.costs
        self.cells = host.clock.cells
        self.trace = host.trace
        self.tsc_khz = host.costs.tsc_khz
        self.ple = ple
        self.spin_options = SpinOptions() if spin_options is None else spin_options
        self.kick_yields = kick_yields
        self.ple_params = PleParams() if ple_params is None else ple_params
        self.halt_poll_ns = halt_poll_ns
        self.halt_poll_params = halt_poll_params
        self.last_boosted_vcpu = 0
        self.memory = GuestMemory()
        self.ports = Bus("port", 16)
        self.mmio = Bus("MMIO", 52)
        self.cpuid = CpuidTable(vcpus=1, tsc_khz=self.tsc_khz, features=DEFAULT_FEATURES)
        self.kvmclock = KvmClock(host_khz=self.tsc_khz, now=self.clock.now())
        engine = ModelEngine(host.clock, host.costs)
        self.engine: Engine = engine
        self.contexts = engine.contexts
        #: What a CPU does on an interrupt, by vector.
        self.handlers: dict[int, Callable[[ModelContext], Program]] = {}
        self.vcpus: Sequence[Vcpu] = tuple(self._make_vcpu(i) for i in range(vcpus))
        #: Preemptions of vCPUs that held a lock, and that waited for one.
        self.holder_preemptions = 0
        self.waiter_preemptions = 0

    def _make_vcpu(self, index: int) -> Vcpu:
        apic = Lapic(index, bsp=index == 0)
        apic.mmio_write(_SPIV, 4, _SOFTWARE_ENABLED, 0)
        vcpu = Vcpu(self, index, vcpu_id=index, apic=apic, port=lambda vcpu: SimPort(vcpu, self))
        vcpu.ple = PleWindow(self.ple_params)
        vcpu.set_mp_state(MpState.RUNNABLE)
        vcpu.on_sched_out = self._count_preemption
        vcpu.lock_probe = self._holds_lock
        return vcpu

    def start(self, index: int, program: Callable[[ModelContext], Program]) -> None:
        """Give a CPU its program, and random numbers of its own."""
        context = self.contexts[index]
        context.start(program(context), random.Random(f"{self.host.seed}/{self.number}/{index}"))

    def launch(self) -> list[asyncio.Task[Exit]]:
        """A task for every CPU; each is done when its program is."""
        return [asyncio.create_task(v.run(), name=f"vcpu-{self.number}.{v.index}") for v in self.vcpus]

    async def run(self) -> None:
        """Run every CPU to the end of its program."""
        tasks = self.launch()
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _count_preemption(self, vcpu: Vcpu, preempted: bool) -> None:
        if preempted:
            state = self.contexts[vcpu.index].lock_state
            if state == 2:
                self.holder_preemptions += 1
            elif state == 1:
                self.waiter_preemptions += 1

    def _holds_lock(self, vcpu: Vcpu) -> bool:
        return self.contexts[vcpu.index].lock_state == 2

    # ---- slices --------------------------------------------------------------------------------------------------

    async def run_slice(self, context: Context, budget: int) -> Exit:
        assert isinstance(context, ModelContext)
        exit_ = context.enter()
        if exit_ is None:
            try:
                await context.alarm
            except asyncio.CancelledError:
                context.cut()
                raise
            exit_ = context.left()
        return exit_

    def kick_slice(self, context: Context) -> None:
        assert isinstance(context, ModelContext)
        context.interrupt_slice()

    async def between_slices(self) -> None:
        """Model guests share nothing that a slice could be in the middle of."""

    # ---- time ----------------------------------------------------------------------------------------------------

    def read_tsc(self) -> int:
        return self.clock.now() * self.tsc_khz // 1_000_000

    def wall_ns(self) -> int:
        return self.clock.epoch_ns + self.clock.now()

    def tsc_to_ns(self, tsc: int) -> int:
        return -(-tsc * 1_000_000 // self.tsc_khz)

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        return self.clock.call_at(deadline, callback)

    def post(self, deadline: int, callback: Callable[[], object]) -> None:
        self.clock.call_at(deadline, callback)

    # ---- interrupts and hypercalls -----------------------------------------------------------------------------------

    def send_ipi(self, source: Vcpu, index: int, vector: int) -> None:
        """A fixed interrupt for one CPU, after the time that takes."""
        if self.trace.on:
            self.trace.emit(self.clock.now(), Kind.IPI, source.thread.number, vector, index)
        target = self.vcpus[index]
        self.clock.call_at(
            self.clock.now() + self.costs.ipi_ns,
            lambda: target.accept_apic(
                DeliveryMode.FIXED, vector, level=True, trigger_level=False, source=source.thread.number
            ),
        )

    def pv_kick(self, source: Vcpu, apic_id: int) -> None:
        target = self.vcpus[apic_id]
        target.pv_unhalt(source.thread.number)
        if self.kick_yields:
            source.sched_yield_to(apic_id)

    def pv_sched_yield(self, source: Vcpu, apic_id: int) -> None:
        source.sched_yield_to(apic_id)

    def deliver_ipi(self, source: Vcpu, message: IpiMessage) -> None:
        """Model guests send by :meth:`send_ipi`."""
        self.send_ipi(source, message.dest, message.vector)

    def apic_map_changed(self) -> None:
        """Destinations are indices."""

    def broadcast_eoi(self, vector: int, *, level: bool) -> None:
        """No I/O APIC."""

    def pic_pending(self, vcpu: Vcpu) -> bool:
        return False

    def pic_vector(self, vcpu: Vcpu) -> int:
        return -1

    def unclaimed_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def unclaimed_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        """A model guest has no ports: what it writes is gone."""

    def hypercall(self, vcpu: Vcpu, number: int, args: tuple[int, int, int, int]) -> int:
        return -1000
