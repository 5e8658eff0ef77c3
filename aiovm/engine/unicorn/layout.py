"""Where Unicorn 2.1.4 keeps an x86 CPU's state.

The offsets are facts of one build (the PyPI wheel 2.1.4, whose core is QEMU 5.0.1). :mod:`aiovm.engine.unicorn.proof`
sets registers through the public API and reads them through the pointers, and back; when anything disagrees the engine
takes the public path (``uc_context``, whose payload is the same state up to :data:`ENV_END`), slower but independent
of the two pointers.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EFER_MSR", "ENV_END", "FEATURES", "MSRS", "Env", "Hf", "Hf2", "Intercept"]

# uc_struct
UC_CPU: Final = 0x1B8
UC_NO_EXIT_REQUEST: Final = 0x7F2
# CPUState
CPU_INTERRUPT_REQUEST: Final = 0x1C
CPU_ENV: Final = 0x128
CPU_ICOUNT_DECR: Final = 0x130
CPU_TO_ENV: Final = 0x8A50
#: Pointer to the CPUClass, whose pair of page walks (in use, the CPU's own) is at CLASS_TLB_FILL.
CPU_CLASS: Final = 0x81B0
CLASS_TLB_FILL: Final = 0x48
#: The TLB's tables: (mask, entries) for each MMU mode; an entry is 64 bytes, with the address for fetches at TLB_CODE.
CPU_TLB: Final = CPU_TO_ENV - 0x40
MMU_MODES: Final = 3
TLB_ENTRY_BITS: Final = 6
TLB_CODE: Final = 16
#: Byte 1 of interrupt_request: CPU_INTERRUPT_VIRQ (0x100), the interrupt window, and CPU_INTERRUPT_NMI (0x200).
VIRQ_BYTE: Final = 1

#: The state that a context holds: everything up to the reset area's end.
ENV_END: Final = 0x15C0
#: Behind it: what CPUID offers, which translations ask. What the core's model has, and what is left of it, as in
#: :mod:`aiovm.cpuid`: no RDRAND nor ADX, and in XCR0 only x87, SSE and PKRU. MOVBE is answered
#: outside the core, whose own takes registers for memory.
FEATURES: Final = {
    0x1608: (0xC6D8_2203, 0x8698_2203),  # 1:ECX
    0x1610: (0x0198_0389, 0x0190_0389),  # 7:EBX
    0x1618: (0x8, 0x8),  # 7:ECX
    0x1698: (0x5, 0x5),  # 0xD.1:EAX
    0x16A8: (0x2E7, 0x203),  # 0xD.0:EAX
}
#: Where a uc_context's payload holds that state.
CONTEXT_PAYLOAD: Final = 40


class Env:
    """Byte offsets into ``CPUX86State``."""

    REGS: Final = 0x0
    EIP: Final = 0x80
    EFLAGS: Final = 0x88
    CC_SRC: Final = 0x98
    CC_OP: Final = 0xA8
    DF: Final = 0xAC
    HFLAGS: Final = 0xB0
    HFLAGS2: Final = 0xB4
    SEGS: Final = 0xB8  # 24 bytes each: selector u32, base u64 @8, limit u32 @16, flags u32 @20
    LDT: Final = 0x148
    TR: Final = 0x160
    GDT: Final = 0x178
    IDT: Final = 0x190
    CR: Final = 0x1A8
    EFER: Final = 0x250
    XCR0: Final = 0x1328
    PKRU: Final = 0x14B8
    STAR: Final = 0x12D8
    LSTAR: Final = 0x12E8
    FMASK: Final = 0x12F8
    ERROR_CODE: Final = 0x1508
    DR: Final = 0x1518
    VM_VMCB: Final = 0x1580
    INTERCEPT: Final = 0x1590
    INTERCEPT_CR_READ: Final = 0x1598
    INTERCEPT_CR_WRITE: Final = 0x159A
    INTERCEPT_DR_READ: Final = 0x159C
    INTERCEPT_DR_WRITE: Final = 0x159E
    INTERCEPT_EXCEPTIONS: Final = 0x15A0


SEGMENT_SIZE: Final = 24

#: MSRs that the core holds, and where. They are reached here and not by WRMSR's own helper: that one checks the
#: intercepts and would leave through a longjmp over whoever called it.
MSRS: Final = {
    0x174: 0x12C0,  # SYSENTER_CS
    0x175: 0x12C8,
    0x176: 0x12D0,
    0x277: 0x14A0,  # PAT
    0xC000_0081: 0x12D8,  # STAR
    0xC000_0082: 0x12E8,
    0xC000_0083: 0x12F0,
    0xC000_0084: 0x12F8,
    0xC000_0100: 0x120,  # FS.base
    0xC000_0101: 0x138,  # GS.base
    0xC000_0102: 0x1300,  # KernelGSbase
    0xC000_0103: 0x1320,  # TSC_AUX
}
EFER_MSR: Final = 0xC000_0080


class Hf:
    """``env->hflags``: decoded state that translations depend on."""

    CPL: Final = 3
    INHIBIT_IRQ: Final = 1 << 3
    CS32: Final = 1 << 4
    SS32: Final = 1 << 5
    ADDSEG: Final = 1 << 6
    PE: Final = 1 << 7
    TF: Final = 1 << 8
    MP: Final = 1 << 9
    EM: Final = 1 << 10
    TS: Final = 1 << 11
    LMA: Final = 1 << 14
    CS64: Final = 1 << 15
    AC: Final = 1 << 18
    GUEST: Final = 1 << 21
    OSFXSR: Final = 1 << 22
    SMAP: Final = 1 << 23
    IOBPT: Final = 1 << 24


class Hf2:
    """``env->hflags2``."""

    GIF: Final = 1 << 0
    HIF: Final = 1 << 1
    NMI: Final = 1 << 2
    VINTR: Final = 1 << 3


class Intercept:
    """SVM exit codes (AMD APM vol. 2, appendix C); the hook sees ``0x100 +`` one of these."""

    CR0_READ: Final = 0x00
    CR0_WRITE: Final = 0x10
    DR0_READ: Final = 0x20
    DR0_WRITE: Final = 0x30
    EXCEPTION: Final = 0x40
    INTR: Final = 0x60
    NMI: Final = 0x61
    VINTR: Final = 0x64
    IDTR_READ: Final = 0x66  # then GDTR, LDTR
    TR_READ: Final = 0x69
    IDTR_WRITE: Final = 0x6A
    GDTR_WRITE: Final = 0x6B
    LDTR_WRITE: Final = 0x6C
    TR_WRITE: Final = 0x6D
    RDTSC: Final = 0x6E
    RDPMC: Final = 0x6F
    CPUID: Final = 0x72
    RSM: Final = 0x73
    IRET: Final = 0x74
    SWINT: Final = 0x75
    PAUSE: Final = 0x77
    HLT: Final = 0x78
    MSR: Final = 0x7C
    SHUTDOWN: Final = 0x7F
    VMMCALL: Final = 0x81
    RDTSCP: Final = 0x87
