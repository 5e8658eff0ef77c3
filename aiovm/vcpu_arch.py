"""``struct kvm_vcpu_arch`` by KVM's names: what a reader of KVM looks for, and where it is here.

A view: nothing is stored in it. Each name answers from the one place that owns the state: the engine's registers, the
local APIC, the event queue, the paravirtual records. docs/kvm-map.md has a row for each, with its test.

Rules, where an emulated CPU differs from hardware:

* ``regs`` stand in the core's own memory, so all are current but RFLAGS, whose condition codes the core computes only
  when somebody asks: ``regs_avail`` and ``regs_dirty`` say so, in KVM's bit numbers. An entry folds what is dirty.
* The guest owns no bit of CR0 and CR4: the core's intercept is of the whole store, so every store is seen, as it must
  be to check reserved bits. Loads are the guest's own.
* ``cr8`` is the local APIC's TPR, which always exists.

Source: ``arch/x86/include/asm/kvm_host.h``, ``kvm_cache_regs.h`` (Linux 4.6; ``hflags`` as in 6.16).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from aiovm.mmu import Mmu, VcpuMmu
from aiovm.page_walk import PagingRegs

if TYPE_CHECKING:
    from aiovm.lapic import Lapic
    from aiovm.memory import GuestPtr
    from aiovm.pvclock import PvclockRecord
    from aiovm.vcpu import MpState, Vcpu

__all__ = ["HFlag", "VcpuArch"]

#: The 4.6 cr0 and cr4 bits that a guest may change without an exit: none; see the module's text.
_GUEST_OWNED: Final = 0


class HFlag(enum.IntFlag):
    """``HF_*_MASK`` (Linux 6.16). Nested guests do not run, so GUEST is never set."""

    NONE = 0
    GUEST = 1
    SMM = 2
    SMM_INSIDE_NMI = 4


class VcpuArch:
    """The x86 part of one vCPU, to look at; registers are changed through ``vcpu.context.state``."""

    __slots__ = ("_mmus", "_vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._mmus = VcpuMmu(vcpu.vm.memory, lambda: PagingRegs.of(vcpu.context.state))

    # ---- registers -------------------------------------------------------------------------------------------------

    @property
    def regs(self) -> tuple[int, ...]:
        """RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15, RIP."""
        state = self._vcpu.context.state
        return (*(state.gpr[index] for index in range(16)), state.rip)

    @property
    def regs_avail(self) -> int:
        """A bit for each of ``regs``, then PDPTR 17, CR3 18, RFLAGS 19, SEGMENTS 20: current in our copy."""
        return self._vcpu.context.state.regs_avail

    @property
    def regs_dirty(self) -> int:
        """The same bits: to be handed to the core before the guest runs."""
        return self._vcpu.context.state.regs_dirty

    @property
    def cr0(self) -> int:
        return self._vcpu.context.state.cr0

    @property
    def cr0_guest_owned_bits(self) -> int:
        return _GUEST_OWNED

    @property
    def cr2(self) -> int:
        return self._vcpu.context.state.cr2

    @property
    def cr3(self) -> int:
        return self._vcpu.context.state.cr3

    @property
    def cr4(self) -> int:
        return self._vcpu.context.state.cr4

    @property
    def cr4_guest_owned_bits(self) -> int:
        return _GUEST_OWNED

    @property
    def cr8(self) -> int:
        return self._vcpu.apic.cr8

    @property
    def hflags(self) -> HFlag:
        events = self._vcpu.events.s
        inside = HFlag.SMM_INSIDE_NMI if events.smm_inside_nmi else HFlag.NONE
        return HFlag.SMM | inside if events.smm else HFlag.NONE

    @property
    def efer(self) -> int:
        return self._vcpu.context.state.efer

    @property
    def ia32_misc_enable_msr(self) -> int:
        return self._vcpu.ia32_misc_enable_msr

    @property
    def ia32_xss(self) -> int:
        """0: there is no XSAVES, and the MSR faults."""
        return 0

    # ---- local APIC --------------------------------------------------------------------------------------------------

    @property
    def apic(self) -> Lapic:
        return self._vcpu.apic

    @property
    def apic_base(self) -> int:
        return self._vcpu.apic.apic_base

    @property
    def apic_attention(self) -> int:
        """Bit 1: the guest may have ended an interrupt in memory (KVM_APIC_PV_EOI_PENDING)."""
        return int(self._vcpu.pv.eoi.pending) << 1

    @property
    def apic_arb_prio(self) -> int:
        """Lowest-priority interrupts accepted since the APIC was reset."""
        return self._vcpu.apic.state.arb_prio

    @property
    def tpr_access_reporting(self) -> bool:
        return self._vcpu.tpr_access_reporting

    @property
    def mp_state(self) -> MpState:
        return self._vcpu.mp_state

    # ---- paging ------------------------------------------------------------------------------------------------------

    @property
    def mmus(self) -> VcpuMmu:
        """The three contexts, to enter and leave a nested one."""
        return self._mmus

    @property
    def mmu(self) -> Mmu:
        """Handles faults."""
        return self._mmus.mmu

    @property
    def nested_mmu(self) -> Mmu | None:
        """Walks a nested guest's own tables; None outside one."""
        return self._mmus.nested_mmu

    @property
    def walk_mmu(self) -> Mmu:
        """Where linear addresses lead now: ``mmu`` or ``nested_mmu``."""
        return self._mmus.walk_mmu

    # ---- the paravirtual clock -----------------------------------------------------------------------------------

    @property
    def time(self) -> int:
        """The system time MSR as it was stored."""
        return self._vcpu.pv.clock.read_msr()

    @property
    def hv_clock(self) -> PvclockRecord:
        return self._vcpu.pv.clock.save().hv_clock

    @property
    def hw_tsc_khz(self) -> int:
        return self._vcpu.pv.clock.save().hw_tsc_khz

    @property
    def pv_time(self) -> GuestPtr | None:
        return self._vcpu.pv.clock.pv_time

    @property
    def pv_time_enabled(self) -> bool:
        return self._vcpu.pv.clock.enabled

    @property
    def pvclock_set_guest_stopped_request(self) -> bool:
        return self._vcpu.pv.clock.save().pvclock_set_guest_stopped_request
