"""What a model guest's kernel does: remote function calls with acknowledgement, idling until work comes.

*Remote calls* follow ``kernel/smp.c``: a caller puts its request on each target's queue, sends an IPI where the queue
was empty, and spins until all have answered. With a paravirtual TLB flush (``kvm_flush_tlb_multi``) a target that the
host has preempted is not asked: it flushes when it next runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.engine.model import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiovm.engine.model import ModelContext, Program
    from aiovm.sim.machine import SimMachine

__all__ = ["CALL_VECTOR", "TIMER_VECTOR", "GuestKernel"]

CALL_VECTOR, TIMER_VECTOR = 0xFB, 0xEC
#: Targets that one interrupt command reaches: a cluster of logical x2APIC ids (SDM vol. 3A, 11.12.10).
_CLUSTER = 16


class GuestKernel:
    """One machine's kernel. ``call_ns``: what the called function takes on each target (ns)."""

    def __init__(
        self, machine: SimMachine, *, call_ns: int = 500, pv_flush: bool = False, pv_yield: bool = False
    ) -> None:
        self.machine = machine
        self.call_ns = call_ns
        self.pv_flush = pv_flush
        #: KVM_HC_SCHED_YIELD to the first preempted target after sending (``kvm_smp_send_call_func_ipi``).
        self.pv_yield = pv_yield
        self._calls: list[list[Cell]] = [[] for _ in machine.vcpus]
        machine.handlers[CALL_VECTOR] = self._answer
        machine.handlers[TIMER_VECTOR] = self._tick

    def is_preempted(self, index: int) -> bool:
        """``vcpu_is_preempted``: what the steal-time record would say."""
        return self.machine.vcpus[index].preempted

    def call_others(self, cpu: ModelContext, targets: Iterable[int]) -> Program:
        """Have every other target run the function, and wait for their answers."""
        asked = [i for i in targets if i != cpu.index and not (self.pv_flush and self.is_preempted(i))]
        if not asked:
            return
        waiting = Cell(len(asked))
        ring = [i for i in asked if not self._calls[i]]
        for index in asked:
            self._calls[index].append(waiting)
        for first in range(0, len(ring), _CLUSTER):
            yield cpu.send_ipis(ring[first : first + _CLUSTER], CALL_VECTOR)
        if self.pv_yield:
            preempted = next((i for i in asked if self.is_preempted(i)), None)
            if preempted is not None:
                yield cpu.sched_yield(preempted)
        while waiting.value:
            yield cpu.spin(waiting, 0)

    def sleep(self, cpu: ModelContext, ns: int) -> Program:
        """Idle until ``ns`` have passed: the deadline timer and HLT."""
        deadline = cpu.now() + ns
        while cpu.now() < deadline:
            yield cpu.arm_timer(deadline, TIMER_VECTOR)
            yield cpu.wait_for_interrupt()

    def _answer(self, cpu: ModelContext) -> Program:
        calls = self._calls[cpu.index]
        while calls:
            yield self.call_ns
            waiting = calls.pop(0)
            waiting.store(waiting.value - 1)

    def _tick(self, cpu: ModelContext) -> Program:
        """The timer interrupt only wakes."""
        yield from ()
