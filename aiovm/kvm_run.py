"""``struct kvm_run``: what a vCPU and the program that runs it tell each other around ``Vcpu.run``.

The program reads why the vCPU left and answers in ``data``; the next ``run`` goes on from there, as KVM_RUN does. The
exit itself is the typed value that ``run`` returns, kept here as ``exit``; ``exit_reason`` is its number in KVM.

Rules (``include/uapi/linux/kvm.h``, ``arch/x86/kvm/x86.c`` post_kvm_run_save, Linux 6.16):

* A load or IN that left is finished by the next ``run``, before anything else may happen to the vCPU, even when that
  run is told to leave at once. Without ``data`` of the right length that is the program's error.
* ``if_flag``, ``cr8``, ``apic_base``, ``flags`` and ``ready_for_interrupt_injection`` are the vCPU's at the exit.
* ``request_interrupt_window`` is for a program that emulates the interrupt controllers: KVM ignores it when it has
  them itself, and so it is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm.exits import (
    Debug,
    EngineFault,
    Exit,
    ExitReason,
    GuestException,
    Hlt,
    Hypercall,
    Interrupted,
    IrqWindow,
    Mmio,
    Pio,
    Shutdown,
    SystemEvent,
    TprAccess,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KvmRun", "reason_of"]

_REASONS: Final[Mapping[type, ExitReason]] = {
    GuestException: ExitReason.EXCEPTION,
    Pio: ExitReason.IO,
    Hypercall: ExitReason.HYPERCALL,
    Debug: ExitReason.DEBUG,
    Hlt: ExitReason.HLT,
    Mmio: ExitReason.MMIO,
    IrqWindow: ExitReason.IRQ_WINDOW_OPEN,
    Shutdown: ExitReason.SHUTDOWN,
    Interrupted: ExitReason.INTR,
    TprAccess: ExitReason.TPR_ACCESS,
    EngineFault: ExitReason.INTERNAL_ERROR,
    SystemEvent: ExitReason.SYSTEM_EVENT,
}


def reason_of(exit_: Exit | None) -> ExitReason:
    """KVM's number for an exit; UNKNOWN before the first and for those that never leave."""
    return _REASONS.get(type(exit_), ExitReason.UNKNOWN)


@dataclass(slots=True)
class KvmRun:
    """One vCPU's. ``flags``: bit 0, the vCPU is in SMM (KVM_RUN_X86_SMM)."""

    exit: Exit | None = None
    #: The program's answer to a load or IN: as many bytes as the exit says.
    data: bytes | None = None
    request_interrupt_window: bool = False
    ready_for_interrupt_injection: bool = False
    if_flag: bool = False
    flags: int = 0
    cr8: int = 0
    apic_base: int = 0

    @property
    def exit_reason(self) -> ExitReason:
        """Why the vCPU left last."""
        return reason_of(self.exit)
