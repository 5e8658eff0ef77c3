"""The engine protocol: how a CPU is asked to run, and how it asks back.

Two sides meet here. The *engine* runs guest code in bounded slices (:class:`Engine`, one a machine;
:class:`Context`, one a vCPU). The *guest port* (:class:`GuestPort`, the vCPU) answers what the guest does that
is not plain computing; those calls are made from inside a slice, must not wait and must not raise.

Real machine code (``engine/unicorn``) and guests written as Python generators (``engine/model``) are two
engines behind this one protocol; the scheduler and the vCPU know no other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiovm.events import EventKind
    from aiovm.exits import Exit
    from aiovm.kvm_structs import KvmFpu

__all__ = [
    "Context",
    "ContextState",
    "CpuState",
    "DescriptorTable",
    "Engine",
    "GuestPort",
    "Reg",
    "Registers",
    "Seg",
    "Segment",
]


class Reg(enum.IntEnum):
    """General registers in hardware encoding order (note: CX, DX, BX)."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


class Seg(enum.IntEnum):
    """Segment registers in hardware encoding order, then the two system ones."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5
    LDTR = 6
    TR = 7


class Segment(NamedTuple):
    """A segment register with its hidden part.

    ``limit`` is in bytes (granularity applied). ``flags`` are the descriptor's second word as it stands in
    memory, bits 23:20 and 15:8: type 11:8, S 12, DPL 14:13, P 15, AVL 20, L 21, D/B 22, G 23 (SDM 3A, 3.4.5).
    """

    selector: int
    base: int
    limit: int
    flags: int

    @property
    def type(self) -> int:
        """Bits 11:8."""
        return self.flags >> 8 & 0xF

    @property
    def dpl(self) -> int:
        """Bits 14:13."""
        return self.flags >> 13 & 3

    @property
    def present(self) -> bool:
        """Bit 15."""
        return bool(self.flags & 0x8000)

    @property
    def long(self) -> bool:
        """Bit 21, L: 64-bit code."""
        return bool(self.flags & 0x20_0000)

    @property
    def default_big(self) -> bool:
        """Bit 22, D/B: 32-bit code or stack."""
        return bool(self.flags & 0x40_0000)


class DescriptorTable(NamedTuple):
    """GDTR or IDTR."""

    base: int
    limit: int


@dataclass(frozen=True, slots=True)
class ContextState:
    """One vCPU's place in an engine, saved: ``registers`` are the engine's own bytes, which another build may refuse.

    ``carried``: what the pause-loop window and the charge for code had come to. The rest is as the attributes say.
    """

    registers: bytes
    flags_changed: bool
    carried: tuple[int, int, int]
    window: bool
    nmi_window: bool
    ple_window: int
    ss_shadow: bool


class Registers(Protocol):
    """Sixteen 64-bit registers."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class CpuState(Protocol):
    """The architectural state of one vCPU, as the mechanisms read and write it.

    Writes are *state loads*: nothing is checked and nothing faults; derived state (CPL and size bits, TLB) follows.
    """

    #: Sixteen general registers, indexed by :class:`Reg`; writing stores 64 bits.
    @property
    def gpr(self) -> Registers: ...

    rip: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    #: The states that XSAVE knows: x87 1, SSE 2, PKRU 0x200.
    xcr0: int
    #: Rights of protection keys: for each of 16, access disabled, then writes disabled.
    pkru: int
    #: Current privilege level, 0–3.
    cpl: int
    #: An STI or MOV-SS shadow covers the next instruction.
    interrupt_shadow: bool
    #: NMIs are blocked: one is being served, and no IRET came since.
    nmi_masked: bool
    gdt: DescriptorTable
    idt: DescriptorTable

    #: KVM's bits (the general registers by number, RIP 16, PDPTR 17, CR3 18, RFLAGS 19, SEGMENTS 20): which the engine
    #: would not have to compute first, and which it must be handed before the guest runs.
    @property
    def regs_avail(self) -> int: ...
    @property
    def regs_dirty(self) -> int: ...

    @property
    def long_mode(self) -> bool:
        """64-bit code runs: EFER.LMA and CS.L."""

    def selector(self, which: Seg) -> int: ...

    def segment(self, which: Seg) -> Segment: ...
    def set_segment(self, which: Seg, value: Segment) -> None: ...
    def get_dr(self, index: int) -> int: ...
    def set_dr(self, index: int, value: int) -> None: ...


