"""What a vCPU answers from inside a slice: CPUID, MSRs, ports, MMIO, exceptions, interrupt windows, hypercalls.

Each answer is plain code that the engine calls at the exit (:class:`~aiovm.engine.base.GuestPort`); the guest goes on in
the same slice. What concerns other CPUs or the host's scheduler is not done here but armed on the clock for the slice's
own present moment, so that the world sees it in the right order.

Guest nonsense gets the manual's answer: #GP for an MSR that does not exist, all ones from a port that nobody drives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.delivery import SHUTDOWN, deliver_event
from aiovm.events import EventKind
from aiovm.exits import ExitReason, Hlt, PauseLoop, Shutdown
from aiovm.paravirt import HypercallNumber, decode_hypercall
from aiovm.requests import Request
from aiovm.trace import Kind

if TYPE_CHECKING:
    from aiovm.lapic import Lapic, LapicEffect
    from aiovm.vcpu import Vcpu

__all__ = ["VcpuPort"]

_M64 = (1 << 64) - 1
_APIC_PAGE = 0x1000
_IF = 0x200

_X2APIC_MSRS = range(0x800, 0x900)
_TSC, _APIC_BASE, _TSC_ADJUST, _MISC_ENABLE, _DEADLINE, _EFER = 0x10, 0x1B, 0x3B, 0x1A0, 0x6E0, 0xC000_0080
_EFER_MASK = 0xD01  # SCE, LME, LMA, NXE
#: MSRs inside the core whose value must be a canonical address (SDM vol. 4, table 2-2).
_CANONICAL = frozenset({0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102})
_CORE = _CANONICAL | {0x174, 0x277, 0xC000_0081, 0xC000_0084, 0xC000_0103}
#: Read-only identity: platform id, microcode revision, feature control (locked).
_CONSTANT = {0x17: 0, 0x8B: 0, 0x3A: 1}


class VcpuPort:
    """The inline answers of one vCPU; it keeps no state of the guest's."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.vm = vcpu.vm

    # ---- CPUID and TSC -----------------------------------------------------------------------------------------

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self.vm.cpuid.answer(leaf, subleaf, self.vcpu.apic.apic_id)

    def on_rdtsc(self) -> int:
        return self.vcpu.tsc.read(self.vm.read_tsc())

    # ---- MSRs ------------------------------------------------------------------------------------------------------

    def on_rdmsr(self, index: int) -> int | None:
        value = self._read_msr(index)
        if value is None:
            self._unknown(index, 0)
            self.inject(13, 0)
        return value

    def on_wrmsr(self, index: int, value: int) -> bool:
        if self._write_msr(index, value):
            return True
        self._unknown(index, value)
        self.inject(13, 0)
        return False

    def _read_msr(self, index: int) -> int | None:
        vcpu = self.vcpu
        if index == _DEADLINE:
            return vcpu.apic.read_deadline()
        if index in _X2APIC_MSRS:
            return self._apic().msr_read(index, self.vm.clock.now())
        if index == _APIC_BASE:
            return vcpu.apic.apic_base
        if index == _TSC:
            return self.on_rdtsc()
        if index == _TSC_ADJUST:
            return vcpu.tsc.adjust
        if index == _MISC_ENABLE:
            return vcpu.ia32_misc_enable_msr
        if index in _CORE or index == _EFER:
            return vcpu.context.read_msr(index)
        if index in _CONSTANT:
            return _CONSTANT[index]
        return vcpu.pv.read_msr(index)

    def _write_msr(self, index: int, value: int) -> bool:
        vcpu = self.vcpu
        now = self.vm.clock.now()
        if index == _DEADLINE:
            vcpu.apic.write_deadline(value, self._deadline_ns(value), now)
            vcpu.arm_timer()
            return True
        if index in _X2APIC_MSRS:
            effect = self._apic().msr_write(index, value, now)
            if effect is not None:
                self.apply(effect)
            return effect is not None
        if index == _APIC_BASE:
            if not vcpu.apic.set_apic_base(value):
                return False
            self.vm.apic_map_changed()
            return True
        if index == _TSC:
            vcpu.tsc.write(value, self.vm.read_tsc())
            return True
        if index == _TSC_ADJUST:
            vcpu.tsc.write_adjust(value)
            return True
        if index == _MISC_ENABLE:
            vcpu.ia32_misc_enable_msr = value
            return True
        if index == _EFER:
            return self._write_efer(value)
        if index in _CORE:
            if index in _CANONICAL and not _is_canonical(value):
                return False
            vcpu.context.write_msr(index, value)
            return True
        return index in _CONSTANT or self._write_kvm_msr(index, value)

    def _write_kvm_msr(self, index: int, value: int) -> bool:
        """What a store owes is done at once: the guest reads its clock record right after it has registered it."""
        vcpu, vm = self.vcpu, self.vm
        effect = vcpu.pv.write_msr(index, value)
        if effect is None:
            return False
        if effect.wall_clock is not None:
            vm.kvmclock.write_wall_clock(vm.memory, effect.wall_clock, vm.clock.now(), vm.wall_ns())
        if effect.requests:
            for request in effect.requests:
                vcpu.make_request(request)
            vcpu.service_paravirt()
            self.update_irq_window()
        return True

    def _write_efer(self, value: int) -> bool:
        """Reserved bits and a change of LME under paging fault; LMA follows the CPU, not the write."""
        state = self.vcpu.context.state
        old = state.efer
        if value & ~_EFER_MASK or (state.cr0 >> 31 & 1 and (value ^ old) & 0x100):
            return False
        self.vcpu.context.write_msr(_EFER, value & ~0x400 | old & 0x400)
        return True

    def _deadline_ns(self, tsc: int) -> int:
        """When the guest's TSC reaches ``tsc``, in ns of the machine's clock."""
        return self.vm.tsc_to_ns(self.vcpu.tsc.reach(tsc, self.vm.read_tsc()))

    # ---- ports and MMIO --------------------------------------------------------------------------------------------

    def on_in(self, port: int, size: int) -> int:
        vm = self.vm
        self.vcpu.stat.io_exits += 1
        value = vm.ports.read(port, size, vm.clock.now())
        if value is None:
            value = vm.unclaimed_in(self.vcpu, port, size)
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.PIO, self.vcpu.thread.number, port, value)
        return value

    def on_out(self, port: int, size: int, value: int) -> None:
        vm = self.vm
        self.vcpu.stat.io_exits += 1
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.PIO, self.vcpu.thread.number, port | 1 << 16, value)
        if not vm.ports.write(port, size, value, vm.clock.now()):
            vm.unclaimed_out(self.vcpu, port, size, value)

    def on_mmio_read(self, gpa: int, size: int) -> int:
        vm, vcpu = self.vm, self.vcpu
        vcpu.stat.mmio_exits += 1
        apic = vcpu.apic
        offset = gpa - apic.base_address
        if 0 <= offset < _APIC_PAGE and apic.hw_enabled and not apic.x2apic:
            return self._apic().mmio_read(offset, size, vm.clock.now())
        value = vm.mmio.read(gpa, size, vm.clock.now())
        if value is None:
            self._unknown(gpa, 0)
            return (1 << 8 * size) - 1
        return value

    def on_mmio_write(self, gpa: int, size: int, value: int) -> None:
        vm, vcpu = self.vm, self.vcpu
        vcpu.stat.mmio_exits += 1
        apic = vcpu.apic
        offset = gpa - apic.base_address
        if 0 <= offset < _APIC_PAGE and apic.hw_enabled and not apic.x2apic:
            self.apply(self._apic().mmio_write(offset, size, value, vm.clock.now()))
        elif not vm.mmio.write(gpa, size, value, vm.clock.now()):
            self._unknown(gpa, value)

    def _apic(self) -> Lapic:
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
            return self._apic().cr8
        return None

    def on_cr_write(self, register: int, value: int) -> bool:
        if register != 8 or value >> 4:
            self.inject(13, 0)
            return False
        self.apply(self._apic().write_cr8(value))
        return True

    # ---- hypercalls --------------------------------------------------------------------------------------------------

    def on_hypercall(self) -> None:
        vm, vcpu = self.vm, self.vcpu
        vcpu.stat.hypercalls += 1
        state = vcpu.context.state
        gpr = state.gpr
        call = decode_hypercall(gpr[0], gpr[3], gpr[1], gpr[2], gpr[6], long_mode=state.long_mode, cpl=state.cpl)
        result = call.refusal
        if result is None:
            result = self._hypercall(call.number, call.args)
        gpr[0] = result & (_M64 if state.long_mode else 0xFFFF_FFFF)
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.HYPERCALL, vcpu.thread.number, call.number, result & _M64)

    def _hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        """``__kvm_emulate_hypercall``; what touches other vCPUs happens at the slice's own moment on the loop."""
        vm = self.vm
        if number == HypercallNumber.VAPIC_POLL_IRQ:
            return 0
        if number == HypercallNumber.KICK_CPU:
            apic_id = args[1]
            vm.call_at(vm.clock.now(), lambda: vm.pv_kick(self.vcpu, apic_id))
            return 0
        if number == HypercallNumber.SCHED_YIELD:
            apic_id = args[0]
            vm.call_at(vm.clock.now(), lambda: vm.pv_sched_yield(self.vcpu, apic_id))
            return 0
        return vm.hypercall(self.vcpu, number, args)

    # ---- exceptions and interrupts -------------------------------------------------------------------------------------

    def on_exception(self, vector: int, error_code: int | None, address: int) -> None:
        self.inject(vector, error_code, address)

    def on_soft_interrupt(self, vector: int, length: int) -> None:
        vcpu = self.vcpu
        state = vcpu.context.state
        kind = EventKind.SOFT_EXC if length == 1 else EventKind.SOFT_INT
        return_rip = state.rip + length & (_M64 if state.long_mode else 0xFFFF_FFFF)
        self._deliver(vector, kind, return_rip=return_rip)

    def inject(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        """Raise exception ``vector`` at RIP, now."""
        vm, vcpu = self.vm, self.vcpu
        if vector == 14:
            vcpu.context.state.cr2 = address
        vcpu.note(f"#{vector}")
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.FAULT, vcpu.thread.number, vector, vcpu.context.state.rip)
        self._deliver(vector, EventKind.EXCEPTION, error_code=error_code)

    def _deliver(
        self, vector: int, kind: EventKind, *, error_code: int | None = None, return_rip: int | None = None
    ) -> bool:
        """Through the guest's own tables; a triple fault ends the slice. Whether it was delivered."""
        vm, vcpu = self.vm, self.vcpu
        vm.clock.cells[0] += vm.costs.inject_ns
        outcome = deliver_event(
            vcpu.context.state, vm.memory, vector, kind=kind, error_code=error_code, return_rip=return_rip
        )
        if outcome != SHUTDOWN:
            return True
        vcpu.note("triple fault")
        vcpu.make_request(Request.TRIPLE_FAULT)
        vm.engine.leave(Shutdown())
        return False

    def inject_pending(self) -> None:
        """``kvm_check_and_inject_events`` before an entry: NMI, then interrupts, each when the guest can take it."""
        vcpu = self.vcpu
        events = vcpu.events
        while events.any:
            state = vcpu.context.state
            event = events.select(interrupt_flag=False, shadow=state.interrupt_shadow)
            if event is None:
                break
            if event.kind is EventKind.NMI:
                vcpu.stat.nmi_injections += 1
            delivered = self._deliver(event.vector, event.kind, error_code=event.error_code)
            events.delivered()
            if not delivered:
                return
        self.on_irq_window()

    def on_irq_window(self) -> None:
        """The guest may be able to take an interrupt: give it the first, and ask again for the next."""
        vcpu = self.vcpu
        if vcpu.pv.eoi.pending:
            vcpu.harvest_eoi()
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
        """ExtINT before the LAPIC (the sheet *lapic* §2)."""
        vm, vcpu = self.vm, self.vcpu
        vector = vm.pic_vector(vcpu) if vm.pic_pending(vcpu) else vcpu.apic.acknowledge()
        vcpu.stat.irq_injections += 1
        if vm.trace.on:
            vm.trace.emit(vm.clock.now(), Kind.INJECT, vcpu.thread.number, vector, 0)
        self._deliver(vector, EventKind.EXTERNAL)

    # ---- leaving -----------------------------------------------------------------------------------------------------

    def on_hlt(self) -> None:
        """Leave, unless something is pending that HLT would only be woken by: then it is over at once."""
        vcpu = self.vcpu
        interrupts_enabled = bool(vcpu.context.state.rflags & _IF)
        vcpu.note("hlt")
        self.vm.engine.leave(Hlt(interrupts_enabled))

    def on_pause_loop(self) -> None:
        self.vm.engine.leave(PauseLoop(kernel_mode=self.vcpu.context.state.cpl == 0))


def _is_canonical(address: int) -> bool:
    """Bits 63:47 are equal (48-bit linear addresses)."""
    return address >> 47 in (0, 0x1_FFFF)
