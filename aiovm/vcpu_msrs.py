"""RDMSR and WRMSR of one vCPU: who holds an MSR, and what a store to it owes (SDM vol. 4; ``arch/x86/kvm/x86.c``).

Tables say who answers an MSR; the x2APIC's are a range, KVM's are :mod:`aiovm.paravirt`'s, and the others do not exist.
The embedding program's stores (``host_initiated``) are loads of state: IA32_TSC leaves TSC_ADJUST alone, IA32_APIC_BASE
may change its mode at will, IA32_SMBASE exists outside SMM too.

IA32_ARCH_CAPABILITIES says what this CPU is not susceptible to (kvm_get_arch_capabilities): all that comes of
speculation, of which there is none. For the same reason IA32_SPEC_CTRL is kept and IA32_PRED_CMD taken, to no effect.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from aiovm.control import write_efer
from aiovm.page_walk import is_canonical

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.vcpu import Vcpu

__all__ = ["VcpuMsrs"]

_X2APIC: Final = range(0x800, 0x900)
_TSC, _APIC_BASE, _TSC_ADJUST, _MISC_ENABLE, _DEADLINE, _EFER = 0x10, 0x1B, 0x3B, 0x1A0, 0x6E0, 0xC000_0080
_SMBASE, _PAT, _TSC_AUX = 0x9E, 0x277, 0xC000_0103
_SPEC_CTRL, _PRED_CMD, _ARCH_CAPABILITIES = 0x48, 0x49, 0x10A
#: IBRS, STIBP and BHI_DIS_S; IBPB.
_SPEC_CTRL_BITS, _PRED_CMD_BITS = 0x403, 0x1
#: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO,
#: BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
_NOT_SUSCEPTIBLE: Final = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62))
#: Memory types of the PAT (SDM vol. 3A, 12.12.2).
_MEMORY_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
#: Read-only identity: platform id, microcode revision, feature control (locked), no machine-check banks and no status.
_CONSTANT: Final = {0x17: 0, 0x8B: 0, 0x3A: 1, 0x179: 0, 0x17A: 0}


def _is_pat(value: int) -> bool:
    return all(byte in _MEMORY_TYPES for byte in value.to_bytes(8, "little"))


#: MSRs inside the core: those that take canonical addresses only (SDM vol. 4, table 2-2), those that take anything.
_ADDRESSES: Final = (0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102)
_ANY: Final = (0x174, 0xC000_0081, 0xC000_0084)


class VcpuMsrs:
    """One vCPU's MSRs; it keeps no state of the guest's."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._vm = vcpu.vm
        apic, context = vcpu.apic, vcpu.context
        self._readers: dict[int, Callable[[], int]] = {
            _DEADLINE: apic.read_deadline,
            _APIC_BASE: lambda: apic.apic_base,
            _TSC: self.read_tsc,
            _TSC_ADJUST: lambda: vcpu.tsc.adjust,
            _MISC_ENABLE: lambda: vcpu.ia32_misc_enable_msr,
            _SPEC_CTRL: lambda: vcpu.spec_ctrl,
            _ARCH_CAPABILITIES: lambda: _NOT_SUSCEPTIBLE,
        }
        #: Called with the value and ``host_initiated``; False is #GP.
        self._writers: dict[int, Callable[[int, bool], bool]] = {
            _DEADLINE: self._write_deadline,
            _APIC_BASE: self._write_apic_base,
            _TSC: self._write_tsc,
            _TSC_ADJUST: self._write_tsc_adjust,
            _MISC_ENABLE: self._write_misc_enable,
            _SPEC_CTRL: self._write_spec_ctrl,
            _PRED_CMD: lambda value, _: not value & ~_PRED_CMD_BITS,
            _SMBASE: self._write_smbase,
            _EFER: lambda value, _: write_efer(context.state, value),
        }
        for index in (*_ADDRESSES, *_ANY, _PAT, _TSC_AUX, _EFER):
            self._readers[index] = partial(context.read_msr, index)
        self._writers |= {index: self._core_writer(index, is_canonical) for index in _ADDRESSES}
        self._writers |= {index: self._core_writer(index, lambda _: True) for index in _ANY}
        self._writers[_PAT] = self._core_writer(_PAT, _is_pat)
        self._writers[_TSC_AUX] = self._core_writer(_TSC_AUX, lambda value: not value >> 32)
        for index, value in _CONSTANT.items():
            self._readers[index] = partial(_constant, value)
            self._writers[index] = _ignore

    def read(self, index: int, *, host_initiated: bool = False) -> int | None:
        """RDMSR, or the embedding program's look; None is #GP."""
        reader = self._readers.get(index)
        if reader is not None:
            return reader()
        vcpu = self._vcpu
        if index in _X2APIC:
            return vcpu.port.up_to_date_apic().msr_read(index, self._vm.clock.now())
        if index == _SMBASE:
            return vcpu.smbase if vcpu.events.s.smm or host_initiated else None
        return vcpu.pv.read_msr(index)

    def write(self, index: int, value: int, *, host_initiated: bool = False) -> bool:
        """WRMSR, or the embedding program's store; False is #GP."""
        writer = self._writers.get(index)
        if writer is not None:
            return writer(value, host_initiated)
        if index in _X2APIC:
            port = self._vcpu.port
            effect = port.up_to_date_apic().msr_write(index, value, self._vm.clock.now())
            if effect is not None:
                port.apply(effect)
            return effect is not None
        return self._write_kvm(index, value, host_initiated=host_initiated)

    # ---- time and the local APIC -------------------------------------------------------------------------------------

    def read_tsc(self) -> int:
        """The guest's TSC."""
        return self._vcpu.tsc.read(self._vm.read_tsc())

    def _write_deadline(self, value: int, _host_initiated: bool) -> bool:
        vcpu, vm = self._vcpu, self._vm
        deadline_ns = vm.tsc_to_ns(vcpu.tsc.reach(value, vm.read_tsc()))
        vcpu.apic.write_deadline(value, deadline_ns, vm.clock.now())
        vcpu.arm_timer()
        return True

    def _write_apic_base(self, value: int, host_initiated: bool) -> bool:
        if not self._vcpu.apic.set_apic_base(value, host_initiated=host_initiated):
            return False
        self._vm.apic_map_changed()
        return True

    def _write_tsc(self, value: int, host_initiated: bool) -> bool:
        tsc = self._vcpu.tsc
        (tsc.host_write if host_initiated else tsc.write)(value, self._vm.read_tsc())
        return True

    def _write_tsc_adjust(self, value: int, host_initiated: bool) -> bool:
        self._vcpu.tsc.write_adjust(value, host_initiated=host_initiated)
        return True

    # ---- plain registers ---------------------------------------------------------------------------------------------

    def _core_writer(self, index: int, takes: Callable[[int], bool]) -> Callable[[int, bool], bool]:
        store = self._vcpu.context.msr_writer(index)

        def write(value: int, _host_initiated: bool) -> bool:
            if not takes(value):
                return False
            store(value)
            return True

        return write

    def _write_misc_enable(self, value: int, _host_initiated: bool) -> bool:
        self._vcpu.ia32_misc_enable_msr = value
        return True

    def _write_spec_ctrl(self, value: int, _host_initiated: bool) -> bool:
        if value & ~_SPEC_CTRL_BITS:
            return False
        self._vcpu.spec_ctrl = value
        return True

    def _write_smbase(self, value: int, host_initiated: bool) -> bool:
        if not host_initiated or value >> 32:
            return False
        self._vcpu.smbase = value
        return True

    # ---- KVM's -------------------------------------------------------------------------------------------------------

    def _write_kvm(self, index: int, value: int, *, host_initiated: bool) -> bool:
        """What a store owes is done at once: the guest reads its clock record right after it has registered it."""
        vcpu, vm = self._vcpu, self._vm
        effect = vcpu.pv.write_msr(index, value, host_initiated=host_initiated)
        if effect is None:
            return False
        if effect.wall_clock is not None:
            vm.kvmclock.write_wall_clock(vm.memory, effect.wall_clock, vm.clock.now(), vm.wall_ns())
        if effect.requests:
            for request in effect.requests:
                vcpu.make_request(request)
            vcpu.service_paravirt()
            vcpu.port.update_irq_window()
        return True


def _constant(value: int) -> int:
    return value


def _ignore(_value: int, _host_initiated: bool) -> bool:
    return True