class GuestPort(Protocol):
    """What a vCPU answers, from inside a slice. RIP is at the instruction; the engine moves it on afterwards
    unless the answer was a fault (``None`` or False where the signature allows it), which the port has then
    already injected or queued.

    Every call is plain code: it may change the vCPU's state, lower the slice's limit through the clock, or ask
    the engine to leave (:meth:`Engine.leave`); it must not wait.
    """

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]: ...
    def on_rdmsr(self, index: int) -> int | None: ...
    def on_wrmsr(self, index: int, value: int) -> bool: ...
    def on_rdtsc(self) -> int: ...
    def on_io_permission(self, port: int, size: int) -> bool:
        """Whether code that is not at CPL 0 may touch these ports; else the engine raises #GP(0)."""

    def on_in(self, port: int, size: int) -> int: ...
    def on_out(self, port: int, size: int, value: int) -> None: ...
    def on_mmio_read(self, gpa: int, size: int) -> int: ...
    def on_mmio_write(self, gpa: int, size: int, value: int) -> None: ...
    def is_users(self, gpa: int, size: int) -> bool:
        """Whether the embedding program answers loads of this place."""

    def on_user_read(self, gpa: int, size: int) -> bool:
        """A load that has not happened: whether it is the embedding program's, and the slice leaves with it."""

    def on_hypercall(self, number: int, a0: int, a1: int, a2: int, a3: int, cpl: int) -> int:
        """RAX, RBX, RCX, RDX and RSI, and RAX's new value: 32 bits of each outside 64-bit code."""

    def on_cr_read(self, register: int) -> int | None: ...
    def on_cr_write(self, register: int, value: int) -> bool: ...
    def on_dr_read(self, register: int) -> int | None: ...
    def on_dr_write(self, register: int, value: int) -> bool: ...
    def on_load_tr(self, selector: int) -> bool: ...
    def on_load_ldt(self, selector: int) -> bool: ...
    def on_load_table(self, table: DescriptorTable, *, interrupts: bool) -> bool:
        """LIDT if ``interrupts``, else LGDT."""

    def on_interrupt_return(self, width: int) -> bool:
        """IRET in long mode, ``width`` bytes an operand; RIP is where it returned to, or its fault's handler."""

    def on_rsm(self) -> None: ...

    @property
    def hears_exceptions(self) -> bool:
        """Whether :meth:`on_exception` is to be called for each; else, from the next slice on, an engine may deliver by
        itself what :meth:`Context.deliver` can, but for #DB, at the price of an injection."""

    def on_exception(self, vector: int, error_code: int | None, address: int) -> None: ...
    def on_soft_interrupt(self, vector: int, length: int, kind: EventKind) -> None:
        """INT n, INT3, INTO or INT1, ``length`` bytes long."""

    def on_irq_window(self) -> None: ...
    def on_nmi_window(self) -> None: ...
    def on_step(self) -> None:
        """Before an instruction of a context that steps; it may leave instead."""

    def on_stepped(self) -> None:
        """After it."""

    def on_hlt(self) -> None: ...
    def on_pause_loop(self) -> None: ...


class Context(Protocol):
    """One vCPU's place in an engine."""

    #: Go instruction by instruction, with :meth:`GuestPort.on_step` and :meth:`GuestPort.on_stepped` around each.
    stepping: bool
    #: While stepping: the instruction before has loaded SS, and holds instruction breakpoints back (as on Intel's).
    ss_shadow: bool
    #: While stepping, note the accesses to memory for :meth:`take_accesses`.
    watching: bool
    #: The pause-loop window, ns; negative: no pause-loop exits.
    ple_window: int
    #: The generation of the memory map that the running slice reads; -1 while none runs.
    map_generation: int

    @property
    def state(self) -> CpuState: ...

    @property
    def is_loaded(self) -> bool:
        """Whether the registers are in the CPU, not in a copy."""

    def take_accesses(self) -> Sequence[tuple[int, int, bool]]:
        """The last instruction's accesses: physical address, size, whether it was a write."""

    def reset(self, *, init: bool) -> None:
        """Power-on state, or INIT's (``init``; SDM vol. 3A, table 10-1): caches and FPU survive INIT."""

    def run(self, limit: int) -> Exit:
        """Run until the clock's cell reaches ``limit`` (ns), an exit leaves, or somebody kicks. Never waits."""

    def request_irq_window(self, wanted: bool) -> None:
        """Ask for :meth:`GuestPort.on_irq_window` as soon as the guest can take an interrupt."""

    def request_nmi_window(self, wanted: bool) -> None:
        """Ask for :meth:`GuestPort.on_nmi_window` as soon as NMIs are not blocked."""

    def finish_read(self, data: Mapping[int, int]) -> tuple[int, int] | None:
        """Between slices: the load that left gets its bytes (by guest physical address), and its instruction is
        executed. What it still lacks, as (address, size), or None when it is done."""

    @property
    def ins_address(self) -> int | None:
        """Where the last INS that left stored its element, a linear address; None after IN."""

    def flush_tlb(self) -> None: ...
    def deliver(self, vector: int, kind: EventKind, error_code: int | None, return_rip: int | None) -> bool:
        """As :func:`aiovm.delivery.deliver`, where the engine can and nothing stands in the way. False: nothing has
        changed, and the caller must do it."""

    def take_delivered(self) -> bytes:
        """The vectors of the exceptions, the last eight at most, that the engine has delivered without asking the port
        since this was last asked."""

    def set_tsc(self, ratio: int, offset: int) -> None:
        """The guest's TSC is the machine's, scaled (48 fraction bits), plus ``offset``: an engine may answer RDTSC."""

    def read_msr(self, index: int) -> int:
        """An MSR that the core holds; the caller knows which."""

    def msr_writer(self, index: int) -> Callable[[int], None]:
        """What stores an MSR that the core holds; the caller checks the value."""

    def save(self) -> ContextState: ...
    def restore(self, state: ContextState) -> None: ...
    def get_fpu(self) -> KvmFpu: ...
    def set_fpu(self, fpu: KvmFpu) -> None: ...


class Engine(Protocol):
    """One machine's CPU engine."""

    def create_context(self, index: int, port: GuestPort) -> Context: ...

    def kick(self) -> None:
        """End the running slice soon, from any thread."""

    def leave(self, exit_: Exit) -> None:
        """From inside a port's answer: end the slice after this instruction with ``exit_``."""

    def close(self) -> None: ...
