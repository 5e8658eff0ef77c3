"""Why a vCPU stopped: values, one class a reason (``kvm_run.exit_reason`` and the vendor exits below it).

Two kinds. *Inline* exits are answered inside the engine's hook by plain code, and the guest goes on in the
same slice; they become values only for tests and traces. *Leaving* exits end the slice: ``Engine.run`` returns
one. An exit holds what the manual says comes with it, and nothing of the machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = [
    "BUDGET",
    "Budget",
    "Cpuid",
    "CrAccess",
    "Debug",
    "EngineFault",
    "Exit",
    "ExitReason",
    "GuestException",
    "Hlt",
    "Hypercall",
    "Interrupted",
    "IrqWindow",
    "Mmio",
    "Msr",
    "PauseLoop",
    "Pio",
    "Shutdown",
    "SystemEvent",
    "TprAccess",
    "Tsc",
]


class ExitReason(enum.IntEnum):
    """Numbers for traces and counters; the first block are KVM's (``include/uapi/linux/kvm.h``)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30
    # Ours: exits that KVM never shows to userspace.
    CPUID = 256
    MSR = 257
    TSC = 258
    CR_ACCESS = 259
    PAUSE_LOOP = 260
    BUDGET = 261
    SYSCALL = 262
    INT_N = 263


@dataclass(frozen=True, slots=True)
class Budget:
    """The slice's limit was reached, before the block that would start beyond it."""


#: The one value, so that the run loop may ask ``is``.
BUDGET = Budget()


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody kicked the vCPU out of guest mode."""


@dataclass(frozen=True, slots=True)
class Hlt:
    """HLT; RIP is after it. ``interrupts_enabled``: RFLAGS.IF as the guest left it."""

    interrupts_enabled: bool


@dataclass(frozen=True, slots=True)
class PauseLoop:
    """The pause-loop window closed (SDM vol. 3C, 25.1.3); ``kernel_mode``: CPL was 0."""

    kernel_mode: bool


@dataclass(frozen=True, slots=True)
class Pio:
    """``count`` accesses of ``size`` bytes at ``port``; ``data`` holds what is written, or room for what is read."""

    port: int
    size: int
    is_write: bool
    data: bytes
    count: int = 1


@dataclass(frozen=True, slots=True)
class Mmio:
    """An access of 1–8 bytes to guest physical ``gpa`` that no memory and no device claims."""

    gpa: int
    size: int
    is_write: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Msr:
    """RDMSR or WRMSR of ``index``."""

    index: int
    is_write: bool
    value: int = 0


@dataclass(frozen=True, slots=True)
class Cpuid:
    """CPUID with EAX and ECX."""

    leaf: int
    subleaf: int


@dataclass(frozen=True, slots=True)
class Tsc:
    """RDTSC, or RDTSCP when ``with_aux``."""

    with_aux: bool


@dataclass(frozen=True, slots=True)
class CrAccess:
    """MOV to or from a control register."""

    register: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Hypercall:
    """VMCALL or VMMCALL: ``number`` in RAX, four arguments in RBX, RCX, RDX, RSI."""

    number: int
    args: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class GuestException:
    """The guest raised ``vector``; ``address`` is CR2's new value for a page fault."""

    vector: int
    error_code: int | None = None
    address: int = 0


@dataclass(frozen=True, slots=True)
class IrqWindow:
    """The guest can take an interrupt now."""


@dataclass(frozen=True, slots=True)
class Debug:
    """A breakpoint, watchpoint or single step of the embedding program (``kvm_debug_exit_arch``)."""

    vector: int
    pc: int
    dr6: int = 0
    dr7: int = 0


@dataclass(frozen=True, slots=True)
class TprAccess:
    """KVM_EXIT_TPR_ACCESS: the guest loaded or stored its local APIC's TPR register; the access is done.

    ``rip``: where the basic block with the access begins.
    """

    rip: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Triple fault (SDM vol. 3A, 6.15)."""

    reason: str = "triple fault"


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """The guest asked the machine to end or to start again: ``kind`` is power-off, reset or debug-exit.

    ``status`` is the process status that goes with it.
    """

    kind: str
    status: int = 0


@dataclass(frozen=True, slots=True)
class EngineFault:
    """The engine could not go on: its error number and words."""

    number: int
    message: str


Exit = (
    Budget
    | Interrupted
    | Hlt
    | PauseLoop
    | Pio
    | Mmio
    | Msr
    | Cpuid
    | Tsc
    | CrAccess
    | Hypercall
    | GuestException
    | IrqWindow
    | Debug
    | TprAccess
    | Shutdown
    | SystemEvent
    | EngineFault
)
