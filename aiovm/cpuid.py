"""The CPU model that guests see: what the engine executes, and nothing more (SDM vol. 2A, CPUID).

The base is a Haswell. Taken away: what the core does not execute (AVX, FMA, F16C, MONITOR, MTRR and machine check,
which nobody implements here), ERMS (``rep movsb`` runs a byte an iteration, so guests should prefer wide moves) and
RDRAND (the core's answers come from the host, and a run could not be repeated).
Added, as nothing is executed speculatively here: enhanced IBRS, and IA32_ARCH_CAPABILITIES (:mod:`aiovm.vcpu_msrs`), by
which guests learn that they need no page tables of their own for user mode, no retpolines, and no return thunks.
Added as well: SMAP, UMIP, protection keys of user pages, CLFLUSHOPT, CLWB, XSAVEOPT, XGETBV of the states in use,
x2APIC, TSC deadline, invariant TSC, always-running APIC timer, 1 GiB pages, the hypervisor bit, the topology leaf, and
KVM's leaves at 0x40000000 (:mod:`aiovm.paravirt`).

What is not offered does not exist; but where the engine cannot reach the core's state, RDRAND, ADX and more states in
XCR0 than x87, SSE and PKRU do.
"""

from __future__ import annotations

from aiovm.paravirt import KvmFeature, kvm_cpuid_leaves

__all__ = ["PKRU_STATE", "SIGNATURE", "XCR0_STATES", "CpuidTable"]

Leaf = tuple[int, int, int, int]

#: CPUID.1:EAX, also RDX after reset.
SIGNATURE = 0x306C4

_VENDOR = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX of "GenuineIntel"
_HYPERVISOR = 1 << 31
_TSC_DEADLINE = 1 << 24
_X2APIC = 1 << 21
_ECX_CORE = 0x4ED8_2203 & ~(1 << 27 | 1 << 30)  # SSE3..XSAVE of the core, without OSXSAVE, RDRAND
_EDX_CORE = 0x078B_FBFD & ~(1 << 7 | 1 << 12 | 1 << 14)  # without MCE, MTRR, MCA
_APIC = 1 << 9
_OSXSAVE, _OSPKE = 1 << 27, 1 << 4
_CR4_OSXSAVE, _CR4_PKE = 1 << 18, 1 << 22
#: The legacy area and the header (SDM vol. 1, 13.4); and PKRU's size and offset, which are those of Intel's processors
#: with AVX-512, as the core knows no others.
_XSAVE_BYTES = 576
_PKRU_BYTES, _PKRU_AT = 8, 2688
#: What XCR0 may have: x87, SSE, PKRU.
PKRU_STATE = 1 << 9
XCR0_STATES = 3 | PKRU_STATE
_HTT = 1 << 28
_WITH_SUBLEAF = frozenset({4, 7, 0xB, 0xD})


