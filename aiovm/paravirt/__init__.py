"""What a KVM guest and its host say to each other: CPUID leaves, hypercalls, MSRs and shared records.

Pieces, each without knowledge of a vCPU; what they need comes as arguments, what must be done comes back as a value:

* :mod:`~aiovm.paravirt.cpuid`: the leaves at 0x40000000, the feature and hint bits.
* :mod:`~aiovm.paravirt.hypercalls`: numbers, the rules for all of them, PV IPI.
* :mod:`~aiovm.paravirt.steal`: steal time, the preempted byte, the PV TLB flush.
* :mod:`~aiovm.paravirt.eoi`: ending an interrupt by clearing a bit.
* :mod:`~aiovm.paravirt.async_pf`: asynchronous page faults.
* :mod:`~aiovm.paravirt.msrs`: all of one vCPU's, behind their MSRs; the clock is :mod:`aiovm.pvclock`.
"""

from __future__ import annotations

from aiovm.paravirt.async_pf import ApfAction, ApfAnswer, ApfReady, AsyncPf, AsyncPfState
from aiovm.paravirt.cpuid import DEFAULT_FEATURES, KvmFeature, KvmHint, kvm_cpuid_leaves
from aiovm.paravirt.eoi import PvEoi, PvEoiState
from aiovm.paravirt.hypercalls import (
    HypercallNumber,
    SendIpi,
    decode_send_ipi,
    refusal,
)
from aiovm.paravirt.msrs import Paravirt, ParavirtState, PvEffect, PvMsr
from aiovm.paravirt.steal import StealTime, StealTimeState

__all__ = [
    "DEFAULT_FEATURES",
    "ApfAction",
    "ApfAnswer",
    "ApfReady",
    "AsyncPf",
    "AsyncPfState",
    "HypercallNumber",
    "KvmFeature",
    "KvmHint",
    "Paravirt",
    "ParavirtState",
    "PvEffect",
    "PvEoi",
    "PvEoiState",
    "PvMsr",
    "SendIpi",
    "StealTime",
    "StealTimeState",
    "decode_send_ipi",
    "kvm_cpuid_leaves",
    "refusal",
]
