"""What a vCPU answers from inside a slice: CPUID, MSRs, ports, MMIO, exceptions, interrupt windows, hypercalls.

Each answer is plain code that the engine calls at the exit (:class:`~aiovm.engine.base.GuestPort`); the guest goes on
in the same slice. What concerns other CPUs or the host's scheduler is not done here but armed on the clock for the
slice's own present moment, so that the world sees it in the right order.

Guest nonsense gets the manual's answer: #GP for an MSR that does not exist, all ones from a port that nobody drives.
MSRs are :mod:`aiovm.vcpu_msrs`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.control import read_dr, write_cr0, write_cr3, write_cr4, write_dr
from aiovm.delivery import SHUTDOWN, deliver_event
from aiovm.descriptor_tables import load_ldt, load_table
from aiovm.engine.base import Seg
from aiovm.events import EventKind
from aiovm.exits import Debug, Hlt, PauseLoop, Shutdown
from aiovm.guest_debug import DebugControl, data_hits, instruction_hits
from aiovm.interrupt_return import interrupt_return
from aiovm.lapic_registers import NO_EFFECT
from aiovm.memory import PAGE
from aiovm.paravirt import HypercallNumber, refusal
from aiovm.requests import Request
from aiovm.segmentation import Fault
from aiovm.smm import enter_smm, leave_smm
from aiovm.task_register import io_permitted, load_tr
from aiovm.trace import Kind
from aiovm.vcpu_io import UserRange, within_page

if TYPE_CHECKING:
    from aiovm.bus import Bus
    from aiovm.engine.base import DescriptorTable
    from aiovm.lapic import Lapic
    from aiovm.lapic_registers import LapicEffect
    from aiovm.vcpu import Vcpu

__all__ = ["VcpuPort"]

_M64 = (1 << 64) - 1
_TASKPRI = 0x80
_IF = 0x200

_RF, _DR6_BS, _DR6_FIXED, _DR7_FIXED = 1 << 16, 1 << 14, 0xFFFF_0FF0, 0x400
#: With either, #DB is the debugger's, whoever caused it (``vmx.c`` handle_exception_nmi).
_DEBUGGER_TAKES_DB = DebugControl.SINGLESTEP | DebugControl.USE_HW_BP

#: Members of enums are dear to look up.
_EXCEPTION, _EXTERNAL, _NMI, _SMI = EventKind.EXCEPTION, EventKind.EXTERNAL, EventKind.NMI, EventKind.SMI

_VAPIC_POLL_IRQ = int(HypercallNumber.VAPIC_POLL_IRQ)
_CR_WRITES = {0: write_cr0, 3: write_cr3, 4: write_cr4}


class VcpuPort:
    """The inline answers of one vCPU; it keeps no state of the guest's."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.vm = vcpu.vm
        self._now = self.vm.clock.now
        self._same_leaves = self.vm.cpuid.same

    # ---- CPUID, TSC and MSRs ----------------------------------------------------------------------------------

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        same = self._same_leaves.get(leaf)
        if same is not None:
            return same
        apic = self.vcpu.apic
        state = self.vcpu.context.state
        return self.vm.cpuid.answer(
            leaf, subleaf, apic.apic_id, apic_enabled=apic.hw_enabled, cr4=state.cr4, xcr0=state.xcr0
        )

    def on_rdtsc(self) -> int:
        return self.vcpu.msrs.read_tsc()

    def on_rdmsr(self, index: int) -> int | None:
        value = self.vcpu.msrs.read(index)
        if value is None:
            self._unknown(index, 0)
            self.inject(13, 0)
        return value

    def on_wrmsr(self, index: int, value: int) -> bool:
        if self.vcpu.msrs.write(index, value):
            return True
        self._unknown(index, value)
        self.inject(13, 0)
        return False

    # ---- ports and MMIO --------------------------------------------------------------------------------------------

    def on_in(self, port: int, size: int) -> int:
        vm = self.vm
        self.vcpu.stat.io_exits += 1
        value = vm.ports.read(port, size, self._now())
        if value is None:
            value = vm.unclaimed_in(self.vcpu, port, size)
        if vm.trace.on:
            vm.trace.emit(self._now(), Kind.PIO, self.vcpu.thread.number, port, value)
        return value

    def on_out(self, port: int, size: int, value: int) -> None:
        vm = self.vm
        self.vcpu.stat.io_exits += 1
        if vm.trace.on:
            vm.trace.emit(self._now(), Kind.PIO, self.vcpu.thread.number, port | 1 << 16, value)
        if not self._store(vm.ports, port, size, value):
            vm.unclaimed_out(self.vcpu, port, size, value)

    def on_mmio_read(self, gpa: int, size: int) -> int:
        vcpu = self.vcpu
        vcpu.stat.mmio_exits += 1
        apic = vcpu.apic
        offset = gpa - apic.page
        if 0 <= offset < PAGE:
            if offset == _TASKPRI and vcpu.tpr_access_reporting:
                vcpu.report_tpr_access(is_write=False)
            if vcpu.pv.eoi.pending:
                vcpu.harvest_eoi()
            return apic.mmio_read(offset, size, self._now())
        value = self.vm.mmio.read(gpa, size, self._now())
        if value is None:
            self._unknown(gpa, 0)
            return (1 << 8 * size) - 1
        return value

    def on_mmio_write(self, gpa: int, size: int, value: int) -> None:
        vcpu = self.vcpu
        vcpu.stat.mmio_exits += 1
        apic = vcpu.apic
        offset = gpa - apic.page
        if 0 <= offset < PAGE:
            if offset == _TASKPRI and vcpu.tpr_access_reporting:
                vcpu.report_tpr_access(is_write=True)
            if vcpu.pv.eoi.pending:
                vcpu.harvest_eoi()
            effect = apic.mmio_write(offset, size, value, self._now())
            if effect is not NO_EFFECT:
                self.apply(effect)
        elif not self._store(self.vm.mmio, gpa, size, value):
            self._unknown(gpa, value)

    def _store(self, bus: Bus, address: int, size: int, value: int) -> bool:
        """Whether a device took the store; the interrupts that it raises for this CPU come at once."""
        vcpu = self.vcpu
        vcpu.answering = True
        claimed = bus.write(address, size, value, self._now())
        vcpu.answering = False
        return claimed

    def is_users(self, gpa: int, size: int) -> bool:
        if 0 <= gpa - self.vcpu.apic.page < PAGE:
            return False
        found = self.vm.mmio.find(gpa, size)
        return found is not None and isinstance(found[0], UserRange)

    def on_user_read(self, gpa: int, size: int) -> bool:
        vcpu = self.vcpu
        if not self.is_users(gpa, within_page(gpa, size)):
            return False
        exit_ = vcpu.mmio.begin_read(gpa, size)
        vcpu.stat.mmio_exits += 1
        vcpu.note(f"load {gpa:#x}")
        self.vm.engine.leave(exit_)
        return True

    def up_to_date_apic(self) -> Lapic:
        """The local APIC, up to date: an interrupt that the guest ended in memory is ended there too."""
        vcpu = self.vcpu
        if vcpu.pv.eoi.pending:
            vcpu.harvest_eoi()
        return vcpu.apic

    def apply(self, effect: LapicEffect) -> None:
        """Carry out what a LAPIC register access owes."""
        vcpu, vm = self.vcpu, self.vm
        if effect.ipi is not None:
            vm.deliver_ipi(vcpu, effect.ipi)
        if effect.eoi is not None:
            vm.broadcast_eoi(effect.eoi, level=effect.eoi_level)
        if effect.timer:
            vcpu.arm_timer()
        if effect.map_changed:
            vm.apic_map_changed()
        if effect.event:
            self.update_irq_window()

    def _unknown(self, address: int, value: int) -> None:
        trace = self.vm.trace
        if trace.on:
            trace.emit(self.vm.clock.now(), Kind.UNKNOWN_ACCESS, self.vcpu.thread.number, address, value)

    # ---- control registers -------------------------------------------------------------------------------------------

    def on_cr_read(self, register: int) -> int | None:
        if register == 8:
            return self.up_to_date_apic().cr8
        return None

    def on_cr_write(self, register: int, value: int) -> bool:
        if register == 8 and not value >> 4:
            self.apply(self.up_to_date_apic().write_cr8(value))
            return True
        write = _CR_WRITES.get(register)
        if write is None:
            self.inject(13, 0)
            return False
        return self._done(write(self.vcpu.context.state, self.vm.memory, value))

    def on_dr_read(self, register: int) -> int | None:
        found = read_dr(self.vcpu.context.state, register)
        if isinstance(found, Fault):
            self._done(found)
            return None
        return found

    def on_dr_write(self, register: int, value: int) -> bool:
        done = self._done(write_dr(self.vcpu.context.state, register, value))
        self.vcpu.update_debug()
        return done

    def on_load_tr(self, selector: int) -> bool:
        return self._done(load_tr(self.vcpu.context.state, self.vm.memory, selector))

    def on_load_ldt(self, selector: int) -> bool:
        return self._done(load_ldt(self.vcpu.context.state, self.vm.memory, selector))

    def on_load_table(self, table: DescriptorTable, *, interrupts: bool) -> bool:
        return self._done(load_table(self.vcpu.context.state, table, interrupts=interrupts))

    def on_io_permission(self, port: int, size: int) -> bool:
        return io_permitted(self.vcpu.context.state, self.vm.memory, port, size)

    def _done(self, fault: Fault | None) -> bool:
        """Whether an instruction was carried out; its fault is raised."""
        if fault is None:
            return True
        self.inject(fault.vector, fault.error_code, fault.cr2)
        return False

    def on_interrupt_return(self, width: int) -> bool:
        return self._done(interrupt_return(self.vcpu.context.state, self.vm.memory, width))

    def on_rsm(self) -> None:
        """RSM outside SMM does not exist (SDM vol. 2B, RSM)."""
        vcpu = self.vcpu
        state = vcpu.context.state
        if not vcpu.events.s.smm:
            self.inject(6)
            return
        smbase = leave_smm(state, self.vm.memory, vcpu.smbase)
        if smbase is None:
            self._shutdown("RSM to a state that cannot be")
            return
        vcpu.smbase = smbase
        vcpu.events.smm_done()
        state.nmi_masked = vcpu.events.s.nmi_masked
        vcpu.update_debug()
        self.inject_pending()

    # ---- hypercalls --------------------------------------------------------------------------------------------------

    def on_hypercall(self, number: int, a0: int, a1: int, a2: int, a3: int, cpl: int) -> int:
        vm, vcpu = self.vm, self.vcpu
        vcpu.stat.hypercalls += 1
        result = refusal(number, cpl)
        if result is None:
            result = self._hypercall(number, a0, a1, a2, a3)
        result &= _M64
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.HYPERCALL, vcpu.thread.number, number, result)
        return result

    def _hypercall(self, number: int, a0: int, a1: int, a2: int, a3: int) -> int:
        """``__kvm_emulate_hypercall``; what touches other vCPUs happens at the slice's own moment on the loop."""
        if number == _VAPIC_POLL_IRQ:
            return 0
        vm = self.vm
        if number == HypercallNumber.KICK_CPU:
            vm.post(vm.clock.now(), lambda: vm.pv_kick(self.vcpu, a1))
            return 0
        if number == HypercallNumber.SCHED_YIELD:
            vm.post(vm.clock.now(), lambda: vm.pv_sched_yield(self.vcpu, a0))
            return 0
        return vm.hypercall(self.vcpu, number, (a0, a1, a2, a3))

    # ---- exceptions and interrupts -----------------------------------------------------------------------------------

    @property
    def hears_exceptions(self) -> bool:
        return self.vm.trace.on

    def on_exception(self, vector: int, error_code: int | None, address: int) -> None:
        if vector == 1 and self.vcpu.guest_debug & _DEBUGGER_TAKES_DB:
            self._leave_debug(1, self.vcpu.context.state.get_dr(6))
        else:
            self.inject(vector, error_code, address)

    def on_soft_interrupt(self, vector: int, length: int, kind: EventKind) -> None:
        state = self.vcpu.context.state
        if kind is EventKind.SOFT_EXC and vector == 3 and self.vcpu.guest_debug & DebugControl.USE_SW_BP:
            self._leave_debug(3, 0)
            return
        if kind is EventKind.ICEBP:  # one #DB for both
            state.set_dr(6, state.get_dr(6) | self.vcpu.held_hits)
            self.vcpu.held_hits = 0
        return_rip = state.rip + length & (_M64 if state.long_mode else 0xFFFF_FFFF)
        self._deliver(vector, kind, return_rip=return_rip)

    def on_step(self) -> None:
        """Instruction breakpoints."""
        vcpu = self.vcpu
        state = vcpu.context.state
        if vcpu.eff_db and not state.rflags & _RF and not vcpu.context.ss_shadow:
            hits = instruction_hits(vcpu.eff_db, self._linear_rip())
            if hits:
                self._debug_event(hits)

    def on_stepped(self) -> None:
        """Data breakpoints, and the debugger's single step."""
        vcpu = self.vcpu
        accesses = vcpu.context.take_accesses()
        hits = data_hits(vcpu.eff_db, accesses, vcpu.arch.walk_mmu.translate_debug) | vcpu.held_hits
        vcpu.held_hits = 0
        if vcpu.guest_debug & DebugControl.SINGLESTEP:
            self._leave_debug(1, hits | _DR6_BS)
        elif vcpu.context.ss_shadow:
            vcpu.held_hits = hits
        elif hits:
            self._debug_event(hits)

    def _debug_event(self, hits: int) -> None:
        """A breakpoint was hit: the debugger's, or #DB for the guest."""
        state = self.vcpu.context.state
        if self.vcpu.guest_debug & DebugControl.USE_HW_BP:
            self._leave_debug(1, hits)
        else:
            state.set_dr(6, state.get_dr(6) & ~0xF | hits)
            self.inject(1)

    def _linear_rip(self) -> int:
        state = self.vcpu.context.state
        return state.rip if state.long_mode else state.rip + state.segment(Seg.CS).base & 0xFFFF_FFFF

    def _leave_debug(self, vector: int, dr6: int) -> None:
        """KVM_EXIT_DEBUG."""
        dr7 = self.vcpu.guest_debug_dr[7] if self.vcpu.guest_debug & DebugControl.USE_HW_BP else 0
        self.vm.engine.leave(Debug(vector, self._linear_rip(), dr6 | _DR6_FIXED, dr7 | _DR7_FIXED))

    def inject(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        """Raise exception ``vector`` at RIP, now."""
        vm, vcpu = self.vm, self.vcpu
        if vector == 14:
            vcpu.context.state.cr2 = address
        vcpu.note(f"#{vector}")
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.FAULT, vcpu.thread.number, vector, vcpu.context.state.rip)
        self._deliver(vector, _EXCEPTION, error_code=error_code)

    def _deliver(
        self, vector: int, kind: EventKind, *, error_code: int | None = None, return_rip: int | None = None
    ) -> bool:
        """Through the guest's own tables; a triple fault ends the slice. Whether it was delivered."""
        vm, vcpu = self.vm, self.vcpu
        vm.cells[0] += vm.costs.inject_ns
        if vcpu.context.deliver(vector, kind, error_code, return_rip):
            return True
        outcome = deliver_event(vcpu.context.state, vm.memory, vector, kind, error_code, return_rip)
        if outcome == SHUTDOWN:
            self._shutdown("triple fault")
            return False
        if outcome == 1:
            vcpu.update_debug()  # #DB cleared DR7.GD
        return True

    def _shutdown(self, reason: str) -> None:
        """KVM_EXIT_SHUTDOWN, after the slice."""
        self.vcpu.note(reason)
        self.vcpu.make_request(Request.TRIPLE_FAULT)
        self.vm.engine.leave(Shutdown(reason))

    def inject_pending(self) -> None:
        """``kvm_check_and_inject_events`` before an entry: NMI, then interrupts, each when the guest can take it."""
        vcpu = self.vcpu
        events = vcpu.events
        if events.any:
            vcpu.sync_nmi_mask()
        while events.any:
            if vcpu.guest_debug and vcpu.guest_debug & DebugControl.BLOCKIRQ and not events.has_exception:
                return
            state = vcpu.context.state
            event = events.select(interrupt_flag=False, shadow=state.interrupt_shadow)
            if event is None:
                vcpu.context.request_nmi_window(bool(events.s.nmi_pending))
                break
            if event.kind is _SMI:
                self._enter_smm()
                continue
            if event.kind is _NMI:
                vcpu.stat.nmi_injections += 1
                state.nmi_masked = True
            delivered = self._deliver(event.vector, event.kind, error_code=event.error_code)
            events.delivered()
            if not delivered:
                return
        self.on_irq_window()

    def _enter_smm(self) -> None:
        vcpu = self.vcpu
        state = vcpu.context.state
        vcpu.note("smi")
        if not enter_smm(state, self.vm.memory, vcpu.smbase):
            self._shutdown("no memory for the SMI's save area")
        state.nmi_masked = True
        vcpu.update_debug()

    def on_nmi_window(self) -> None:
        """NMIs are open. In a shadow the slice ends behind the next instruction, and the entry looks again."""
        vcpu = self.vcpu
        if vcpu.context.state.interrupt_shadow:
            vcpu.make_request(Request.EVENT)
            self.vm.clock.lower_limit(self.vm.clock.now() + 1)
        else:
            self.inject_pending()

    def on_irq_window(self) -> None:
        """The guest may be able to take an interrupt: give it the first, and ask again for the next."""
        vcpu = self.vcpu
        if vcpu.pv.eoi.pending:
            vcpu.harvest_eoi()
        if vcpu.guest_debug and vcpu.guest_debug & DebugControl.BLOCKIRQ:
            return
        if self._interrupt_waits():
            state = vcpu.context.state
            if state.rflags & _IF and not state.interrupt_shadow:
                self._inject_interrupt()
        vcpu.context.request_irq_window(self._interrupt_waits())

    def update_irq_window(self) -> None:
        """Something about pending interrupts changed inside the slice."""
        self.vcpu.context.request_irq_window(self._interrupt_waits())

    def _interrupt_waits(self) -> bool:
        return self.vcpu.apic.pending_vector() >= 0 or self.vm.pic_pending(self.vcpu)

    def _inject_interrupt(self) -> None:
        """ExtINT before the LAPIC (``arch/x86/kvm/lapic.c`` of Linux 6.16)."""
        vm, vcpu = self.vm, self.vcpu
        vector = vm.pic_vector(vcpu) if vm.pic_pending(vcpu) else vcpu.apic.acknowledge()
        vcpu.stat.irq_injections += 1
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.INJECT, vcpu.thread.number, vector, 0)
        self._deliver(vector, _EXTERNAL)

    # ---- leaving -----------------------------------------------------------------------------------------------------

    def on_hlt(self) -> None:
        """Leave, unless something is pending that HLT would only be woken by: then it is over at once."""
        vcpu = self.vcpu
        interrupts_enabled = bool(vcpu.context.state.rflags & _IF)
        vcpu.note("hlt")
        self.vm.engine.leave(Hlt(interrupts_enabled))

    def on_pause_loop(self) -> None:
        self.vm.engine.leave(PauseLoop(kernel_mode=self.vcpu.context.state.cpl == 0))
