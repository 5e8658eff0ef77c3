"""KVM's CPUID leaves: the signature, what the host offers, what it hints, how fast the clocks are.

Guests look here only when CPUID.1:ECX[31] (hypervisor) is set. Source: ``arch/x86/kvm/cpuid.c``,
``arch/x86/include/uapi/asm/kvm_para.h`` of Linux 6.16. Leaf 0x40000010 is not KVM's: VMware
defined it, QEMU adds it (``vmware-cpuid-freq``), and Linux takes its TSC and APIC frequencies from it.

Modelled: the KVM signature at 0x40000000. Not modelled: Hyper-V leaves, so the base never moves.
"""

from __future__ import annotations

import enum

__all__ = ["DEFAULT_FEATURES", "KvmFeature", "KvmHint", "kvm_cpuid_leaves"]

_BASE = 0x4000_0000
_FEATURES = 0x4000_0001
_FREQUENCIES = 0x4000_0010
_SIGNATURE = (0x4B4D_564B, 0x564B_4D56, 0x0000_004D)  # "KVMKVMKVM", padded with zeros


class KvmFeature(enum.IntFlag):
    """Leaf 0x40000001, EAX."""

    NONE = 0
    CLOCKSOURCE = 1 << 0
    NOP_IO_DELAY = 1 << 1
    CLOCKSOURCE2 = 1 << 3
    ASYNC_PF = 1 << 4
    STEAL_TIME = 1 << 5
    PV_EOI = 1 << 6
    PV_UNHALT = 1 << 7
    PV_TLB_FLUSH = 1 << 9
    ASYNC_PF_VMEXIT = 1 << 10
    PV_SEND_IPI = 1 << 11
    POLL_CONTROL = 1 << 12
    PV_SCHED_YIELD = 1 << 13
    ASYNC_PF_INT = 1 << 14
    MSI_EXT_DEST_ID = 1 << 15
    HC_MAP_GPA_RANGE = 1 << 16
    MIGRATION_CONTROL = 1 << 17
    CLOCKSOURCE_STABLE = 1 << 24


class KvmHint(enum.IntFlag):
    """Leaf 0x40000001, EDX. REALTIME: vCPUs are hardly ever preempted, so PV locks, flushes and yields don't pay."""

    NONE = 0
    REALTIME = 1 << 0


#: What KVM 6.16 offers by itself, except ASYNC_PF_VMEXIT: that is for nested guests.
DEFAULT_FEATURES = (
    KvmFeature.CLOCKSOURCE
    | KvmFeature.NOP_IO_DELAY
    | KvmFeature.CLOCKSOURCE2
    | KvmFeature.ASYNC_PF
    | KvmFeature.STEAL_TIME
    | KvmFeature.PV_EOI
    | KvmFeature.PV_UNHALT
    | KvmFeature.PV_TLB_FLUSH
    | KvmFeature.PV_SEND_IPI
    | KvmFeature.POLL_CONTROL
    | KvmFeature.PV_SCHED_YIELD
    | KvmFeature.ASYNC_PF_INT
    | KvmFeature.CLOCKSOURCE_STABLE
)


def kvm_cpuid_leaves(
    features: KvmFeature, *, tsc_khz: int, hints: int = 0, apic_bus_khz: int = 1_000_000
) -> dict[int, tuple[int, int, int, int]]:
    """EAX, EBX, ECX, EDX of each leaf; the APIC bus of KVM ticks once a nanosecond."""
    return {
        _BASE: (_FREQUENCIES, *_SIGNATURE),
        _FEATURES: (int(features), 0, 0, int(hints)),
        _FREQUENCIES: (tsc_khz, apic_bus_khz, 0, 0),
    }