class CpuidTable:
    """The answers for a machine of ``vcpus`` CPUs at ``tsc_khz``."""

    def __init__(self, *, vcpus: int, tsc_khz: int, features: KvmFeature, hints: int = 0) -> None:
        shift = max(1, (vcpus - 1).bit_length())
        extended_c = 0x21  # LAHF, ABM
        extended_d = 0x2810_0800 | 1 << 26  # SYSCALL, NX, RDTSCP, LM, and 1 GiB pages
        self._shift = shift
        self._vcpus = vcpus
        self._leaves: dict[tuple[int, int], Leaf] = {
            (0, 0): (0xD, *_VENDOR),
            (1, 0): (
                SIGNATURE,
                0x800 | min(vcpus, 255) << 16,
                _ECX_CORE | _HYPERVISOR | _TSC_DEADLINE | _X2APIC,
                _EDX_CORE | (_HTT if vcpus > 1 else 0),
            ),
            (2, 0): (1, 0, 0, 0x2C307D),
            (4, 0): (0x121, 0x1C0003F, 0x3F, 1),
            (4, 1): (0x122, 0x1C0003F, 0x3F, 1),
            (4, 2): (0x143, 0x3C0003F, 0xFFF, 1),
            (6, 0): (4, 0, 0, 0),  # ARAT
            # FSGSBASE, TSC_ADJUST, BMI1, SMEP, BMI2, SMAP, CLFLUSHOPT, CLWB; UMIP, PKU; IBRS and IBPB, STIBP,
            # ARCH_CAPABILITIES
            (7, 0): (2, 0x190_018B, 1 << 2 | 1 << 3, 0x2C00_0000),
            (7, 2): (0, 0, 0, 1 << 4),  # BHI_CTRL, which Linux 6.1 asks for although ARCH_CAPABILITIES has BHI_NO
            (0xD, 0): (XCR0_STATES, _XSAVE_BYTES, _PKRU_AT + _PKRU_BYTES, 0),
            (0xD, 1): (5, 0, 0, 0),  # XSAVEOPT, XGETBV with ECX 1
            (0xD, 9): (_PKRU_BYTES, _PKRU_AT, 0, 0),
            (0x8000_0000, 0): (0x8000_0008, *_VENDOR),
            (0x8000_0001, 0): (SIGNATURE, 0, extended_c, extended_d),
            (0x8000_0002, 0): (0x65746E49, 0x6F43206C, 0x50206572, 0x65636F72),
            (0x8000_0003, 0): (0x726F7373, 0x61482820, 0x6C657773, 0x296C),
            (0x8000_0005, 0): (0x1FF01FF, 0x1FF01FF, 0x40020140, 0x40020140),
            (0x8000_0006, 0): (0, 0x42004200, 0x2008140, 0),
            (0x8000_0007, 0): (0, 0, 0, 1 << 8),  # invariant TSC
            (0x8000_0008, 0): (0x3028, 0, 0, 0),  # 40 physical, 48 linear address bits
        }
        for number, leaf in kvm_cpuid_leaves(features, hints=hints, tsc_khz=tsc_khz).items():
            self._leaves[number, 0] = leaf
        #: Leaves that read the same on each CPU and for each subleaf: the short way to most of the answers.
        self.same = {
            leaf: found for (leaf, _), found in self._leaves.items() if leaf != 1 and leaf not in _WITH_SUBLEAF
        }

    def answer(
        self, leaf: int, subleaf: int, apic_id: int, *, apic_enabled: bool = True, cr4: int = 0, xcr0: int = 1
    ) -> Leaf:
        """EAX, EBX, ECX, EDX for one CPU. Leaves that do not exist read zero, as on AMD.

        An APIC that IA32_APIC_BASE turned off is not there (SDM vol. 3A, 10.4.3). OSXSAVE and OSPKE are ``cr4``'s bits;
        ``xcr0`` says how large XSAVE's area must be (KVM ``kvm_update_cpuid_runtime``).
        """
        if leaf == 1:
            eax, ebx, ecx, edx = self._leaves[1, 0]
            ecx = ecx | _OSXSAVE if cr4 & _CR4_OSXSAVE else ecx
            return eax, ebx | (apic_id & 0xFF) << 24, ecx, edx if apic_enabled else edx & ~_APIC
        if leaf == 0xB:
            if subleaf == 0:
                return 0, 1, 0x100, apic_id
            if subleaf == 1:
                return self._shift, self._vcpus, 0x201, apic_id
            return 0, 0, subleaf & 0xFF, apic_id
        found = self._leaves.get((leaf, subleaf if leaf in _WITH_SUBLEAF else 0), (0, 0, 0, 0))
        if subleaf == 0:
            eax, ebx, ecx, edx = found
            if leaf == 7 and cr4 & _CR4_PKE:
                return eax, ebx, ecx | _OSPKE, edx
            if leaf == 0xD and xcr0 & PKRU_STATE:
                return eax, ecx, ecx, edx
        return found
