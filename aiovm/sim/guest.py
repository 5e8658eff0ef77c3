"""What a model guest's kernel does: remote function calls with acknowledgement, idling until work comes.

*Remote calls* follow ``kernel/smp.c``: a caller puts its request on each target's queue, sends an IPI where the queue
was empty, and spins until all have answered. With a paravirtual TLB flush (``kvm_flush_tlb_multi``) a target that the
host has preempted is not asked: it flushes when it next runs.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aiovm.engine.model import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiovm.engine.model import ModelContext, Program
    from aiovm.sim.machine import SimMachine

__all__ = ["CALL_VECTOR", "RESCHEDULE_VECTOR", "TIMER_VECTOR", "GuestKernel", "Mutex"]

#: Linux's vectors (``arch/x86/include/asm/irq_vectors.h``).
RESCHEDULE_VECTOR, CALL_VECTOR, TIMER_VECTOR = 0xFD, 0xFB, 0xEC
#: Targets that one interrupt command reaches: a cluster of logical x2APIC ids (SDM vol. 3A, 11.12.10).
_CLUSTER = 16


class Mutex:
    """A lock whose waiters sleep, first in first out: their CPU has nothing else to do, so it halts.

    Who releases it hands it to the first waiter and wakes that CPU with a reschedule interrupt.
    """

    def __init__(self) -> None:
        self._owner = -1
        self._waiting: deque[int] = deque()

    def lock(self, cpu: ModelContext) -> Program:
        """Take it; interrupts must be on."""
        if self._owner < 0:
            self._owner = cpu.index
            return
        self._waiting.append(cpu.index)
        while self._owner != cpu.index:
            yield cpu.wait_for_interrupt()

    def unlock(self, cpu: ModelContext) -> Program:
        """Give it back."""
        self._owner = self._waiting.popleft() if self._waiting else -1
        if self._owner >= 0:
            yield cpu.send_ipis((self._owner,), RESCHEDULE_VECTOR)


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
        machine.handlers[TIMER_VECTOR] = self._wake
        machine.handlers[RESCHEDULE_VECTOR] = self._wake

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

    def _wake(self, cpu: ModelContext) -> Program:
        """An interrupt that only ends a sleep."""
        yield from ()
