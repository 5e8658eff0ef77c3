"""An opened core: its handle, the pages that are its engine's own, and where its state is.

With ``pointers`` the state is reached in the core's memory; else through a ``uc_context``, whose payload is the same
state, and which :meth:`Core.sync_in` and :meth:`Core.sync_out` keep in step (:mod:`~aiovm.engine.unicorn.layout`).
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.layout import (
    CONTEXT_PAYLOAD,
    CPU_ENV,
    CPU_ICOUNT_DECR,
    CPU_INTERRUPT_REQUEST,
    CPU_TO_ENV,
    EFER_MSR,
    ENV_END,
    FEATURES,
    MSRS,
    UC_CPU,
    UC_NO_EXIT_REQUEST,
    VIRQ_BYTE,
    Env,
    Hf,
    Hf2,
    Intercept,
)
from aiovm.engine.unicorn.state import Views
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Core"]

#: Private pages of the engine, above every address that a guest can form (MAXPHYADDR is 40).
_VMCB: Final = 1 << 50
_VMCB_SIZE: Final = 0x8000
_MSRPM: Final = 0x2000
_EXITINFO2: Final = 0x80
_LOOP: Final = 0x4000
_M32: Final = 0xFFFF_FFFF


class Core:
    """One ``Uc`` with everything filled in that intercepts need; ``close`` frees it, or its own end."""

    def __init__(self, *, pointers: bool) -> None:
        self.pointers = pointers
        out = self.handle = ctypes.c_void_p()
        self._scratch = ctypes.create_string_buffer(16)
        self._register = ctypes.c_uint64()
        self._register_at = ctypes.byref(self._register)
        lib.check(lib.open_core(out), "open the core")
        assert out.value is not None
        lib.ctl(out, lib.CTL_TCG_BUFFER, ctypes.c_uint32(32 << 20))
        lib.check(lib.ctl(out, lib.CTL_EXITS_ENABLE, ctypes.c_int(1)), "enable exits")
        self.write_register(lib.x86.UC_X86_REG_MXCSR, 0x1F80)
        self.write_register(lib.x86.UC_X86_REG_FPCW, 0x37F)
        self._map_private_pages()
        self._context = ctypes.c_void_p()
        lib.check(lib.uc_context_alloc(out, ctypes.byref(self._context)), "allocate a context")
        self._free = weakref.finalize(self, _free, out, self._context)
        self._free.atexit = False  # a thread may be in a slice then
        lib.check(lib.uc_context_save(out, self._context), "save the initial state")
        assert self._context.value is not None
        payload = (ctypes.c_char * ENV_END).from_address(self._context.value + CONTEXT_PAYLOAD)
        #: The state of the vCPU that is loaded, and its registers.
        self.live = memoryview(payload).cast("B")
        #: The core's fresh state with the intercepts filled in; a context's reset starts from it.
        self.template = _template(bytes(self.live))
        #: Addresses of CPUX86State, of the core's pending exit and of the interrupts that wait; 0 without pointers.
        self.env = self.pending_at = self.windows_at = 0
        if pointers:
            cpu = ctypes.c_uint64.from_address(out.value + UC_CPU).value
            self.env = ctypes.c_uint64.from_address(cpu + CPU_ENV).value
            assert self.env == cpu + CPU_TO_ENV
            self.pending_at = ctypes.c_uint64.from_address(cpu + CPU_ICOUNT_DECR).value + 2
            self.windows_at = cpu + CPU_INTERRUPT_REQUEST + VIRQ_BYTE
            self._pending = ctypes.c_uint16.from_address(self.pending_at)
            self._windows = ctypes.c_uint8.from_address(self.windows_at)
            self._no_exit_request = ctypes.c_uint8.from_address(out.value + UC_NO_EXIT_REQUEST)
            self.check_exits(False)
            for at, (_, wanted) in FEATURES.items():
                ctypes.c_uint64.from_address(self.env + at).value = wanted
            self.live = memoryview((ctypes.c_char * ENV_END).from_address(self.env)).cast("B")
        self.loaded = Views.of(self.live)

    def _map_private_pages(self) -> None:
        self._private = ctypes.create_string_buffer(_VMCB_SIZE + PAGE)
        start = -(-ctypes.addressof(self._private) // PAGE) * PAGE
        pages = memoryview((ctypes.c_char * _VMCB_SIZE).from_address(start)).cast("B")
        self._exitinfo2 = ctypes.c_uint64.from_address(start + _EXITINFO2)
        lib.check(lib.uc_mem_map_ptr(self.handle, _VMCB, _VMCB_SIZE, 7, start), "map the engine's pages")
        pages[0x48:0x50] = (_VMCB + _MSRPM).to_bytes(8, "little")
        pages[_MSRPM : _MSRPM + 0x2000] = b"\xff" * 0x2000
        for msr in (*MSRS, EFER_MSR):
            at = msr * 2 if msr < 0x2000 else (0x2000 + msr - 0xC000_0000) * 2
            pages[_MSRPM + at // 8] &= ~(1 << at % 8)  # reads pass, writes exit
        pages[_LOOP : _LOOP + 2] = b"\xeb\xfe"  # jmp to itself
        #: Where a loop of the engine's own is.
        self.loop = _VMCB + _LOOP

    def close(self) -> None:
        """Free it."""
        self._free()

    # ---- registers -------------------------------------------------------------------------------------------------

    def read_register(self, register: int) -> int:
        """A register of the loaded vCPU by Unicorn's number."""
        self._register.value = 0
        lib.check(lib.uc_reg_read(self.handle, register, self._register_at), "read a register")
        return self._register.value

    def write_register(self, register: int, value: int) -> None:
        """Store a register of the loaded vCPU by Unicorn's number, with what the core derives from it."""
        self._register.value = value
        lib.check(lib.uc_reg_write(self.handle, register, self._register_at), "write a register")

    def sync_in(self) -> None:
        """Without pointers: the core's registers come to the copy that the state looks at."""
        if not self.pointers:
            lib.check(lib.uc_context_save(self.handle, self._context), "save")

    def sync_out(self) -> None:
        """And back."""
        if not self.pointers:
            lib.check(lib.uc_context_restore(self.handle, self._context), "restore")

    @property
    def fault_address(self) -> int:
        """The linear address of the page fault that the core reports."""
        return self._exitinfo2.value

    @property
    def fault_address_at(self) -> int:
        """Where the core stores it."""
        return ctypes.addressof(self._exitinfo2)

    # ---- what the core does next -----------------------------------------------------------------------------------

    def open_windows(self, waiting: int) -> None:
        """What waits for the guest to take it: bit 0 an interrupt, bit 1 an NMI. Only with pointers."""
        self._windows.value = waiting
        if waiting:
            self._pending.value = 0xFFFF

    def close_windows(self) -> None:
        """Nothing is delivered until :meth:`open_windows`."""
        if self.pointers:
            self._windows.value = 0
            self._pending.value = 0

    def check_exits(self, wanted: bool) -> None:
        """Whether what is translated from now on looks behind each load and store for an exit, as counted instructions
        need, and then restarts them."""
        if self.pointers:
            self._no_exit_request.value = 0 if wanted else 1

    # ---- addresses and code ----------------------------------------------------------------------------------------

    def fetch(self, linear: int, length: int) -> bytes:
        """Code at a linear address as the loaded vCPU sees it; nothing where it may not execute."""
        error = lib.uc_vmem_read(self.handle, linear, lib.const.UC_PROT_EXEC, self._scratch, length)
        return b"" if error else self._scratch.raw[:length]

    @contextmanager
    def unmapping(self) -> Iterator[None]:
        """What is unmapped meanwhile is not looked for page by page: the core would walk the guest's tables from the
        range's physical address as if it were a linear one (and set Accessed bits there), and look through its TLB once
        a page, 76 ns each. The caller has code forgotten; the TLB is flushed all the same. Not without pointers."""
        if not self.pointers:
            yield
            return
        assert self.handle.value is not None
        cpu = ctypes.c_uint64.from_address(self.handle.value + UC_CPU)
        kept, cpu.value = cpu.value, 0
        try:
            yield
        finally:
            cpu.value = kept

    def flush_tlb(self) -> None:
        """Forget every translation of addresses."""
        lib.uc_ctl_0(self.handle, lib.CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        """Forget every translation, of code and of addresses."""
        lib.uc_ctl_0(self.handle, lib.CTL_TB_FLUSH)
        self.flush_tlb()


def _free(handle: ctypes.c_void_p, context: ctypes.c_void_p) -> None:
    lib.uc_context_free(context)
    lib.uc_close(handle)


def _template(fresh: bytes) -> bytes:
    data = bytearray(fresh)
    view = memoryview(data)
    q, d, h = view.cast("Q"), view.cast("I"), view.cast("H")
    d[Env.HFLAGS2 >> 2] |= Hf2.GIF | Hf2.HIF | Hf2.VINTR
    d[Env.HFLAGS >> 2] = Hf.GUEST | Hf.IOBPT
    q[Env.VM_VMCB >> 3] = _VMCB
    q[Env.XCR0 >> 3] = 1
    q[Env.INTERCEPT >> 3] = sum(
        1 << code - 0x60
        for code in (
            Intercept.VINTR, Intercept.RDTSC, Intercept.RDPMC, Intercept.CPUID, Intercept.SWINT, Intercept.PAUSE,
            Intercept.HLT, Intercept.MSR, Intercept.SHUTDOWN, Intercept.VMMCALL, Intercept.RDTSCP, Intercept.NMI,
            Intercept.RSM, *range(Intercept.IDTR_READ, Intercept.TR_WRITE + 1),
        )
    )  # fmt: skip
    d[Env.INTERCEPT_EXCEPTIONS >> 2] = _M32
    h[Env.INTERCEPT_CR_READ >> 1] = 1 << 0 | 1 << 8
    h[Env.INTERCEPT_CR_WRITE >> 1] = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 8
    h[Env.INTERCEPT_DR_READ >> 1] = h[Env.INTERCEPT_DR_WRITE >> 1] = 0xFF
    return bytes(data)
