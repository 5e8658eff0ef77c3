"""The vCPU: ``struct kvm_vcpu``, and the coroutine that is the life of KVM_RUN.

The coroutine reads like KVM's loop (``arch/x86/kvm/x86.c`` vcpu_run, vcpu_enter_guest; ``virt/kvm/kvm_main.c``):

    on a CPU -> requests -> events -> guest mode -> slice -> exit -> on and on;  blocked while halted

Rules:

* One writer: the coroutine owns registers, events and ``mp_state``. Others reach it through requests, IRR bits,
  INIT/SIPI bits, ``pv_unhalted`` and the kick, in the order data, request, kick.
* The last look at ``requests`` comes after ``mode`` is IN_GUEST. On the virtual loop nothing can come between; on the
  wall clock a kick that finds IN_GUEST lowers the slice's limit, so one of the two always sees the other.
* Halting and waking: :mod:`aiovm.vcpu_halt`.
* In virtual time ``mode`` stays IN_GUEST until the loop has reached the slice's end.
* On the wall clock a sibling's slice may run when this coroutine wakes: it waits for that slice's end first
  (``vm.between_slices``), and does not wait again before its own.

Answers given inside a slice are in :mod:`aiovm.port`; this module holds state and waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from aiovm.clock import FOREVER, Alarm
from aiovm.errors import StateError
from aiovm.events import EventQueue
from aiovm.exits import BUDGET, Budget, Exit, Hlt, Interrupted, Mmio, PauseLoop, Pio, TprAccess
from aiovm.guest_debug import Breakpoint, DebugControl, breakpoints
from aiovm.kvm_run import KvmRun
from aiovm.kvm_structs import MpState
from aiovm.lapic_message import Accepted, DeliveryMode
from aiovm.paravirt import Paravirt
from aiovm.policy.thread import ThreadState
from aiovm.port import VcpuPort
from aiovm.requests import Request, Requests, VcpuMode
from aiovm.smm import RESET_SMBASE
from aiovm.spin import PleWindow, on_spin
from aiovm.trace import Kind
from aiovm.tsc import GuestTsc
from aiovm.vcpu_arch import VcpuArch
from aiovm.vcpu_halt import VcpuHalt
from aiovm.vcpu_io import UserIo
from aiovm.vcpu_msrs import VcpuMsrs
from aiovm.vcpu_requests import VcpuRequests
from aiovm.vcpu_state import VcpuIoctls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiovm.clock import Timer
    from aiovm.engine.base import Context
    from aiovm.lapic import Lapic
    from aiovm.machine import Machine
    from aiovm.policy.thread import Thread

__all__ = ["MpState", "Vcpu", "VcpuStat"]

#: ns of virtual time after which even a lone vCPU gives the loop a turn.
_MAX_SLICE = 1_000_000
#: What ends a directed yield's idea that a blocked vCPU is not worth boosting (``kvm_arch_dy_runnable``).
_DY_REQUESTS = 1 << Request.NMI | 1 << Request.SMI | 1 << Request.EVENT
_NMI_OR_SMI = 1 << Request.NMI | 1 << Request.SMI


@dataclass(slots=True)
class VcpuStat:
    """``kvm_vcpu_stat``, as far as an emulated CPU has it (Linux 6.16)."""

    exits: int = 0
    io_exits: int = 0
    mmio_exits: int = 0
    signal_exits: int = 0
    irq_window_exits: int = 0
    request_irq_exits: int = 0
    irq_injections: int = 0
    nmi_injections: int = 0
    hypercalls: int = 0
    halt_exits: int = 0
    halt_wakeup: int = 0
    halt_attempted_poll: int = 0
    halt_successful_poll: int = 0
    halt_poll_success_ns: int = 0
    halt_poll_fail_ns: int = 0
    halt_wait_ns: int = 0
    pause_exits: int = 0
    directed_yield_attempted: int = 0
    directed_yield_successful: int = 0
    preemption_reported: int = 0
    #: PV kicks received.
    kicks: int = 0


class Vcpu(VcpuHalt, VcpuRequests, VcpuIoctls):
    """One virtual CPU. Make it through :class:`aiovm.vm.Vm`.

    Attributes carry KVM's names; docs/kvm-map.md says what each is for.
    """

    def __init__(
        self, vm: Machine, index: int, *, vcpu_id: int, apic: Lapic, port: Callable[[Vcpu], VcpuPort] = VcpuPort
    ) -> None:
        self.vm = vm
        self.index = index
        self.vcpu_id = vcpu_id
        self.apic = apic
        self.cpu = -1
        self.mode = VcpuMode.OUTSIDE
        self.requests = Requests()
        self.mp_state = MpState.RUNNABLE if index == 0 else MpState.UNINITIALIZED
        self.wq = asyncio.Event()
        self.mutex = asyncio.Lock()
        self.pid: asyncio.Task[object] | None = None
        self.stat = VcpuStat()
        self.preempted = False
        self.preempted_in_kernel = False
        self.ready = False
        self.blocking = False
        #: A device takes this vCPU's store: the interrupts that follow reach this CPU at once, not at the slice's end.
        self.answering = False
        #: Data breakpoints (DR6's B0-B3) that a load of SS has hit: they strike behind the next instruction.
        self.held_hits = 0
        self.in_spin_loop = False
        self.dy_eligible = False
        #: Who sent an IPI since this vCPU lost its CPU: a bit a thread number.
        self.ipi_senders = 0
        self.pv_unhalted = False
        #: Signals that the program sent and has not taken back, and those that wait meanwhile (KVM_SET_SIGNAL_MASK).
        self.sigpending: set[int] = set()
        self.sigset: frozenset[int] = frozenset()
        self.sigset_active = False
        self._immediate_exit = False
        #: ``run`` returns :class:`Interrupted` as soon as it can.
        self._interrupted = False
        self.kvm_run = KvmRun()
        self.mmio = UserIo()
        self.halt_poll_ns = 0
        self.events = EventQueue()
        #: IA32_SMBASE.
        self.smbase = RESET_SMBASE
        self.guest_debug = DebugControl.NONE
        #: The debugger's DR0-DR7 (``kvm_guest_debug_arch``).
        self.guest_debug_dr: tuple[int, ...] = (0,) * 8
        #: The breakpoints in force, the debugger's or the guest's.
        self.eff_db: tuple[Breakpoint, ...] = ()
        self.ia32_misc_enable_msr = 0
        #: IA32_SPEC_CTRL.
        self.spec_ctrl = 0
        #: KVM_TPR_ACCESS_REPORTING: the guest's accesses to its TPR register leave, once they are done.
        self.tpr_access_reporting = False
        self.tpr_access: TprAccess | None = None
        self.pv = Paravirt(vm.memory, vm.kvmclock, vcpu_id=vcpu_id)
        self.steal = self.pv.steal
        self.ple = PleWindow()
        self._history: deque[str] = deque(maxlen=8)
        self.port = port(self)
        self.context: Context = vm.engine.create_context(index, self.port)
        self.tsc = GuestTsc(on_change=self.context.set_tsc)
        self.thread: Thread = vm.host.add_thread(self, vm.number)
        self._poll = Alarm(vm.clock)
        self._polling = False
        self._timer: Timer | None = None
        self._runs_ahead = vm.runs_ahead
        #: Called with (vCPU, preempted) when the host takes the vCPU off its CPU: how lab guests' lock words are read.
        self.on_sched_out: Callable[[Vcpu, bool], None] | None = None
        #: Called with (vCPU, start, end) after each slice in virtual time, ns: how time is told apart by what the
        #: guest was doing.
        self.on_slice: Callable[[Vcpu, int, int], None] | None = None
        #: Says whether this vCPU holds a lock of the guest's, where the guest keeps such a word.
        self.lock_probe: Callable[[Vcpu], bool] | None = None
        self.yielded = False
        #: Whom this vCPU yielded to in its pause-loop exit, until it is back from it; -1: nobody.
        self.boosting = -1
        #: ns of the host's own work on this CPU that virtual time has yet to see.
        self.owed_ns = 0

    # ---- the face that other vCPUs, chips and the host see -----------------------------------------------------

    def make_request(self, request: Request) -> None:
        """Note a request; the caller kicks."""
        self.requests.make_request(request)

    def kick(self, source: int = -1) -> None:
        """Wake the vCPU if it sleeps, take it out of guest mode if it is there (``kvm_vcpu_kick``).

        At the loop's time only; from inside a slice use ``vm.call_at``. Data and request come first. ``source``: the
        number of the vCPU whose doing it is, or -1 for the host's.
        """
        trace = self.vm.trace
        if trace.on:
            trace.emit(self.vm.clock.now(), Kind.KICK, source, self.thread.number, self.mode.value)
        if self.blocking:
            self.ready = True
            self.stat.halt_wakeup += 1
            self.vm.host.wake(self.thread, source)
            self.wq.set()
        elif self._polling:
            self._poll.ring_at(self.vm.clock.now())
        elif self.mode is VcpuMode.IN_GUEST:
            self.mode = VcpuMode.EXITING
            if not self._runs_ahead:
                self.vm.kick_slice(self.context)

    def accept_apic(
        self, mode: DeliveryMode, vector: int, *, level: bool, trigger_level: bool, source: int = -1
    ) -> bool:
        """An interrupt message reaches this vCPU's LAPIC (``__apic_accept_irq``); whether it was accepted.

        ``source`` as for :meth:`kick`.
        """
        accepted = self.apic.accept(mode, vector, level=level, trigger_level=trigger_level)
        if accepted is Accepted.DROPPED:
            return False
        if accepted is Accepted.NMI:
            self.events.queue_nmi()
            self.make_request(Request.NMI)
        elif accepted is Accepted.SMI:
            self.make_request(Request.SMI)
        elif accepted is Accepted.UNHALT:
            self.pv_unhalted = True
            self.stat.kicks += 1
        elif source >= 0 and self.thread.state is not ThreadState.RUNNING:
            self.ipi_senders |= 1 << source
        self.make_request(Request.EVENT)
        self.kick(source)
        return True

    def pv_unhalt(self, source: int = -1) -> None:
        """KVM_HC_KICK_CPU reached this vCPU: a sticky token that its next HLT consumes."""
        self.accept_apic(DeliveryMode.REMOTE_READ, 0, level=False, trigger_level=False, source=source)

    def notice_extint(self) -> None:
        """The 8259s want this vCPU's attention; at the loop's time."""
        self.make_request(Request.EVENT)
        self.kick()

    def sync_nmi_mask(self) -> None:
        """IRET, which the engine executes by itself, opens NMIs again."""
        if self.events.s.nmi_masked and not self.context.state.nmi_masked:
            self.events.nmi_done()

    def process_nmi(self) -> None:
        """Take the NMIs in that have arrived, as many as can be remembered."""
        self.sync_nmi_mask()
        self.events.fold_nmi()

    # ---- what ends run() from outside ------------------------------------------------------------------------------

    @property
    def immediate_exit(self) -> bool:
        """The next chance to leave is taken, once (``kvm_run.immediate_exit``); a :meth:`kick` makes it come soon."""
        return self._immediate_exit

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._immediate_exit = value
        self._weigh_signals()

    def set_signal_mask(self, sigset: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals that do not end :meth:`run`; None takes the mask away.

        Cancelling the task that runs the vCPU is what no mask holds back.
        """
        self.sigset_active = sigset is not None
        self.sigset = frozenset(() if sigset is None else sigset)
        self._weigh_signals()

    def send_signal(self, signal: int) -> None:
        """End :meth:`run` with :class:`Interrupted`, now or at its next call, unless the mask holds ``signal`` back.

        ``signal``: a number of the program's choice. It stays pending until :meth:`take_signals`.
        """
        self.sigpending.add(signal)
        self._weigh_signals()
        if self._interrupted:
            self.kick()

    def take_signals(self) -> list[int]:
        """The pending signals, in order of their numbers; they are pending no more (``sigtimedwait``)."""
        taken = sorted(self.sigpending)
        self.sigpending.clear()
        self._weigh_signals()
        return taken

    def _weigh_signals(self) -> None:
        blocked = self.sigset if self.sigset_active else frozenset[int]()
        self._interrupted = self._immediate_exit or not self.sigpending <= blocked

    def set_guest_debug(self, control: DebugControl, debugreg: Sequence[int] = (0,) * 8) -> None:
        """KVM_SET_GUEST_DEBUG; between runs."""
        inject = control & (DebugControl.INJECT_DB | DebugControl.INJECT_BP)
        events = self.events
        if inject and (events.s.exception_pending or events.s.exception_injected):
            raise StateError(f"vCPU {self.index}: cannot inject over a pending exception (EBUSY)")
        if inject:
            events.queue_exception(1 if control & DebugControl.INJECT_DB else 3)
            self.make_request(Request.EVENT)
        self.guest_debug = control & ~inject if control & DebugControl.ENABLE else DebugControl.NONE
        self.guest_debug_dr = tuple(debugreg)
        self.update_debug()

    def update_debug(self) -> None:
        """Debug registers changed, the guest's or the debugger's."""
        if self.guest_debug & DebugControl.USE_HW_BP:
            self.eff_db = breakpoints(self.guest_debug_dr, self.guest_debug_dr[7])
        else:
            state = self.context.state
            self.eff_db = breakpoints([state.get_dr(index) for index in range(4)], state.get_dr(7))
        self.context.watching = any(point.type for point in self.eff_db)
        self.context.stepping = bool(self.eff_db or self.guest_debug & DebugControl.SINGLESTEP)

    def report_tpr_access(self, *, is_write: bool) -> None:
        """The guest touched its TPR register, and the program wants to hear of it; from inside a slice."""
        self.tpr_access = TprAccess(self.context.state.rip, is_write)
        self.make_request(Request.REPORT_TPR_ACCESS)
        self.vm.clock.lower_limit(self.vm.clock.now())

    @cached_property
    def msrs(self) -> VcpuMsrs:
        """What RDMSR and WRMSR reach."""
        return VcpuMsrs(self)

    @cached_property
    def arch(self) -> VcpuArch:
        """The x86 part by KVM's names."""
        return VcpuArch(self)

    @property
    def srcu_idx(self) -> int:
        """The generation of the memory map that the running slice reads; -1 while no slice runs."""
        return self.context.map_generation

    @property
    def fpu_active(self) -> bool:
        """The guest may use its FPU without #NM: CR0.TS and CR0.EM are clear."""
        return not self.context.state.cr0 & 0xC

    @property
    def guest_fpu_loaded(self) -> bool:
        """This vCPU's FPU and SSE registers are the ones in the core; they move with the others."""
        return self.context.is_loaded

    @property
    def guest_xcr0_loaded(self) -> bool:
        """The guest's XCR0 governs the core: loaded, with CR4.OSXSAVE."""
        return self.context.is_loaded and bool(self.context.state.cr4 & 1 << 18)

    def inject_smi(self) -> None:
        """KVM_SMI."""
        self.accept_apic(DeliveryMode.SMI, 0, level=True, trigger_level=False)

    def inject_nmi(self) -> None:
        """KVM_NMI."""
        self.accept_apic(DeliveryMode.NMI, 2, level=True, trigger_level=False)

    # PreemptNotifier

    def sched_in(self, pcpu: int, now: int) -> None:
        """The host put the thread on a physical CPU (``kvm_sched_in``)."""
        self.preempted = False
        self.ready = False
        self.ipi_senders = 0
        if self.cpu != pcpu:
            self.cpu = pcpu
        self.ple.sched_in()
        self._load_ple()
        self.make_request(Request.STEAL_UPDATE)

    def sched_out(self, *, preempted: bool, now: int) -> None:
        """The host takes the thread off (``kvm_sched_out``)."""
        if preempted:
            self.preempted = True
            self.ready = True
            self.preempted_in_kernel = self.context.state.cpl == 0
            if self.steal.report_preempted():
                self.stat.preemption_reported += 1
                self._trace_steal(now, preempted=True)
        if self.on_sched_out is not None:
            self.on_sched_out(self, preempted)

    def need_resched(self) -> None:
        """The host wants the CPU for somebody else."""
        if self._polling:
            self._poll.ring_at(self.vm.clock.now())
        elif self.mode is VcpuMode.IN_GUEST and not self._runs_ahead:
            self.vm.kick_slice(self.context)

    def holds_lock(self) -> bool:
        """Whether the guest says that this vCPU holds a lock; see :attr:`lock_probe`."""
        return self.lock_probe is not None and self.lock_probe(self)

    # SpinCandidate

    def dy_runnable(self) -> bool:
        """``kvm_arch_dy_runnable``: something has come that will end this vCPU's sleep."""
        return self.pv_unhalted or bool(self.requests.bits & _DY_REQUESTS) or self.pv.apf.completions

    def dy_has_pending_interrupt(self) -> bool:
        """``kvm_arch_dy_has_pending_interrupt``."""
        return self.apic.pending_vector() >= 0

    def has_ipi_from(self, index: int) -> bool:
        """Whether vCPU ``index`` sent an IPI since this one lost its CPU."""
        return bool(self.ipi_senders >> self.vm.vcpus[index].thread.number & 1)

    # ---- KVM_RUN -------------------------------------------------------------------------------------------------

    async def run(self) -> Exit:
        """Run until something must leave to the embedding program; returns why.

        A second caller waits until the first has left (``vcpu->mutex``).
        """
        async with self.mutex:
            self.pid = asyncio.current_task()
            host, thread = self.vm.host, self.thread
            try:
                host.wake(thread)
                await thread.alarm
                if not self._runs_ahead:
                    await self.vm.between_slices()
                exit_ = self.mmio.resume(self) if self.mmio.pending else None
                if exit_ is None:
                    exit_ = self.mmio.leaving(await self._vcpu_run())
                self._tell(exit_)
                return exit_
            finally:
                # Whoever was cancelled while asleep or in guest mode is neither: a kick must not wake an empty thread.
                self.blocking = False
                self.mode = VcpuMode.OUTSIDE
                host.retire(thread)

    def _tell(self, exit_: Exit) -> None:
        """``post_kvm_run_save``."""
        run, state = self.kvm_run, self.context.state
        run.exit = exit_
        run.if_flag = bool(state.rflags & 0x200)
        run.flags = int(self.events.s.smm)
        run.cr8 = self.apic.cr8
        run.apic_base = self.apic.apic_base
        run.ready_for_interrupt_injection = run.if_flag and not state.interrupt_shadow and not self.events.any

    def leave_for_io(self, exit_: Pio | Mmio) -> None:
        """The guest touched what the program answers; from inside a slice."""
        posted = self.mmio.posted
        if isinstance(exit_, Mmio) and exit_.is_write:
            posted.append(exit_)
        if len(posted) < 2:
            self.vm.engine.leave(exit_)

    async def _vcpu_run(self) -> Exit:
        """``vcpu_run``: the loop around entries and blocks."""
        vm, host, thread, apic = self.vm, self.vm.host, self.thread, self.apic
        clock, cells, context = vm.clock, vm.clock.cells, self.context
        eoi = self.pv.eoi
        while True:
            if self._running():
                if self.requests.bits:
                    leaving = self.service_requests()
                    if leaving is not None:
                        return leaving
                    if not self._running():
                        continue
                # Invariant: nothing between this store and the slice can set a request unseen.
                self.mode = VcpuMode.IN_GUEST
                if self.requests.bits or thread.resched or self._interrupted:
                    self.mode = VcpuMode.OUTSIDE
                elif self._runs_ahead:
                    start = cells[0]
                    limit = clock.horizon()
                    if limit > start + _MAX_SLICE:
                        limit = start + _MAX_SLICE
                    if self._timer is not None and self._timer.deadline < limit:
                        limit = self._timer.deadline
                    if thread.slice_end < limit and host.pcpus[thread.pcpu_index].queue:
                        limit = thread.slice_end
                    if limit <= start:
                        limit = start + 1
                    if eoi.enabled:
                        self._arm_eoi()
                    exit_ = context.run(limit)
                    if eoi.pending:
                        self.harvest_eoi()
                    end = cells[0]
                    cells[0] = start
                    cells[1] = FOREVER
                    if self.on_slice is not None:
                        self.on_slice(self, start, end)
                    if not clock.try_advance(end):
                        await thread.alarm.until(end)
                    self.mode = VcpuMode.OUTSIDE
                    if exit_ is not BUDGET:
                        leaving = self._handle_exit(exit_)
                        if leaving is not None:
                            return leaving
                else:
                    if eoi.enabled:
                        self._arm_eoi()
                    exit_ = await vm.run_slice(context, vm.wall_slice_ns)
                    self.mode = VcpuMode.OUTSIDE
                    if vm.slice_waited:
                        thread.run_delay += vm.slice_waited
                        self.make_request(Request.STEAL_UPDATE)
                    if eoi.pending:
                        self.harvest_eoi()
                    leaving = self._handle_exit(exit_)
                    if leaving is not None:
                        return leaving
            else:
                await self._block()
            if apic.timer.pending:
                self._inject_timer()
            if self._interrupted:
                self.immediate_exit = False
                self.stat.signal_exits += 1
                return Interrupted()
            if self.owed_ns:
                owed, self.owed_ns = self.owed_ns, 0
                await thread.alarm.until(clock.now() + owed)
            if thread.resched and host.preempt(thread, yielded=self.yielded):
                await thread.alarm
                if not self._runs_ahead:
                    await vm.between_slices()
            if self.boosting >= 0:
                vm.last_boosted_vcpu, self.boosting = self.boosting, -1
            self.yielded = self.in_spin_loop = self.dy_eligible = False

    def _arm_eoi(self) -> None:
        """PV EOI, before an entry: let the guest end the interrupt in service without an exit."""
        apic = self.apic
        vector = apic.highest_isr()
        if vector >= 0:
            awaited = (apic.state.tmr | apic.watched_vectors) >> vector & 1
            self.pv.eoi.arm(irr_pending=apic.has_irr, isr_vector=vector, ioapic_handles=bool(awaited))

    def harvest_eoi(self) -> None:
        """PV EOI, before anything else looks at the local APIC: has the guest ended its interrupt?"""
        if self.pv.eoi.harvest():
            self.port.apply(self.apic.eoi())

    def _handle_exit(self, exit_: Exit) -> Exit | None:
        """What a leaving exit means; the exit itself when it is the embedding program's business."""
        self.stat.exits += 1
        match exit_:
            case Budget() | Interrupted():
                pass
            case Hlt():
                self._halt(exit_)
            case PauseLoop():
                self._on_spin(exit_)
            case _:
                return exit_
        return self.mmio.posted[0] if self.mmio.posted else None

    def _on_spin(self, exit_: PauseLoop) -> None:
        """``kvm_vcpu_on_spin``: give the CPU to a sibling that may hold what this one waits for."""
        vm = self.vm
        self.stat.pause_exits += 1
        trace = vm.trace
        if trace.on:
            now = vm.clock.now()
            trace.emit(now, Kind.PLE, self.thread.number, self.context.state.rip, self.context.ple_window)
        self.ple.grow()
        self._load_ple()
        outcome = on_spin(vm.vcpus, self.index, vm.last_boosted_vcpu, self._offer_cpu, vm.spin_options)
        self.stat.directed_yield_attempted += outcome.tries
        # KVM works, and its yield sleeps, inside the handler: for its siblings this vCPU spins until it runs again, and
        # only then does it note whom it boosted.
        self.in_spin_loop = outcome.tries > 0
        self.boosting = outcome.target
        self.stat.directed_yield_successful += outcome.target >= 0

    def _offer_cpu(self, index: int) -> int:
        """One try of a spinner's, and what it costs."""
        vm, thread, target = self.vm, self.thread, self.vm.vcpus[index].thread
        answer = self._yield_to(index)
        if vm.clock.is_virtual:
            # -1 is given before the queues' locks are asked for; the kernels before that question took them always.
            locked = answer >= 0 or not vm.spin_options.undercommit_check
            now = vm.clock.now()
            at = now + self.owed_ns
            self.owed_ns = (vm.host.lock_queues(thread, target, at) if locked else at + vm.costs.yield_ns) - now
        return answer

    def _yield_to(self, index: int) -> int:
        """``kvm_vcpu_yield_to``: 1 done, 0 no use, -1 nobody else is ready."""
        target = self.vm.vcpus[index]
        answer = 0 if target.pid is None else self.vm.host.yield_to(self.thread, target.thread)
        self.yielded = self.yielded or answer > 0
        trace = self.vm.trace
        if trace.on:
            trace.emit(self.vm.clock.now(), Kind.YIELD, self.thread.number, target.thread.number, answer)
        return answer

    def sched_yield_to(self, index: int) -> None:
        """``kvm_sched_yield``: a directed yield that the guest asks for; at the loop's time."""
        target = self.vm.vcpus[index]
        self.stat.directed_yield_attempted += 1
        if (
            self.thread.state is ThreadState.RUNNING
            and not self.vm.host.is_single_task(self.thread)
            and target.ready
            and target is not self
            and self._yield_to(index) > 0
        ):
            self.stat.directed_yield_successful += 1

    # ---- events, reset -----------------------------------------------------------------------------------------------

    def _has_events(self) -> bool:
        if self.requests.bits & _NMI_OR_SMI or self._nmi_deliverable():
            return True
        state = self.context.state
        return bool(state.rflags & 0x200) and (self.apic.pending_vector() >= 0 or self.vm.pic_pending(self))

    def _nmi_deliverable(self) -> bool:
        return bool(self.events.s.nmi_pending) and not self.context.state.nmi_masked

    def _reset(self, *, init: bool) -> None:
        """``kvm_vcpu_reset`` (``arch/x86/kvm/x86.c`` of Linux 6.16): INIT turns the paravirtual records off as well."""
        self.context.reset(init=init)
        if not init:
            self.smbase = RESET_SMBASE
        self.spec_ctrl = 0
        self.apic.reset(init=init)
        self.arm_timer()
        self.events.reset()
        self.update_debug()
        self.held_hits = 0
        self.pv_unhalted = False
        self.pv.reset()

    # ---- timer, steal time, PLE ------------------------------------------------------------------------------------

    def arm_timer(self) -> None:
        """The LAPIC timer's deadline moved."""
        deadline = self.apic.timer.next_deadline()
        timer = self._timer
        if timer is not None:
            if timer.deadline == deadline:
                return
            timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self.vm.call_at(deadline, self._timer_expired)
            self.vm.clock.lower_limit(deadline)

    def disarm_timer(self) -> None:
        """The machine is gone: nobody waits for its timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_expired(self) -> None:
        """The host's timer fired: pending, UNBLOCK, kick; delivery happens in the run loop."""
        timer, self._timer = self._timer, None
        now = self.vm.clock.now()
        if self.apic.timer.advance(now):
            if self.vm.trace.on and timer is not None:
                self.vm.trace.emit(now, Kind.TIMER, self.thread.number, timer.deadline, now - timer.deadline)
            self.make_request(Request.UNBLOCK)
            self.kick()
        self.arm_timer()

    def _inject_timer(self) -> None:
        if self.apic.inject_timer():
            self.make_request(Request.EVENT)

    def _record_steal_time(self) -> None:
        if self.steal.update(self.thread.run_delay):
            self.context.flush_tlb()
        if self.steal.enabled:
            self._trace_steal(self.vm.clock.now(), preempted=False)

    def _trace_steal(self, now: int, *, preempted: bool) -> None:
        """What the guest's steal time record says from now on."""
        trace = self.vm.trace
        if trace.on:
            trace.emit(now, Kind.STEAL, self.thread.number, self.thread.run_delay, int(preempted))

    def _load_ple(self) -> None:
        """Hand the pause-loop window to the engine, in ns."""
        self.context.ple_window = self.ple.window * 1_000_000 // self.vm.tsc_khz if self.vm.ple else -1

    # ---- for people --------------------------------------------------------------------------------------------------

    @property
    def history(self) -> deque[str]:
        """The last exits, for the message of a guest that ended itself."""
        self._history.extend(f"#{vector}" for vector in self.context.take_delivered())
        return self._history

    def note(self, what: str) -> None:
        """Remember an exit for the message of a guest that ends itself."""
        self.history.append(what)

    def describe(self) -> str:
        """One phrase: who, state, RIP, last exits."""
        history = self.history
        text = f"vCPU {self.index} {self.mp_state.name.lower()} at RIP {self.context.state.rip:#x}"
        return text + (f" (last exits: {', '.join(history)})" if history else "")
