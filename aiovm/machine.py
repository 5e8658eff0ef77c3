"""What a vCPU may ask of its machine: the face of :class:`aiovm.vm.Vm` that lies below it.

The machine is the wiring: memory, buses, chips, the other vCPUs. A vCPU knows this protocol and nothing more of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.bus import Bus
    from aiovm.clock import Clock, Timer
    from aiovm.costs import Costs
    from aiovm.cpuid import CpuidTable
    from aiovm.engine.base import Context, Engine
    from aiovm.exits import Exit
    from aiovm.halt_poll import HaltPollParams
    from aiovm.kvmclock import KvmClock
    from aiovm.lapic_message import IpiMessage
    from aiovm.loop import Host
    from aiovm.memory import GuestMemory
    from aiovm.spin import SpinOptions
    from aiovm.trace import Tracer
    from aiovm.vcpu import Vcpu

__all__ = ["Machine"]


class Machine(Protocol):
    """One virtual machine, as its vCPUs see it. Times are ns."""

    number: int
    host: Host
    costs: Costs
    trace: Tracer
    memory: GuestMemory
    ports: Bus
    mmio: Bus
    cpuid: CpuidTable
    kvmclock: KvmClock
    #: (now, limit) of the running slice, charged ns: in virtual time the clock's own.
    cells: memoryview
    #: Guest TSC cycles a millisecond.
    tsc_khz: int
    #: Pause-loop exiting is on.
    ple: bool
    spin_options: SpinOptions
    #: Index of the vCPU that a directed yield boosted last (``kvm->last_boosted_vcpu``).
    last_boosted_vcpu: int
    #: KVM_CAP_HALT_POLL: the longest poll, ns; 0 turns polling off.
    halt_poll_ns: int
    halt_poll_params: HaltPollParams
    #: A slice is executed at once and the vCPU then waits until the clock has caught up (:meth:`Context.run`); else
    #: the slice itself is waited for (:meth:`run_slice`) and a kick ends it (:meth:`kick_slice`).
    runs_ahead: bool
    #: On the wall clock: a slice's length, in ns of charged guest code.
    wall_slice_ns: int
    #: On the wall clock: how long the slice that ended last had waited for its turn, ns.
    slice_waited: int

    @property
    def clock(self) -> Clock: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def vcpus(self) -> Sequence[Vcpu]: ...

    @property
    def slice_runs(self) -> bool:
        """Whether guest code may run now, in another thread."""

    def read_tsc(self) -> int:
        """The TSC that all vCPUs share, now; never behind what any of them has seen."""

    def wall_ns(self) -> int:
        """The wall time now, ns since 1970."""

    def tsc_to_ns(self, tsc: int) -> int:
        """When the shared TSC reaches ``tsc``, ns of the machine's clock."""

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` at ``deadline`` while no slice of this machine runs."""

    def post(self, deadline: int, callback: Callable[[], object]) -> None:
        """As :meth:`call_at` for what is on its way between CPUs and chips, and cannot be taken back."""

    def deliver_ipi(self, source: Vcpu, message: IpiMessage) -> None:
        """Carry an interrupt command to its targets, after the time that takes."""

    def apic_map_changed(self) -> None:
        """An APIC's id, destination registers or enable bits changed."""

    def broadcast_eoi(self, vector: int, *, level: bool) -> None:
        """An interrupt was retired: the I/O APIC wants to know."""

    def pic_pending(self, vcpu: Vcpu) -> bool:
        """Whether the 8259 pair asks this vCPU for an interrupt."""

    def pic_vector(self, vcpu: Vcpu) -> int:
        """Acknowledge the 8259 pair."""

    def unclaimed_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        """Nobody on the bus answers a port read."""

    def unclaimed_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        """Nobody on the bus answers a port write."""

    def pv_kick(self, source: Vcpu, apic_id: int) -> None:
        """KVM_HC_KICK_CPU, at the loop's time."""

    def pv_sched_yield(self, source: Vcpu, apic_id: int) -> None:
        """KVM_HC_SCHED_YIELD, at the loop's time."""

    def hypercall(self, vcpu: Vcpu, number: int, args: tuple[int, int, int, int]) -> int:
        """The hypercalls that concern the whole machine; -1000 for one that does not exist."""

    async def run_slice(self, context: Context, budget: int) -> Exit:
        """One slice that is waited for, ``budget`` charged ns long at most; on the wall clock in a worker thread.

        The slice does not begin when :meth:`kick_slice` came while it waited for its turn.
        """

    def kick_slice(self, context: Context) -> None:
        """End the slice that :meth:`run_slice` runs for ``context`` soon."""

    async def between_slices(self) -> None:
        """Wait until no slice of this machine runs: a vCPU that has slept touches nothing before."""
