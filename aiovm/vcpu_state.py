"""KVM's calls on one vCPU that get and set its state, by KVM's names: ``vcpu.get_regs()``, ``vcpu.set_sregs(...)``.

For embedding programs: debuggers, loaders, migration from a real KVM. A whole machine is saved by
:mod:`aiovm.snapshot`, which keeps more than these structures can say.

Rules (``arch/x86/kvm/x86.c`` of Linux 6.16):

* Between slices only: the vCPU is outside the guest. While it is inside, its registers are those of a moment that the
  others have not reached yet, so the call is refused.
* A get changes nothing that the guest could see. A set is checked first, and then done as a whole or not at all.
* ``set_regs`` drops a pending exception; ``set_vcpu_events`` takes the parts whose flag is set; both look for events
  to deliver at the next entry, as do ``set_lapic`` and ``set_mp_state``.
* ``set_msrs`` is the host's store: TSC and TSC_ADJUST do not move each other, IA32_APIC_BASE may go any way, SMBASE is
  open outside SMM.

Differences: the shadow of STI and of MOV-SS are one to this CPU (as on AMD's), reported as both. Padding, and
``kvm_sregs2``'s PDPTRs, which a walk reads from memory, do not exist.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from aiovm.control import refuse_paging
from aiovm.cpuid import PKRU_STATE, XCR0_STATES
from aiovm.engine.base import DescriptorTable, Reg, Seg, Segment
from aiovm.errors import ConfigError, StateError
from aiovm.kvm_structs import (
    EventsFlag,
    KvmDebugregs,
    KvmDtable,
    KvmFpu,
    KvmRegs,
    KvmSegment,
    KvmSregs,
    KvmVcpuEvents,
    KvmXcrs,
    KvmXsave,
    MpState,
)
from aiovm.paravirt.msrs import PvMsr
from aiovm.requests import Request, VcpuMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiovm.engine.base import Context
    from aiovm.events import EventQueue
    from aiovm.lapic import Lapic
    from aiovm.machine import Machine
    from aiovm.paravirt import Paravirt
    from aiovm.port import VcpuPort
    from aiovm.vcpu_msrs import VcpuMsrs

__all__ = ["MSR_INDEX_LIST", "VcpuIoctls"]

#: KVM_GET_MSR_INDEX_LIST: what a saved machine must bring back. In this order: EFER and the base before what depends.
MSR_INDEX_LIST: Final[tuple[int, ...]] = (
    0x1B, 0xC000_0080, 0x174, 0x175, 0x176, 0x277, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0100,
    0xC000_0101, 0xC000_0102, 0xC000_0103, 0x9E, 0x1A0, 0x10, 0x3B, 0x6E0,
    PvMsr.SYSTEM_TIME_NEW, PvMsr.ASYNC_PF_INT, PvMsr.ASYNC_PF_EN, PvMsr.STEAL_TIME, PvMsr.PV_EOI_EN,
    PvMsr.POLL_CONTROL,
)  # fmt: skip

_GPRS: Final = (
    Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX, Reg.RSI, Reg.RDI, Reg.RSP, Reg.RBP,
    Reg.R8, Reg.R9, Reg.R10, Reg.R11, Reg.R12, Reg.R13, Reg.R14, Reg.R15,
)  # fmt: skip
#: ``kvm_sregs``'s order.
_SEGMENTS: Final = (Seg.CS, Seg.DS, Seg.ES, Seg.FS, Seg.GS, Seg.SS, Seg.TR, Seg.LDTR)
#: ID VIP VIF AC VM RF NT IOPL OF DF IF TF SF ZF AF PF CF, and bit 1.
_RFLAGS: Final = 0x3F_7FD7
#: STI and MOV-SS.
_SHADOW: Final = 3
_ALL_EVENTS: Final = 0x3F


class VcpuIoctls:
    """What :class:`aiovm.vcpu.Vcpu` inherits."""

    vm: Machine
    index: int
    mode: VcpuMode
    context: Context
    events: EventQueue
    apic: Lapic
    port: VcpuPort
    pv: Paravirt
    mp_state: MpState

    if TYPE_CHECKING:

        @property
        def msrs(self) -> VcpuMsrs: ...
        def make_request(self, request: Request) -> None: ...
        def kick(self, source: int = -1) -> None: ...
        def arm_timer(self) -> None: ...
        def update_debug(self) -> None: ...
        def sync_nmi_mask(self) -> None: ...
        def _set_mp_state(self, state: MpState) -> None: ...

    def _between_slices(self, call: str) -> None:
        if self.mode is not VcpuMode.OUTSIDE or self.vm.slice_runs:
            raise StateError(f"{call}: vCPU {self.index} is in the guest; pause the machine first")

    def _look_for_events(self) -> None:
        self.make_request(Request.EVENT)
        self.kick()

    # ---- registers -------------------------------------------------------------------------------------------------

    def get_regs(self) -> KvmRegs:
        """KVM_GET_REGS."""
        self._between_slices("get_regs")
        state = self.context.state
        gprs = {register.name.lower(): state.gpr[register] for register in _GPRS}
        return KvmRegs(**gprs, rip=state.rip, rflags=state.rflags)

    def set_regs(self, regs: KvmRegs) -> None:
        """KVM_SET_REGS."""
        self._between_slices("set_regs")
        if regs.rflags & ~_RFLAGS:
            raise ConfigError(f"KvmRegs.rflags: {regs.rflags:#x} has reserved bits (EINVAL)")
        state = self.context.state
        for register, value in zip(_GPRS, regs.gprs, strict=True):
            state.gpr[register] = value
        state.rip = regs.rip
        state.rflags = regs.rflags | 2
        self.events.drop_exception()
        self._look_for_events()

    def get_sregs(self) -> KvmSregs:
        """KVM_GET_SREGS."""
        self._between_slices("get_sregs")
        state = self.context.state
        gdt, idt = state.gdt, state.idt
        cs, ds, es, fs, gs, ss, tr, ldt = (_to_kvm(state.segment(which)) for which in _SEGMENTS)
        return KvmSregs(
            cs=cs,
            ds=ds,
            es=es,
            fs=fs,
            gs=gs,
            ss=replace(ss, dpl=state.cpl),  # it carries the privilege level, as on AMD's processors
            tr=tr,
            ldt=ldt,
            gdt=KvmDtable(gdt.base, gdt.limit),
            idt=KvmDtable(idt.base, idt.limit),
            cr0=state.cr0,
            cr2=state.cr2,
            cr3=state.cr3,
            cr4=state.cr4,
            cr8=self.apic.cr8,
            efer=state.efer,
            apic_base=self.apic.apic_base,
            interrupt_bitmap=_to_bitmap(self.events.s.interrupt_nr) if self.events.s.interrupt_injected else (0,) * 4,
        )

    def set_sregs(self, sregs: KvmSregs) -> None:
        """KVM_SET_SREGS."""
        self._between_slices("set_sregs")
        wrong = refuse_paging(cr0=sregs.cr0, cr3=sregs.cr3, cr4=sregs.cr4, efer=sregs.efer, long_cs=bool(sregs.cs.l))
        if wrong or sregs.cr8 > 15:
            raise ConfigError(f"KvmSregs: {wrong or f'cr8 {sregs.cr8:#x} is above 15'} (EINVAL)")
        if not self.apic.set_apic_base(sregs.apic_base, host_initiated=True):
            raise ConfigError(f"KvmSregs.apic_base: {sregs.apic_base:#x} is no base address (EINVAL)")
        self.vm.apic_map_changed()
        state = self.context.state
        state.efer, state.cr0, state.cr4, state.cr3, state.cr2 = (
            sregs.efer, sregs.cr0, sregs.cr4, sregs.cr3, sregs.cr2,
        )  # fmt: skip
        for which, segment in zip(_SEGMENTS, sregs.segments, strict=True):
            state.set_segment(which, _from_kvm(segment))
        state.gdt = DescriptorTable(sregs.gdt.base, sregs.gdt.limit)
        state.idt = DescriptorTable(sregs.idt.base, sregs.idt.limit)
        self.apic.write_cr8(sregs.cr8)
        vector = next((n for n in range(256) if sregs.interrupt_bitmap[n >> 6] >> (n & 63) & 1), None)
        if vector is not None:
            self.events.queue_interrupt(vector)
        cs = sregs.cs
        if (
            self.apic.is_bsp
            and (cs.selector, cs.base, state.rip) == (0xF000, 0xFFFF_0000, 0xFFF0)
            and not state.cr0 & 1
        ):
            self._set_mp_state(MpState.RUNNABLE)
        self._look_for_events()

    def get_fpu(self) -> KvmFpu:
        """KVM_GET_FPU."""
        self._between_slices("get_fpu")
        return self.context.get_fpu()

    def set_fpu(self, fpu: KvmFpu) -> None:
        """KVM_SET_FPU."""
        self._between_slices("set_fpu")
        self.context.set_fpu(fpu)

    def get_xcrs(self) -> KvmXcrs:
        """KVM_GET_XCRS."""
        self._between_slices("get_xcrs")
        return KvmXcrs(self.context.state.xcr0)

    def set_xcrs(self, xcrs: KvmXcrs) -> None:
        """KVM_SET_XCRS: x87, SSE and PKRU are what there is (``__kvm_set_xcr``)."""
        self._between_slices("set_xcrs")
        if not xcrs.xcr0 & 1 or xcrs.xcr0 & ~XCR0_STATES:
            raise ConfigError(f"KvmXcrs.xcr0: {xcrs.xcr0:#x} has states that CPUID does not offer, or not x87 (EINVAL)")
        self.context.state.xcr0 = xcrs.xcr0

    def get_xsave(self) -> KvmXsave:
        """KVM_GET_XSAVE: every state, in use or not."""
        fpu = self.get_fpu()
        registers = {field.name: getattr(fpu, field.name) for field in fields(fpu)}
        return KvmXsave(**registers, xstate_bv=XCR0_STATES, pkru=self.context.state.pkru)

    def set_xsave(self, xsave: KvmXsave) -> None:
        """KVM_SET_XSAVE (``fpu_copy_uabi_to_guest_fpstate``, ``validate_user_xstate_header``)."""
        if xsave.xstate_bv & ~XCR0_STATES or xsave.xcomp_bv or any(xsave.reserved):
            raise ConfigError(
                f"KvmXsave: the header has states that CPUID does not offer, or compaction (EINVAL): xstate_bv "
                f"{xsave.xstate_bv:#x}, xcomp_bv {xsave.xcomp_bv:#x}, reserved {xsave.reserved}"
            )
        has = xsave.xstate_bv
        taken = ["fpr", "fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp"] if has & 1 else []
        taken += ["xmm"] if has & 2 else []
        taken += ["mxcsr"] if has & 3 else []
        self.set_fpu(KvmFpu(**{name: getattr(xsave, name) for name in taken}))
        self.context.state.pkru = xsave.pkru if has & PKRU_STATE else 0

    def get_debugregs(self) -> KvmDebugregs:
        """KVM_GET_DEBUGREGS."""
        self._between_slices("get_debugregs")
        get = self.context.state.get_dr
        return KvmDebugregs((get(0), get(1), get(2), get(3)), get(6), get(7))

    def set_debugregs(self, registers: KvmDebugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._between_slices("set_debugregs")
        if registers.flags or registers.dr6 >> 32 or registers.dr7 >> 32:
            raise ConfigError(f"{registers}: flags are 0, dr6 and dr7 32 bits (EINVAL)")
        state = self.context.state
        for index, value in enumerate((*registers.db, None, None, registers.dr6, registers.dr7)):
            if value is not None:
                state.set_dr(index, value)
        self.update_debug()

    # ---- events and mp_state -----------------------------------------------------------------------------------------

    def get_vcpu_events(self) -> KvmVcpuEvents:
        """KVM_GET_VCPU_EVENTS."""
        self._between_slices("get_vcpu_events")
        self.sync_nmi_mask()
        s = self.events.save()
        return KvmVcpuEvents(
            exception_injected=s.exception_injected,
            exception_nr=s.exception_nr,
            exception_has_error_code=s.exception_has_error_code,
            exception_pending=s.exception_pending,
            exception_error_code=s.exception_error_code,
            interrupt_injected=s.interrupt_injected and not s.interrupt_soft,
            interrupt_nr=s.interrupt_nr,
            interrupt_shadow=_SHADOW if self.context.state.interrupt_shadow else 0,
            nmi_injected=s.nmi_injected,
            nmi_pending=s.nmi_pending,
            nmi_masked=s.nmi_masked,
            flags=EventsFlag(_ALL_EVENTS & ~EventsFlag.SIPI_VECTOR),
            smi_smm=s.smm,
            smi_pending=s.smi_pending,
            smi_smm_inside_nmi=s.smm_inside_nmi,
            smi_latched_init=self.apic.state.init_pending,
            triple_fault_pending=s.triple_fault,
        )

    def set_vcpu_events(self, events: KvmVcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._between_slices("set_vcpu_events")
        flags = events.flags
        if flags & ~_ALL_EVENTS:
            raise ConfigError(f"KvmVcpuEvents.flags: {flags:#x} has unknown bits (EINVAL)")
        excepting = events.exception_injected or (events.exception_pending and flags & EventsFlag.PAYLOAD)
        if excepting and (events.exception_nr > 31 or events.exception_nr == 2):
            raise ConfigError(f"KvmVcpuEvents.exception_nr: {events.exception_nr} is no exception (EINVAL)")
        smi = flags & EventsFlag.SMM and (events.smi_smm or events.smi_pending)
        if smi and self.mp_state is MpState.INIT_RECEIVED:
            raise ConfigError("KvmVcpuEvents: no SMI reaches a vCPU that waits for its SIPI (EINVAL)")
        s = self.events.save()
        s.exception_injected = bool(events.exception_injected)
        s.exception_pending = bool(events.exception_pending and flags & EventsFlag.PAYLOAD)
        s.exception_nr = events.exception_nr
        s.exception_has_error_code = bool(events.exception_has_error_code)
        s.exception_error_code = events.exception_error_code
        s.interrupt_injected, s.interrupt_nr = bool(events.interrupt_injected), events.interrupt_nr
        s.interrupt_soft = bool(events.interrupt_soft)
        s.nmi_injected, s.nmi_masked = bool(events.nmi_injected), bool(events.nmi_masked)
        if flags & EventsFlag.NMI_PENDING:
            s.nmi_pending = events.nmi_pending
        state = self.context.state
        if flags & EventsFlag.SHADOW:
            state.interrupt_shadow = bool(events.interrupt_shadow)
        if flags & EventsFlag.SMM:
            s.smm, s.smm_inside_nmi = bool(events.smi_smm), bool(events.smi_smm_inside_nmi)
            s.smi_pending = bool(events.smi_pending)
            self.apic.latch_init(bool(events.smi_latched_init))
        if flags & EventsFlag.SIPI_VECTOR:
            self.apic.state.sipi_vector = events.sipi_vector & 0xFF
        if flags & EventsFlag.TRIPLE_FAULT and events.triple_fault_pending:
            self.make_request(Request.TRIPLE_FAULT)
        self.events.restore(s)
        state.nmi_masked = s.nmi_masked
        self._look_for_events()

    def get_mp_state(self) -> MpState:
        """KVM_GET_MP_STATE."""
        return self.mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        self._between_slices("set_mp_state")
        try:
            wanted = MpState(state)
        except ValueError:
            raise ConfigError(f"mp_state {state} does not exist (EINVAL)") from None
        if self.events.s.smm and wanted in (MpState.INIT_RECEIVED, MpState.SIPI_RECEIVED):
            raise ConfigError(f"mp_state {wanted.name} in SMM (EINVAL)")
        if wanted is MpState.SIPI_RECEIVED:  # KVM's: an INIT has been taken, and the SIPI is on its way
            self._set_mp_state(MpState.INIT_RECEIVED)
            self.apic.state.sipi_pending = True
        else:
            self._set_mp_state(wanted)
        self._look_for_events()

    # ---- local APIC and MSRs -----------------------------------------------------------------------------------------

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: the register page's first 1 KiB."""
        self._between_slices("get_lapic")
        return self.apic.to_page(self.vm.clock.now())

    def set_lapic(self, page: bytes) -> None:
        """KVM_SET_LAPIC."""
        self._between_slices("set_lapic")
        if not self.apic.from_page(page, self.vm.clock.now()):
            raise ConfigError(f"set_lapic: an x2APIC's id is vCPU {self.index}'s own (EINVAL)")
        self.arm_timer()
        self.vm.apic_map_changed()
        self._look_for_events()

    def get_msrs(self, indices: Iterable[int] = MSR_INDEX_LIST) -> dict[int, int]:
        """KVM_GET_MSRS: the values of these MSRs, of all that a saved machine needs by default."""
        self._between_slices("get_msrs")
        found = {}
        for index in indices:
            value = self.msrs.read(index, host_initiated=True)
            if value is None:
                raise ConfigError(f"MSR {index:#x} does not exist or cannot be read now")
            found[index] = value
        return found

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS: the host's stores, in this order. One that is refused ends them; those before it are done."""
        self._between_slices("set_msrs")
        for index, value in values.items():
            if not 0 <= value < 1 << 64 or not self.msrs.write(index, value, host_initiated=True):
                raise ConfigError(f"MSR {index:#x} does not take {value:#x}")

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: the guest will read that it was stopped, and forgive its watchdogs."""
        self.pv.clock.ctrl()
        self.make_request(Request.CLOCK_UPDATE)


def _to_kvm(segment: Segment) -> KvmSegment:
    flags = segment.flags
    return KvmSegment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        type=flags >> 8 & 0xF,
        present=flags >> 15 & 1,
        dpl=flags >> 13 & 3,
        db=flags >> 22 & 1,
        s=flags >> 12 & 1,
        l=flags >> 21 & 1,
        g=flags >> 23 & 1,
        avl=flags >> 20 & 1,
        unusable=~flags >> 15 & 1,
    )


def _from_kvm(s: KvmSegment) -> Segment:
    present = s.present and not s.unusable
    flags = s.type << 8 | s.s << 12 | s.dpl << 13 | present << 15 | s.avl << 20 | s.l << 21 | s.db << 22 | s.g << 23
    return Segment(s.selector, s.base, s.limit, flags)


def _to_bitmap(vector: int) -> tuple[int, ...]:
    return tuple(1 << (vector & 63) if vector >> 6 == word else 0 for word in range(4))
