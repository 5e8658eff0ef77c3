"""Hypercalls: VMCALL with a number in RAX, arguments in RBX, RCX, RDX and RSI, the result in RAX.

Rules for all (``arch/x86/kvm/x86.c`` of Linux 6.16): outside 64-bit code
everything is cut to 32 bits, by the engine; a caller above CPL 0 gets -1; an unknown number, and one whose feature the
guest's CPUID lacks while features are enforced (KVM_CAP_ENFORCE_PV_FEATURE_CPUID), gets -1000.

Modelled: the numbers, who may call, PV IPI's bitmap. Not modelled: MMU_OP, which is dead,
and MAP_GPA_RANGE, which is for encrypted guests; both are unknown.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from aiovm.bits import mask
from aiovm.paravirt.cpuid import KvmFeature

__all__ = [
    "HypercallNumber",
    "SendIpi",
    "decode_send_ipi",
    "refusal",
]

_EPERM, _EINVAL, _ENOSYS = -1, -22, -1000
_ICR_SHORTHAND_OR_LOGICAL = 0xC_0800  # ICR bits 19:18 and 11 (SDM vol. 3A, 10.6.1)


class HypercallNumber(enum.IntEnum):
    """``KVM_HC_*`` that are answered."""

    VAPIC_POLL_IRQ = 1
    KICK_CPU = 5
    CLOCK_PAIRING = 9
    SEND_IPI = 10
    SCHED_YIELD = 11


_NEEDS: dict[int, KvmFeature] = {
    HypercallNumber.VAPIC_POLL_IRQ: KvmFeature.NONE,
    HypercallNumber.KICK_CPU: KvmFeature.PV_UNHALT,
    HypercallNumber.CLOCK_PAIRING: KvmFeature.NONE,
    HypercallNumber.SEND_IPI: KvmFeature.PV_SEND_IPI,
    HypercallNumber.SCHED_YIELD: KvmFeature.PV_SCHED_YIELD,
}


def refusal(number: int, cpl: int, enforced: KvmFeature | None = None) -> int | None:
    """What a call gets that is not carried out; None: it may be. ``enforced``: the guest's features, if only they may
    be used."""
    if cpl:
        return _EPERM
    needs = _NEEDS.get(number)
    if needs is None or (enforced is not None and needs & ~enforced):
        return _ENOSYS
    return None


class SendIpi(NamedTuple):
    """Send ``icr``, an ICR low word for a physical destination, to each of ``apic_ids``, in this order.

    The result is the number of local APICs that accepted it; ids without one do not count.
    """

    apic_ids: tuple[int, ...]
    icr: int

    @property
    def vector(self) -> int:
        """ICR bits 7:0."""
        return self.icr & 0xFF

    @property
    def delivery_mode(self) -> int:
        """ICR bits 10:8."""
        return self.icr >> 8 & 7


def decode_send_ipi(args: tuple[int, int, int, int], *, long_mode: bool) -> SendIpi | int:
    """KVM_HC_SEND_IPI: two bitmap words, the id of the first bit, the ICR; or the error that it returns.

    Ids do not wrap around.
    """
    low, high, first, icr = args
    if icr & _ICR_SHORTHAND_OR_LOGICAL:
        return _EINVAL
    width = 64 if long_mode else 32
    bitmap = low & mask(width) | (high & mask(width)) << width
    ids = []
    while bitmap:
        lowest = (bitmap & -bitmap).bit_length() - 1
        ids.append(first + lowest)
        bitmap &= bitmap - 1
    return SendIpi(tuple(ids), icr & mask(32))
