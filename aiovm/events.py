"""What a vCPU must still deliver, and which comes first (``kvm_vcpu_events``; SDM vol. 3A, 6.9 and 6.15).

Rules, from ``arch/x86/kvm/x86.c`` of Linux 6.16; where versions differ, 6.16:

* An exception, NMI or interrupt is *pending* until it is chosen, then *injected* until its delivery is done. Injected
  ones go first, then a pending exception, SMI, NMI, interrupt.
* A second exception combines with the first: contributory or page fault upon page fault, and contributory upon
  contributory, make #DF with error code 0; anything upon #DF is a triple fault; else the new one replaces the old.
* Error codes exist in protected mode only. NMIs fold: at most one stays pending while NMIs are masked or one is being
  injected, else two.
* An interrupt needs RFLAGS.IF and no STI or MOV-SS shadow; an NMI needs no shadow and no mask. The interrupt
  controller is asked for its vector only when the interrupt will be injected.

This module holds state and chooses; ``delivery`` carries out. Modelled: the masking of SMIs by SMM. Not modelled:
entering SMM (the chosen SMI is the caller's business), nested guests' events, pending debug-trap payloads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Event", "EventKind", "EventQueue", "EventState", "combine"]

_DF: Final = 8
_PF: Final = 14
_CONTRIBUTORY: Final = frozenset({0, 10, 11, 12, 13})


class EventKind(enum.IntEnum):
    """How an event arises; the numbers are VMX's interruption types (SDM vol. 3C, 25.8.3), SMI's is ours.

    Software events have bit 2 set.
    """

    EXTERNAL = 0
    NMI = 2
    EXCEPTION = 3
    SOFT_INT = 4
    #: INT1: software, but no privilege is asked.
    ICEBP = 5
    #: INT3 and INTO.
    SOFT_EXC = 6
    SMI = 8


class Event(NamedTuple):
    """What to deliver next."""

    kind: EventKind
    vector: int = 0
    error_code: int | None = None


def combine(first: int, second: int) -> int | None:
    """The vector to deliver after exception ``second`` arose while delivering ``first``; None: triple fault."""
    if first == _DF:
        return None
    if first == _PF:
        doubled = second == _PF or second in _CONTRIBUTORY
    else:
        doubled = first in _CONTRIBUTORY and second in _CONTRIBUTORY
    return _DF if doubled else second


@dataclass
class EventState:
    """``struct kvm_vcpu_events`` (without ``sipi_vector`` and ``latched_init``, the local APIC's; the shadow is the
    CPU's), and what KVM keeps beside it."""

    exception_injected: bool = False
    exception_pending: bool = False
    exception_nr: int = 0
    exception_has_error_code: bool = False
    exception_error_code: int = 0
    interrupt_injected: bool = False
    interrupt_nr: int = 0
    interrupt_soft: bool = False
    nmi_injected: bool = False
    nmi_pending: int = 0
    nmi_masked: bool = False
    smi_pending: bool = False
    smm: bool = False
    smm_inside_nmi: bool = False
    #: NMIs that arrived and are not folded into ``nmi_pending`` yet; always 0 in a saved state.
    nmi_queued: int = 0
    triple_fault: bool = False


class EventQueue:
    """A vCPU's events. ``s`` is the state; only this class writes it."""

    __slots__ = ("s",)

    def __init__(self) -> None:
        self.s = EventState()

    # ---- raising -----------------------------------------------------------------------------------------------

    def queue_exception(self, vector: int, error_code: int | None = None, *, protected_mode: bool = True) -> bool:
        """Raise an exception; it combines with one that is already there. False: triple fault."""
        s = self.s
        if s.exception_pending or s.exception_injected:
            combined = combine(s.exception_nr, vector)
            if combined is None:
                s.exception_pending = s.exception_injected = False
                s.triple_fault = True
                return False
            if combined != vector:
                vector, error_code = combined, 0
        s.exception_pending, s.exception_injected = True, False
        s.exception_nr = vector
        s.exception_has_error_code = error_code is not None and protected_mode
        s.exception_error_code = error_code if error_code is not None and protected_mode else 0
        return True

    def queue_interrupt(self, vector: int, *, soft: bool = False) -> None:
        """An interrupt that is already taken from its controller (KVM_INTERRUPT), or INT n when ``soft``."""
        s = self.s
        s.interrupt_injected, s.interrupt_nr, s.interrupt_soft = True, vector, soft

    def queue_nmi(self) -> None:
        """An NMI arrived."""
        self.s.nmi_queued += 1

    def drop_exception(self) -> None:
        """Forget an exception that is not being delivered yet (KVM_SET_REGS)."""
        self.s.exception_pending = False

    def queue_smi(self) -> None:
        """An SMI arrived; one is remembered."""
        self.s.smi_pending = True

    def fold_nmi(self) -> None:
        """Take the arrived NMIs in, as many as the architecture remembers (``process_nmi``)."""
        s = self.s
        limit = 1 if s.nmi_masked or s.nmi_injected else 2
        s.nmi_pending = min(s.nmi_pending + s.nmi_queued, limit)
        s.nmi_queued = 0

    # ---- choosing ----------------------------------------------------------------------------------------------

    @property
    def any(self) -> bool:
        """Whether :meth:`select` has something to look at beside interrupts."""
        s = self.s
        return bool(
            s.exception_pending
            or s.exception_injected
            or s.interrupt_injected
            or s.nmi_pending
            or s.nmi_injected
            or s.nmi_queued
            or s.smi_pending
        )

    @property
    def has_exception(self) -> bool:
        """Whether an exception waits or is being delivered."""
        return self.s.exception_pending or self.s.exception_injected

    def select(
        self, *, interrupt_flag: bool, shadow: bool, acknowledge: Callable[[], int | None] | None = None
    ) -> Event | None:
        """Choose what is delivered now, and mark it injected; :meth:`delivered` says that it is done.

        ``acknowledge`` takes the vector from the interrupt controllers (ExtINT before the local APIC); None: there
        is none.
        """
        s = self.s
        if s.nmi_queued:
            self.fold_nmi()
        if s.exception_injected:
            return self._exception()
        if s.nmi_injected:
            return Event(EventKind.NMI, 2)
        if s.interrupt_injected:
            return Event(EventKind.SOFT_INT if s.interrupt_soft else EventKind.EXTERNAL, s.interrupt_nr)
        if s.exception_pending:
            s.exception_pending, s.exception_injected = False, True
            return self._exception()
        if s.smi_pending and not s.smm:
            s.smi_pending, s.smm = False, True
            s.smm_inside_nmi = s.nmi_masked
            s.nmi_masked = True
            return Event(EventKind.SMI)
        if shadow:
            return None
        if s.nmi_pending and not s.nmi_masked:
            s.nmi_pending -= 1
            s.nmi_injected = s.nmi_masked = True
            return Event(EventKind.NMI, 2)
        if interrupt_flag and acknowledge is not None:
            vector = acknowledge()
            if vector is not None:
                self.queue_interrupt(vector)
                return Event(EventKind.EXTERNAL, vector)
        return None

    def _exception(self) -> Event:
        s = self.s
        return Event(
            EventKind.EXCEPTION, s.exception_nr, s.exception_error_code if s.exception_has_error_code else None
        )

    def delivered(self) -> None:
        """The chosen event reached its handler."""
        s = self.s
        s.exception_injected = s.interrupt_injected = s.nmi_injected = False

    def nmi_done(self) -> None:
        """IRET: NMIs are open again (SDM vol. 3A, 6.7.1)."""
        self.s.nmi_masked = False

    def smm_done(self) -> None:
        """RSM: out of SMM, and NMIs are open again unless the SMI came inside an NMI's handler (KVM ``em_rsm``)."""
        s = self.s
        if not s.smm_inside_nmi:
            s.nmi_masked = False
        s.smm = s.smm_inside_nmi = False

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> EventState:
        """KVM_GET_VCPU_EVENTS: a copy, with the arrived NMIs folded in."""
        self.fold_nmi()
        return replace(self.s)

    def restore(self, state: EventState) -> None:
        """KVM_SET_VCPU_EVENTS: take ``state``'s values."""
        self.s = replace(state)

    def reset(self) -> None:
        """RESET and INIT: nothing is pending, NMIs are open (``kvm_vcpu_reset``)."""
        self.s = EventState()
