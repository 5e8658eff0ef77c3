"""One vCPU on the engine: its registers while another one is in the core, and what the vCPU's code asks of it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import ContextState, Reg, Seg, Segment
from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.fpu import read_fpu, write_fpu
from aiovm.engine.unicorn.layout import EFER_MSR, ENV_END, MSRS, Env, Hf
from aiovm.engine.unicorn.state import EnvState, Views
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiovm.engine.base import GuestPort
    from aiovm.engine.unicorn.engine import UnicornEngine
    from aiovm.events import EventKind
    from aiovm.exits import Exit
    from aiovm.kvm_structs import KvmFpu

__all__ = ["UnicornContext"]

_EIP: Final = Env.EIP >> 3
_HFLAGS: Final = Env.HFLAGS >> 2
_M32: Final = 0xFFFF_FFFF
#: MSRs that are the bases of FS and GS.
_BASES: Final = frozenset({0xC000_0100, 0xC000_0101})
#: 32-bit MSRs of the core.
_NARROW: Final = frozenset({0x174, 0xC000_0084, 0xC000_0103})


class UnicornContext:
    """One vCPU on the engine (:class:`~aiovm.engine.base.Context`)."""

    def __init__(self, engine: UnicornEngine, index: int, port: GuestPort) -> None:
        self.engine = engine
        self.index = index
        self.port = port
        self.buffer = bytearray(engine.core.template)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        #: The registers, wherever they are.
        self._stored = Views.of(memoryview(self.buffer))
        self.state = EnvState(self._read_flags, self._stored)
        self.window = False
        self.nmi_window = False
        #: Stop after each instruction: see :meth:`aiovm.engine.base.GuestPort.on_step`.
        self.stepping = False
        self.watching = False
        self.ss_shadow = False
        self.accesses: list[tuple[int, int, bool]] = []
        #: See :meth:`take_delivered`; while another vCPU is loaded.
        self.delivered = b""
        #: Budget state of this vCPU while another one is loaded: frac, ple_first, ple_last.
        self.carried = (0, 0, 0)
        self.ple_window = -1
        self.map_generation = -1
        #: Bytes by guest physical address that the embedding program has given for the load at RIP.
        self.answers: dict[int, int] = {}
        #: Ratio and offset of the guest's TSC.
        self.tsc = (0, 0)
        self.reset(init=False)

    @property
    def is_loaded(self) -> bool:
        return self.engine.current is self

    def bind(self, views: Views | None) -> None:
        """The engine moved the registers to the core, or back (None)."""
        self.state.bind(self._stored if views is None else views)

    @property
    def linear_rip(self) -> int:
        """RIP with CS's base."""
        state = self.state
        rip: int = state.q[_EIP]
        return rip if state.d[_HFLAGS] & Hf.CS64 else rip + state.q[Env.SEGS + 24 + 8 >> 3] & _M32

    def _read_flags(self) -> int:
        self.engine.load(self)
        return self.engine.core.read_register(lib.x86.UC_X86_REG_EFLAGS)

    def reset(self, *, init: bool) -> None:
        """Power-on or INIT (SDM vol. 3A, table 10-1; KVM ``kvm_vcpu_reset``): real mode at F000:FFF0.

        INIT keeps the FPU, SSE state and the MSRs; CR0 keeps CD and NW.
        """
        s = self.state
        cr0 = s.cr0
        if not init:
            if self.engine.current is self:
                self.engine.unload()
            self.buffer[:] = self.engine.core.template
        for register in range(16):
            s.gpr[register] = 0
        s.gpr[Reg.RDX] = self.engine.signature
        s.efer = 0
        s.cr3 = s.cr4 = s.cr2 = 0
        s.cr0 = 0x10 | cr0 & 0x6000_0000 if init else 0x6000_0010
        for which in (Seg.ES, Seg.SS, Seg.DS, Seg.FS, Seg.GS):
            s.set_segment(which, Segment(0, 0, 0xFFFF, 0x9300))
        s.set_segment(Seg.CS, Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B00))
        s.set_segment(Seg.LDTR, Segment(0, 0, 0xFFFF, 0x8200))
        s.set_segment(Seg.TR, Segment(0, 0, 0xFFFF, 0x8B00))
        s.gdt = s.gdt._replace(base=0, limit=0xFFFF)
        s.idt = s.idt._replace(base=0, limit=0xFFFF)
        for index in range(4):
            s.set_dr(index, 0)
        s.set_dr(6, 0xFFFF_0FF0)
        s.set_dr(7, 0x400)
        s.rip = 0xFFF0
        s.rflags = 2
        s.cpl = 0
        s.interrupt_shadow = self.ss_shadow = False
        s.nmi_masked = False

    def take_accesses(self) -> list[tuple[int, int, bool]]:
        taken, self.accesses = self.accesses, []
        return taken

    def request_irq_window(self, wanted: bool) -> None:
        self.window = wanted
        if self.engine.current is self:
            self.engine.apply_windows(self)

    def request_nmi_window(self, wanted: bool) -> None:
        self.nmi_window = wanted
        if self.engine.current is self:
            self.engine.apply_windows(self)

    def set_tsc(self, ratio: int, offset: int) -> None:
        self.tsc = (ratio, offset)
        if self.engine.current is self:
            self.engine.load_tsc(self)

    def finish_read(self, data: Mapping[int, int]) -> tuple[int, int] | None:
        self.answers.update(data)
        return self.engine.finish_read(self)

    @property
    def ins_address(self) -> int | None:
        return self.engine.io.ins_address

    def flush_tlb(self) -> None:
        self.state.paging_changed = True

    def deliver(self, vector: int, kind: EventKind, error_code: int | None, return_rip: int | None) -> bool:
        self.engine.load(self)
        if not self.engine.budget.deliver(vector, kind, error_code, return_rip):
            return False
        self.state.flags_changed = True
        return True

    def take_delivered(self) -> bytes:
        taken, self.delivered = self.delivered, b""
        return taken + self.engine.budget.take_delivered() if self.is_loaded else taken

    def read_msr(self, index: int) -> int:
        """An MSR that the core holds (one of the SYSCALL, base, SYSENTER, EFER or PAT registers)."""
        if index == EFER_MSR:
            return self.state.efer
        value: int = self.state.q[MSRS[index] >> 3]
        return value & _M32 if index in _NARROW else value

    def msr_writer(self, index: int) -> Callable[[int], None]:
        state, half, word = self.state, MSRS[index] >> 2, MSRS[index] >> 3

        def narrow(value: int) -> None:
            state.d[half] = value & _M32

        def base(value: int) -> None:
            state.q[word] = value
            state.guard_bases()

        def plain(value: int) -> None:
            state.q[word] = value

        return narrow if index in _NARROW else base if index in _BASES else plain

    def save(self) -> ContextState:
        """A copy. Whoever runs next begins without translations, of code or of addresses, as after :meth:`restore`."""
        if self.engine.current is self:
            self.engine.unload()
        self.engine.forget_translations()
        state = self.state
        state.paging_changed = True
        return ContextState(
            bytes(self.buffer),
            state.flags_changed,
            self.carried,
            self.window,
            self.nmi_window,
            self.ple_window,
            self.ss_shadow,
        )

    def restore(self, state: ContextState) -> None:
        """Take over a saved state."""
        if len(state.registers) != ENV_END:
            raise ConfigError(f"a saved CPU is {ENV_END:#x} bytes, not {len(state.registers):#x}")
        if self.engine.current is self:
            self.engine.unload()
        self.buffer[:] = state.registers
        self.state.flags_changed = state.flags_changed
        self.state.paging_changed = True
        self.carried = state.carried
        self.window, self.nmi_window, self.ple_window = state.window, state.nmi_window, state.ple_window
        self.ss_shadow = state.ss_shadow

    def get_fpu(self) -> KvmFpu:
        return read_fpu(self)

    def set_fpu(self, fpu: KvmFpu) -> None:
        write_fpu(self, fpu)

    def run(self, limit: int) -> Exit:
        return self.engine.run(self, limit)
