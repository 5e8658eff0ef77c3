"""Control and debug registers: what a guest may store, and what follows (SDM vol. 3A, 2.5 and 4.1.2; vol. 3B, 18.2).

Each function checks a store and carries it out on the registers, or answers the fault. The rules are KVM's
(``arch/x86/kvm/x86.c`` of Linux 6.16: kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, kvm_set_dr, set_efer):

* CR0: NW without CD, PG without PE, and bits above 31 fault; other reserved bits are dropped, ET reads 1. Turning
  PG on with EFER.LME needs CR4.PAE and no 64-bit CS, and sets LMA; 64-bit code cannot turn it off.
* CR3: bits above MAXPHYADDR fault in long mode. Under PAE the four PDPTEs must be valid, else #GP(0) and CR3 stays.
* CR4: bits that CPUID does not offer fault; so does clearing PAE in long mode.
* DR4 and DR5 are DR6 and DR7, or #UD with CR4.DE. With DR7.GD every access raises #DB with DR6.BD.

Not modelled: PCID, LA57, CET and protected-mode virtual interrupts, which this CPU does not offer. A walk reads the
PDPTEs from memory again, as AMD's processors do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import Seg
from aiovm.page_walk import load_pdptrs
from aiovm.segmentation import Fault

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = ["MAXPHYADDR", "read_dr", "refuse_paging", "write_cr0", "write_cr3", "write_cr4", "write_dr", "write_efer"]

#: CPUID.80000008H:EAX bits 7:0.
MAXPHYADDR: Final = 40

_CR0_DEFINED: Final = 0xE005_003F  # PG CD NW AM WP NE ET TS EM MP PE
_PE, _ET, _WP, _NW, _CD, _PG = 1, 1 << 4, 1 << 16, 1 << 29, 1 << 30, 1 << 31
_PSE, _PAE, _PGE, _DE, _UMIP, _SMEP = 1 << 4, 1 << 5, 1 << 7, 1 << 3, 1 << 11, 1 << 20
_OSXSAVE, _SMAP, _PKE = 1 << 18, 1 << 21, 1 << 22
#: VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT, which KVM always allows; OSXSAVE; and UMIP, FSGSBASE, SMEP,
#: SMAP and PKE of CPUID.7.
_CR4_ALLOWED: Final = 0x7FF | _UMIP | 1 << 16 | _OSXSAVE | _SMEP | _SMAP | _PKE
_SCE, _LME, _LMA, _NXE = 1, 1 << 8, 1 << 10, 1 << 11
_DR6_FIXED, _DR6_WRITABLE = 0xFFFF_0FF0, 0xE00F
_DR7_FIXED, _DR7_WRITABLE = 0x400, 0xFFFF_2BFF
_DR6_BD, _DR7_GD = 1 << 13, 1 << 13
_M32: Final = 0xFFFF_FFFF
_REFUSED: Final = Fault(13, 0)


def write_cr0(cpu: CpuState, memory: GuestMemory, value: int) -> Fault | None:
    """MOV to CR0, LMSW and CLTS with the whole new value."""
    if value >> 32 or (value & _NW and not value & _CD) or (value & _PG and not value & _PE):
        return _REFUSED
    old = cpu.cr0
    value = value & _CR0_DEFINED | _ET
    efer = cpu.efer
    if value & _PG:
        if efer & _LME:
            if not old & _PG and (not cpu.cr4 & _PAE or cpu.segment(Seg.CS).long):
                return _REFUSED
        elif cpu.cr4 & _PAE and (value ^ old) & (_PG | _CD | _NW) and load_pdptrs(memory, cpu.cr3, MAXPHYADDR) is None:
            return _REFUSED
    elif cpu.long_mode:
        return _REFUSED
    if efer & _LME and (value ^ old) & _PG:
        cpu.efer = efer | _LMA if value & _PG else efer & ~_LMA
    cpu.cr0 = value
    return None


def write_cr3(cpu: CpuState, memory: GuestMemory, value: int) -> Fault | None:
    """MOV to CR3. The caller flushes the TLB, also when the value stays the same."""
    if cpu.efer & _LMA:
        if value >> MAXPHYADDR:
            return _REFUSED
    elif cpu.cr0 & _PG and cpu.cr4 & _PAE and load_pdptrs(memory, value, MAXPHYADDR) is None:
        return _REFUSED
    cpu.cr3 = value
    return None


def write_cr4(cpu: CpuState, memory: GuestMemory, value: int) -> Fault | None:
    """MOV to CR4."""
    if value & ~_CR4_ALLOWED:
        return _REFUSED
    if cpu.efer & _LMA:
        if not value & _PAE:
            return _REFUSED
    elif (
        cpu.cr0 & _PG
        and value & _PAE
        and (value ^ cpu.cr4) & (_PSE | _PAE | _PGE | _SMEP)
        and load_pdptrs(memory, cpu.cr3, MAXPHYADDR) is None
    ):
        return _REFUSED
    cpu.cr4 = value
    return None


def write_efer(cpu: CpuState, value: int) -> bool:
    """WRMSR of EFER: SCE, LME and NXE; LMA follows the CPU. LME cannot change under paging."""
    old = cpu.efer
    if value & ~(_SCE | _LME | _LMA | _NXE) or (cpu.cr0 & _PG and (value ^ old) & _LME):
        return False
    cpu.efer = value & ~_LMA | old & _LMA
    return True


def refuse_paging(*, cr0: int, cr3: int, cr4: int, efer: int, long_cs: bool) -> str:
    """What is wrong with a whole state that the embedding program loads; nothing: "" (``kvm_is_valid_sregs``)."""
    if cr0 >> 32 or (cr0 & _NW and not cr0 & _CD) or (cr0 & _PG and not cr0 & _PE):
        return f"cr0 {cr0:#x} cannot be"
    if cr4 & ~_CR4_ALLOWED:
        return f"cr4 {cr4:#x} has bits that CPUID does not offer"
    if efer & ~(_SCE | _LME | _LMA | _NXE):
        return f"efer {efer:#x} has bits that CPUID does not offer"
    if efer & _LME and cr0 & _PG:
        if not cr4 & _PAE or not efer & _LMA:
            return f"long mode needs cr4.PAE and efer.LMA (cr4 {cr4:#x}, efer {efer:#x})"
        if cr3 >> MAXPHYADDR:
            return f"cr3 {cr3:#x} is above {MAXPHYADDR} bits"
    elif efer & _LMA or long_cs:
        return f"efer.LMA or a 64-bit cs without long mode (cr0 {cr0:#x}, efer {efer:#x})"
    return ""


def _debug_register(cpu: CpuState, register: int) -> int | Fault:
    """The register's real number; #UD for the old names, #DB under DR7.GD."""
    if register in (4, 5):
        if cpu.cr4 & _DE:
            return Fault(6)
        register += 2
    if cpu.get_dr(7) & _DR7_GD:
        cpu.set_dr(6, cpu.get_dr(6) | _DR6_BD)
        return Fault(1)
    return register


def read_dr(cpu: CpuState, register: int) -> int | Fault:
    """MOV from DR0-DR7."""
    found = _debug_register(cpu, register)
    return found if isinstance(found, Fault) else cpu.get_dr(found)


def write_dr(cpu: CpuState, register: int, value: int) -> Fault | None:
    """MOV to DR0-DR7."""
    found = _debug_register(cpu, register)
    if isinstance(found, Fault):
        return found
    if found >= 6:
        if value >> 32:
            return _REFUSED
        if found == 6:
            value = value & _DR6_WRITABLE | _DR6_FIXED
        else:
            value = value & _DR7_WRITABLE | _DR7_FIXED
    cpu.set_dr(found, value)
    return None
