"""PV EOI: a bit in guest memory that lets the guest end an interrupt without touching its LAPIC.

The guest ends an interrupt with one test-and-clear of bit 0: was it set, the interrupt is over, and the host finds that
out later; was it clear, the guest writes the EOI register. MSR 0x4B564D04 holds the byte's address, bit 0 enables.

Rules (``arch/x86/kvm/lapic.c`` of Linux 6.16):

* Armed before an entry, only if the next EOI would tell nobody anything: nothing waits in IRR, the in-service vector is
  known, and no I/O APIC wants to hear its end.
* Harvested at every exit before anything else is done about it, and after an entry that was given up: the bit is taken
  back, and if the guest had cleared it, the LAPIC's EOI is due now.
* The host touches the byte only while that vCPU does not run. A LAPIC reset turns the mechanism off.

Modelled: all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiovm.memory import GuestPtr

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["PvEoi", "PvEoiState"]

_ENABLED = 1
_MISALIGNED = 2
_CLEAR, _SET = b"\0", b"\1"


@dataclass(slots=True)
class PvEoiState:
    """``pending``: armed and not yet harvested (``KVM_APIC_PV_EOI_PENDING``)."""

    msr_val: int = 0
    pending: bool = False


class PvEoi:
    """One vCPU's byte."""

    __slots__ = ("_memory", "_msr_val", "_word", "pending")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._msr_val = 0
        #: Whether :meth:`harvest` is due; asked at each access to the local APIC.
        self.pending = False
        self._word: GuestPtr | None = None

    @property
    def enabled(self) -> bool:
        """Whether :meth:`arm` is worth a call before an entry."""
        return self._word is not None

    def read_msr(self) -> int:
        """MSR 0x4B564D04."""
        return self._msr_val

    def write_msr(self, value: int) -> bool:
        """Whether the store is allowed: the address is a multiple of 4, and is memory when it enables."""
        if value & _MISALIGNED:
            return False
        word = self._point(value)
        if word is not None and not word.valid:
            return False
        self._msr_val = value
        self._word = word
        return True

    def arm(self, *, irr_pending: bool, isr_vector: int, ioapic_handles: bool) -> None:
        """Before an entry. ``isr_vector``: the highest in service, -1 if that is not known."""
        if self._word is not None and not irr_pending and isr_vector >= 0 and not ioapic_handles:
            self.pending = self._word.write(0, _SET) or self.pending

    def harvest(self) -> bool:
        """After an exit, when ``pending``: whether the guest has ended its interrupt, so that an EOI is due."""
        self.pending = False
        word = self._word
        byte = None if word is None else word.read(0, 1)
        if word is None or byte is None or not byte[0] & 1:
            return True
        return not word.write(0, _CLEAR)

    def save(self) -> PvEoiState:
        """A copy of the state."""
        return PvEoiState(self._msr_val, self.pending)

    def restore(self, state: PvEoiState) -> None:
        """Take over a saved state."""
        self._msr_val, self.pending = state.msr_val, state.pending
        self._word = self._point(state.msr_val)

    def reset(self) -> None:
        """A LAPIC reset, by RESET or INIT."""
        self.restore(PvEoiState())

    def _point(self, value: int) -> GuestPtr | None:
        return GuestPtr(self._memory, value & ~_ENABLED, 1) if value & _ENABLED else None
