"""What a vCPU answers a model guest: hypercalls, IPIs, timers and interrupts as calls, on the real local APIC.

The machine-code guest's answers (:mod:`aiovm.port`) stay in force for everything else. A model guest has no interrupt
table: a vector is bound to a generator function (:attr:`SimMachine.handlers`), and its end is the EOI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.port import VcpuPort
from aiovm.requests import VcpuMode

if TYPE_CHECKING:
    from aiovm.engine.model import ModelContext, Program
    from aiovm.sim.machine import SimMachine
    from aiovm.vcpu import Vcpu

__all__ = ["SimPort"]

_IF = 0x200
_TSC_DEADLINE = 0x4_0000
_LVT_TIMER = 0x320


class SimPort(VcpuPort):
    """One vCPU's side of a model CPU."""

    def __init__(self, vcpu: Vcpu, machine: SimMachine) -> None:
        super().__init__(vcpu)
        self.machine = machine
        self._timer_vector = 0

    @property
    def _context(self) -> ModelContext:
        return self.machine.contexts[self.vcpu.index]

    # ---- ModelPort ---------------------------------------------------------------------------------------------

    def on_kick(self, index: int) -> None:
        self.vcpu.stat.hypercalls += 1
        self.machine.pv_kick(self.vcpu, index)

    def on_sched_yield(self, index: int) -> None:
        self.vcpu.stat.hypercalls += 1
        self.machine.pv_sched_yield(self.vcpu, index)

    def on_ipi(self, index: int, vector: int) -> None:
        self.machine.send_ipi(self.vcpu, index, vector)

    def on_timer(self, deadline: int, vector: int) -> None:
        apic = self.vcpu.apic
        now = self.machine.clock.now()
        if vector != self._timer_vector:
            self._timer_vector = vector
            apic.mmio_write(_LVT_TIMER, 4, _TSC_DEADLINE | vector, now)
        apic.write_deadline(max(1, deadline), deadline, now)
        self.vcpu.arm_timer()

    def on_iret(self) -> None:
        self.vcpu.apic.eoi()
        self.on_irq_window()

    def must_leave(self) -> bool:
        return self.vcpu.thread.resched or self.vcpu.mode is VcpuMode.EXITING

    # ---- interrupts --------------------------------------------------------------------------------------------

    def inject_pending(self) -> None:
        self.on_irq_window()

    def on_irq_window(self) -> None:
        apic, context = self.vcpu.apic, self._context
        if apic.pending_vector() >= 0 and context.state.rflags & _IF:
            self.vcpu.stat.irq_injections += 1
            context.interrupt(self._handle(apic.acknowledge()))
        context.request_irq_window(apic.pending_vector() >= 0)

    def update_irq_window(self) -> None:
        self._context.request_irq_window(self.vcpu.apic.pending_vector() >= 0)

    def _handle(self, vector: int) -> Program:
        context = self._context
        yield self.machine.costs.inject_ns
        handler = self.machine.handlers.get(vector)
        if handler is not None:
            yield from handler(context)
