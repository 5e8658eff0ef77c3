"""What a KVM guest and its host say to each other: CPUID leaves, hypercalls, MSRs and shared records.

Pieces, each without knowledge of a vCPU; what they need comes as arguments, what must be done comes back as a value:

* :mod:`~aiovm.paravirt.cpuid`: the leaves at 0x40000000, the feature and hint bits.
* :mod:`~aiovm.paravirt.hypercalls`: numbers, the rules for all of them, PV IPI, sched yield.
* :mod:`~aiovm.paravirt.steal`: steal time, the preempted byte, the PV TLB flush.
"""

from __future__ import annotations

from aiovm.paravirt.cpuid import DEFAULT_FEATURES, KvmFeature, KvmHint, kvm_cpuid_leaves
from aiovm.paravirt.hypercalls import (
    Hypercall,
    HypercallNumber,
    SendIpi,
    decode_hypercall,
    decode_send_ipi,
    may_sched_yield,
)
from aiovm.paravirt.steal import StealTime, StealTimeState

__all__ = [
    "DEFAULT_FEATURES",
    "Hypercall",
    "HypercallNumber",
    "KvmFeature",
    "KvmHint",
    "SendIpi",
    "StealTime",
    "StealTimeState",
    "decode_hypercall",
    "decode_send_ipi",
    "kvm_cpuid_leaves",
    "may_sched_yield",
]
