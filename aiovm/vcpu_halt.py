"""A vCPU that is not running: halted, polling, asleep; and what wakes it (``kvm_vcpu_halt`` and what it calls).

Rules:

* The wait queue is an ``asyncio.Event``: clear, test, wait, with no await between clear and test. Together with the
  sticky kick token no wake-up can be missed.
* A wake condition is looked at by whoever falls asleep and after each waking, never remembered.
* On the wall clock who has slept waits until no slice of the machine runs (``vm.between_slices``).

Source: ``virt/kvm/kvm_main.c`` and ``arch/x86/kvm/x86.c`` of Linux 6.16. The window of halt polling:
:mod:`aiovm.halt_poll`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Seg, Segment
from aiovm.halt_poll import adapt, begin
from aiovm.kvm_structs import MpState
from aiovm.requests import Request, Requests
from aiovm.trace import Kind

if TYPE_CHECKING:
    import asyncio

    from aiovm.clock import Alarm
    from aiovm.engine.base import Context
    from aiovm.events import EventQueue
    from aiovm.exits import Hlt
    from aiovm.lapic import Lapic
    from aiovm.machine import Machine
    from aiovm.paravirt import Paravirt
    from aiovm.policy.thread import Thread
    from aiovm.vcpu import VcpuStat

__all__ = ["VcpuHalt"]

_UNBLOCK: Final = 1 << Request.UNBLOCK


class VcpuHalt:
    """What :class:`aiovm.vcpu.Vcpu` inherits."""

    vm: Machine
    apic: Lapic
    blocking: bool
    context: Context
    events: EventQueue
    halt_poll_ns: int
    mp_state: MpState
    pv: Paravirt
    pv_unhalted: bool
    requests: Requests
    stat: VcpuStat
    thread: Thread
    wq: asyncio.Event
    _interrupted: bool
    _poll: Alarm
    _polling: bool
    _runs_ahead: bool

    if TYPE_CHECKING:

        def _has_events(self) -> bool: ...
        def _reset(self, *, init: bool) -> None: ...

    def _halt(self, exit_: Hlt) -> None:
        """``kvm_emulate_halt``: not at all when something is pending already."""
        self.stat.halt_exits += 1
        trace = self.vm.trace
        if trace.on:
            now = self.vm.clock.now()
            trace.emit(now, Kind.HALT, self.thread.number, self.context.state.rip, int(exit_.interrupts_enabled))
        if self._runnable():
            self.pv_unhalted = False
        else:
            self._set_mp_state(MpState.HALTED)

    def _set_mp_state(self, state: MpState) -> None:
        """The one place that writes ``mp_state``; becoming RUNNABLE consumes the kick token (6.16)."""
        self.mp_state = state
        if state is MpState.RUNNABLE:
            self.pv_unhalted = False
        trace = self.vm.trace
        if trace.on:
            trace.emit(self.vm.clock.now(), Kind.MP_STATE, self.thread.number, state, 0)

    def _running(self) -> bool:
        """``kvm_vcpu_running``: enter the guest, else block."""
        return self.mp_state is MpState.RUNNABLE and not self.pv.apf.halted

    def _runnable(self) -> bool:
        """``kvm_arch_vcpu_runnable`` for a vCPU that is not running: a wake condition holds.

        Who waits for a SIPI is woken by INIT and SIPI alone, as on a processor; KVM spins when anything else comes.
        """
        starts = self.apic.pending_events and not self.events.s.smm
        if self.mp_state is MpState.UNINITIALIZED or self.mp_state is MpState.INIT_RECEIVED:
            return starts
        return self.pv_unhalted or starts or self._has_events() or self.pv.apf.completions

    def _block_ends(self) -> bool:
        """``kvm_vcpu_check_block``: also a timer that fired, a request to unblock, an interruption."""
        return (
            self._runnable()
            or self.apic.has_pending_timer()
            or self._interrupted
            or bool(self.requests.bits & _UNBLOCK)
        )

    async def _block(self) -> None:
        """``kvm_vcpu_halt`` and ``kvm_vcpu_block``: poll while nobody else wants the CPU, then sleep."""
        vm, thread, stat = self.vm, self.thread, self.stat
        clock, host = vm.clock, vm.host
        began = clock.now()
        halted = self.mp_state is MpState.HALTED
        self.halt_poll_ns = begin(self.halt_poll_ns, vm.halt_poll_ns)
        may_poll = halted and self.pv.halt_poll_allowed
        if may_poll and self.halt_poll_ns and not self._block_ends():
            await self._poll_for_wakeup(began)
        while not self._block_ends() and not thread.resched:
            slept = clock.now()
            host.block(thread)
            self.blocking = True
            self.wq.clear()
            # Invariant: no await between clear and test; whoever kicks after the test sets the event.
            if self._block_ends():
                host.wake(thread)
            else:
                await self.wq.wait()
            self.blocking = False
            await thread.alarm
            stat.halt_wait_ns += clock.now() - slept
            if not self._runs_ahead:
                await vm.between_slices()
        if may_poll:
            self.halt_poll_ns = adapt(self.halt_poll_ns, clock.now() - began, vm.halt_poll_ns, vm.halt_poll_params)
        self.requests.clear_request(Request.UNBLOCK)
        self._accept_apic_events()
        if self._runnable():
            if self.mp_state is MpState.HALTED:
                self._set_mp_state(MpState.RUNNABLE)
            if self.mp_state is MpState.RUNNABLE:
                self.pv.apf.wake()

    async def _poll_for_wakeup(self, began: int) -> None:
        """Halt polling: stay on the CPU for up to ``halt_poll_ns``, as long as nobody waits for it."""
        vm, stat = self.vm, self.stat
        window = self.halt_poll_ns
        if not vm.host.is_single_task(self.thread):
            return
        stat.halt_attempted_poll += 1
        self._polling = True
        try:
            while not self._block_ends() and not self.thread.resched and vm.host.is_single_task(self.thread):
                if vm.clock.now() >= began + window:
                    break
                await self._poll.until(began + window)
                if not self._runs_ahead:
                    await vm.between_slices()
        finally:
            self._polling = False
        polled = vm.clock.now() - began
        success = self._block_ends()
        if success:
            stat.halt_successful_poll += 1
            stat.halt_poll_success_ns += polled
        else:
            stat.halt_poll_fail_ns += polled
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.HALT_POLL, self.thread.number, polled, int(success))

    def _accept_apic_events(self) -> None:
        """``kvm_apic_accept_events``: INIT, then SIPI."""
        apic = self.apic
        if not apic.pending_events:
            return
        if self.events.s.smm:
            apic.take_sipi()  # in SMM an INIT stays latched, and a SIPI is lost
            return
        if apic.take_init():
            self._reset(init=True)
            self._set_mp_state(MpState.RUNNABLE if apic.is_bsp else MpState.INIT_RECEIVED)
        vector = apic.take_sipi()
        if vector is not None and self.mp_state is MpState.INIT_RECEIVED:
            state = self.context.state
            state.set_segment(Seg.CS, Segment(vector << 8, vector << 12, 0xFFFF, 0x9B00))
            state.rip = 0
            self._set_mp_state(MpState.RUNNABLE)
