"""A machine's interrupts: between its CPUs, from its chips, and what its guest asks for by hypercalls.

What goes from one CPU to another is on its way for ``Costs.ipi_ns``; what an instruction brings to its own CPU is there
behind that instruction. Source: ``arch/x86/kvm/irq_comm.c``, ``lapic.c`` and ``x86.c`` of Linux 6.16.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiovm.kvmclock import clock_pairing
from aiovm.lapic_message import DeliveryMode, IpiMessage, Shorthand
from aiovm.paravirt import HypercallNumber, decode_send_ipi
from aiovm.trace import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.clock import Clock
    from aiovm.costs import Costs
    from aiovm.lapic import Lapic
    from aiovm.lapic_map import ApicMap
    from aiovm.memory import GuestMemory
    from aiovm.pc import Pc
    from aiovm.trace import Tracer
    from aiovm.vcpu import Vcpu

__all__ = ["VmInterrupts"]


class VmInterrupts:
    """What :class:`aiovm.vm.Vm` inherits."""

    apic_map: ApicMap
    clock: Clock
    costs: Costs
    lapics: Sequence[Lapic]
    memory: GuestMemory
    pc: Pc
    runs_ahead: bool
    trace: Tracer
    vcpus: Sequence[Vcpu]

    if TYPE_CHECKING:

        def post(self, deadline: int, callback: Callable[[], object]) -> None: ...
        def read_tsc(self) -> int: ...
        def wall_ns(self) -> int: ...

    def deliver_ipi(self, source: Vcpu, message: IpiMessage) -> None:
        self._send(source, message)

    def _send(self, source: Vcpu, message: IpiMessage) -> int:
        """How many local APICs it goes to."""
        if self.trace.on:
            self.trace.emit(
                self.clock.now(), Kind.IPI, source.thread.number, message.mode << 8 | message.vector, message.dest
            )
        targets = self.apic_map.targets(message, source.index)
        for index in targets:
            target = self.vcpus[index]
            if target is source:
                self._accept_at_once(source, target, message)
            else:
                self.post(self.clock.now() + self.costs.ipi_ns, partial(self._accept, source, target, message))
        return len(targets)

    def _accept(self, source: Vcpu | None, target: Vcpu, message: IpiMessage) -> None:
        target.accept_apic(
            message.mode,
            message.vector,
            level=message.level,
            trigger_level=message.trigger_level,
            source=-1 if source is None else source.thread.number,
        )

    def _accept_at_once(self, source: Vcpu | None, target: Vcpu, message: IpiMessage) -> None:
        """Inside the target's own slice, which takes it behind the instruction."""
        self._accept(source, target, message)
        target.port.update_irq_window()
        if message.mode is DeliveryMode.NMI:
            target.process_nmi()  # now: by the window's time it may be unmasked, and more would be remembered
            target.context.request_nmi_window(wanted=True)

    def apic_map_changed(self) -> None:
        self.apic_map.recalculate()

    def deliver_message(self, message: IpiMessage) -> int:
        """A message of the I/O APIC's or an MSI: how many local APICs take it, -1 when none is addressed."""
        targets = self.apic_map.targets(message, None)
        now = self.clock.now()
        for index in targets:
            target = self.vcpus[index]
            # On the wall clock the slice runs in another thread, and what comes in waits for its end.
            if target.answering and self.runs_ahead:
                self._accept_at_once(None, target, message)
            else:
                self.post(now, partial(self._accept, None, target, message))
        return len(targets) or -1

    def broadcast_eoi(self, vector: int, *, level: bool) -> None:
        self.pc.broadcast_eoi(vector, level=level)

    def pic_pending(self, vcpu: Vcpu) -> bool:
        return self.pc.pending(vcpu)

    def pic_vector(self, vcpu: Vcpu) -> int:
        return self.pc.pic.acknowledge()

    # ---- paravirtual ---------------------------------------------------------------------------------------------

    def _by_apic_id(self, apic_id: int) -> Vcpu | None:
        return next((v for v in self.vcpus if v.apic.hw_enabled and v.apic.apic_id == apic_id), None)

    def pv_kick(self, source: Vcpu, apic_id: int) -> None:
        target = self._by_apic_id(apic_id)
        if target is not None:
            target.pv_unhalt(source.thread.number)
            source.sched_yield_to(target.index)

    def pv_sched_yield(self, source: Vcpu, apic_id: int) -> None:
        target = self._by_apic_id(apic_id)
        if target is not None:
            source.sched_yield_to(target.index)

    def hypercall(self, vcpu: Vcpu, number: int, args: tuple[int, int, int, int]) -> int:
        if number == HypercallNumber.CLOCK_PAIRING:
            return clock_pairing(self.memory, args[0], args[1], self.wall_ns(), vcpu.tsc.read(self.read_tsc()))
        wanted = decode_send_ipi(args, long_mode=vcpu.context.state.long_mode)
        if isinstance(wanted, int):
            return wanted
        mode = DeliveryMode(wanted.delivery_mode)
        level, trigger = bool(wanted.icr & 0x4000), bool(wanted.icr & 0x8000)
        present = {lapic.apic_id for lapic in self.lapics if lapic.hw_enabled}  # none of these ids is a broadcast
        return sum(
            self._send(vcpu, IpiMessage(wanted.vector, mode, False, level, trigger, Shorthand.NONE, apic_id))
            for apic_id in wanted.apic_ids
            if apic_id in present
        )
