"""The slice's budget: the structure that the block hook shares, and the hook's Python twin.

Rules (both hooks follow them; tests compare them):

* Time is charged when a block starts, ``size`` code bytes at ``rate``/256 ns, the fraction carried along. The limit is
  tested first, and nothing is charged when the slice stops or when the core is about to leave before the block:
  so overshoot stays below one block, and neither caches nor translation history can be seen in the time.
* A block begins without RFLAGS.RF, which lasts for one instruction (SDM vol. 3B, 18.3.1.1); the core would keep it,
  and push it, until some indirect jump. Not while the engine steps (it clears RF itself) nor on the public path.
* With a machine's counter given (:meth:`Budget.serve_tsc`), the C hook answers RDTSC and RDTSCP by itself, as the port
  would (:mod:`aiovm.tsc`); forms with prefixes and single steps go to Python.
* The C hook loads CR3 by itself, too, when it was told how wide that is (:meth:`Budget.serve_cr3`), and 64-bit code
  stores a value that is no wider. Wider ones, other modes and single steps go to Python.
* The C hooks carry CPUID, RDMSR, WRMSR, hypercalls, IN, OUT, and loads and stores where no memory is, to the running
  vCPU's port and the answers back, as :mod:`~aiovm.engine.unicorn.intercepts`, :mod:`~aiovm.engine.unicorn.io` and the
  engine do where there is no C; forms with prefixes, single steps, EFER and I/O outside CPL 0 go there.
* The C hook delivers events in long mode where nothing stands in the way (:meth:`Budget.deliver`), to the last bit as
  :mod:`aiovm.delivery`; and exceptions by itself when the slice's port does not want to hear of them. #DB, #UD, #GP,
  single steps and whatever has something to judge or to set go to Python.
* The C hook lets a plain IRET that loses no base through to the core, uncharged; others go to Python.
* The core computes arithmetic flags when somebody asks. Before an event is reported they are computed, for they will be
  pushed.
* A slice whose time is over, or that somebody ended, stops at the end of an exit: faults on faults may never reach a
  block.
* A PAUSE costs ``pause_cost`` and is stepped over. At CPL 0, PAUSEs closer than ``ple_gap`` (end of one to start of the
  next) belong to one loop; when a loop has lasted longer than ``ple_window`` the pause-loop exit is reported and a
  new loop begins (SDM vol. 3C, 25.1.3).

* A page that holds no code is filled into the TLB without the right to execute when data is what it is wanted for:
  the core would send each store to an executable page through a slow path, four to twenty times as long. The C hook
  does so by standing before the core's page walk (:meth:`Budget.spare_stores`); guests cannot see it, so there is no
  twin. From there it also keeps the host's clock out of the TLB's size. And at each new translation it looks for the
  page's TLB entry where that can be, not in the whole TLB (:mod:`~aiovm.engine.unicorn.calls`).
* A page of a slot whose dirty log was taken is filled without the right to be stored to until a store is what it is
  wanted for, and that is noted; so are the Accessed and Dirty bits that the core's page walk sets. Who takes the log
  flushes the TLB. Without the C hook the log compares bytes (:mod:`aiovm.memory`).
* A translated block begins with the block hook and with the core's look whether to leave. The C hook looks too, and
  leaves by the core's function; so blocks are translated without the second call.

``NATIVE`` says whether the C extension was built.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from ctypes import c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.control import MAXPHYADDR
from aiovm.engine.unicorn import calls, lib
from aiovm.engine.unicorn.layout import (
    CLASS_TLB_FILL,
    CPU_CLASS,
    CPU_TLB,
    MMU_MODES,
    MSRS,
    SEGMENT_SIZE,
    TLB_CODE,
    TLB_ENTRY_BITS,
    Env,
    Hf,
    Intercept,
)
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.engine.base import GuestPort

try:
    from aiovm.engine.unicorn import _budget  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # no compiler when the package was installed
    _budget = None

__all__ = ["FAULTED", "INTERRUPTS", "NATIVE", "PHYSICAL_END", "Budget", "BudgetStruct", "DeviceRange", "Handlers"]

NATIVE: Final[bool] = _budget is not None

_TSC_AUX: Final = 0xC000_0103
_KNOWS_MONOTONIC: Final = sys.platform == "linux"

_RF: Final = 1 << 16
_RFLAGS: Final = lib.x86.UC_X86_REG_EFLAGS
_OSZAPC: Final = 0x8D5
#: The core's word for arithmetic flags that it has computed.
_COMPUTED: Final = 1
#: Who is told of these asks for the flags.
_EVENTS: Final = frozenset(
    0x100 + code for code in (*range(Intercept.EXCEPTION, Intercept.EXCEPTION + 32), Intercept.VINTR, Intercept.SWINT)
)
PAUSE: Final = 0x100 + Intercept.PAUSE

# The core's own functions before which the C hooks stand.
_TLB_FILL: Final = "x86_cpu_tlb_fill_x86_64"
_NEW_CODE: Final = "tlb_reset_dirty_by_vaddr_x86_64"
_LEAVE: Final = "helper_check_exit_request_x86_64"
_CALL: Final = "tcg_gen_callN_x86_64"
_INLINE_HOOK: Final = "uc_add_inline_hook_x86_64"
_WALK_STORE: Final = "x86_stl_phys_notdirty_x86_64"
#: How much of ``uc_struct`` is searched for its pointer to the last one, in words.
_UC_WORDS: Final = 0x100
#: The core's interrupt numbers are below; 0, which it does not use, is a fault that a carried instruction has raised.
INTERRUPTS: Final = 0x200
#: Behind the last guest physical address.
PHYSICAL_END: Final = 1 << MAXPHYADDR
FAULTED: Final = 0


class BudgetStruct(ctypes.Structure):
    """Mirror of ``_budget.h``'s structure."""

    _fields_ = (
        ("cells", c_void_p),
        ("rate", c_int64),
        ("frac", c_int64),
        ("stops", c_int64),
        ("pauses", c_int64),
        ("pause_cost", c_int64),
        ("ple_gap", c_int64),
        ("ple_window", c_int64),
        ("ple_first", c_int64),
        ("ple_last", c_int64),
        ("exit_pending", c_void_p),
        ("eip", c_void_p),
        ("hflags", c_void_p),
        ("windows", c_void_p),
        ("cs_base", c_void_p),
        ("stop", c_void_p),
        ("costs", c_void_p),
        ("exit_cost", c_int64),
        ("interrupt", ctypes.py_object),
        ("fail", ctypes.py_object),
        ("port_in", ctypes.py_object),
        ("port_out", ctypes.py_object),
        ("behind_io", ctypes.py_object),
        ("port", ctypes.py_object),
        ("fetch", c_void_p),
        ("code", c_uint64),
        ("translate", c_void_p),
        ("code_pages", c_void_p),
        ("code_page_count", c_uint64),
        ("ram", c_void_p),
        ("logs", c_int64),
        ("regs", c_void_p),
        ("eflags", c_void_p),
        ("cc_source", c_void_p),
        ("cc_operation", c_void_p),
        ("read_register", c_void_p),
        ("flags_register", c_int64),
        ("tsc_aux", c_void_p),
        ("tsc_khz", c_int64),
        ("tsc_epoch", c_int64),
        ("tsc_last", c_uint64),
        ("tsc_ratio", c_uint64),
        ("tsc_offset", c_uint64),
        ("start", c_void_p),
        ("cpu", c_void_p),
        ("tlb_flushes", c_uint64 * MMU_MODES),
        ("tlb", c_void_p),
        ("flush_tlb", c_void_p),
        ("cr3", c_void_p),
        ("pkru", c_void_p),
        ("cr3_width", c_int64),
        ("resume", c_void_p),
        ("intercepts", c_void_p),
        ("resume_after", c_void_p),
        ("returning", c_uint64),
        ("returned", c_int64),
        ("counted", c_int64),
        ("uc", c_void_p),
        ("leave", c_void_p),
        ("translation", c_void_p),
        ("efer", c_void_p),
        ("direction", c_void_p),
        ("error_code", c_void_p),
        ("fault_address", c_void_p),
        ("inject_cost", c_int64),
        ("unheard", c_int64),
        ("delivered", c_int64),
        ("vectors", ctypes.c_uint8 * 8),
    )
    if TYPE_CHECKING:
        rate: int
        frac: int
        stops: int
        pauses: int
        pause_cost: int
        ple_gap: int
        ple_window: int
        ple_first: int
        ple_last: int
        code: int
        tsc_khz: int
        tsc_epoch: int
        tsc_last: int
        tsc_ratio: int
        tsc_offset: int
        cr3_width: int
        exit_cost: int
        port: GuestPort
        uc: int | None
        logs: int
        fault_address: int
        inject_cost: int
        unheard: int
        delivered: int
        vectors: ctypes.Array[ctypes.c_uint8]


class _MemoryRange(ctypes.Structure):
    """``memory_range``."""

    _fields_ = (("base", c_uint64), ("end", c_uint64), ("host", c_uint64), ("is_writable", c_uint64), ("log", c_uint64))


class _TlbTable(ctypes.Structure):
    """``CPUTLBDescFast``."""

    _fields_ = (("mask", c_uint64), ("entries", c_uint64))
    if TYPE_CHECKING:
        mask: int
        entries: int


class DeviceRange(ctypes.Structure):
    """For the C hooks of loads and stores where no memory is: the budget, by its address, and the first address."""

    _fields_ = (("budget", c_void_p), ("base", c_uint64))


class _Block(ctypes.Structure):
    """``uc_tb``."""

    _fields_ = (("pc", ctypes.c_uint64), ("icount", ctypes.c_uint16), ("size", ctypes.c_uint16))


class Handlers(NamedTuple):
    """What the hooks call in Python."""

    #: An exit, by its number.
    interrupt: Callable[[int], None]
    #: What Python raised.
    fail: Callable[[BaseException], None]
    #: IN (port, size) and OUT (port, size, value) of code that is not at CPL 0.
    port_in: Callable[[int, int], int]
    port_out: Callable[[int, int, int], None]
    #: IN (port, False) or OUT (port, True) was answered, and the slice is over or an interrupt waits.
    behind_io: Callable[[int, bool], None]


class Budget:
    """One engine's budget. ``native`` chooses the C hook.

    ``cells`` is the clock's pair (now, limit), a writable ``q`` view; ``pending``, ``windows`` and ``env`` are
    addresses inside the core: its pending exit, the interrupts that wait, its CPU state (all 0 on the public path,
    where exits always go to Python). Where memory is, :meth:`cover` is told.
    """

    def __init__(
        self,
        cells: memoryview,
        *,
        native: bool,
        handlers: Handlers,
        pending: int,
        windows: int,
        env: int,
    ) -> None:
        self.native = native
        self.cells = cells
        self._quiet = ctypes.c_uint16(0)
        self._no_flags = ctypes.c_uint64(0)
        self._flags = ctypes.c_uint64.from_address(env + Env.EFLAGS) if env else self._no_flags
        self._physical = ctypes.c_uint64()
        s = self.struct = BudgetStruct()
        s.cells = ctypes.addressof(ctypes.c_char.from_buffer(cells))
        s.exit_pending = pending or ctypes.addressof(self._quiet)
        if env:
            s.eip = env + Env.EIP
            s.hflags = env + Env.HFLAGS
            s.cs_base = env + Env.SEGS + SEGMENT_SIZE + 8
            s.regs = env
            s.eflags = env + Env.EFLAGS
            s.cc_source = env + Env.CC_SRC
            s.cc_operation = env + Env.CC_OP
            s.tsc_aux = env + MSRS[_TSC_AUX]
            s.windows = windows
            s.intercepts = env + Env.INTERCEPT
            s.cr3 = env + Env.CR + 24
            s.pkru = env + Env.PKRU
            s.efer = env + Env.EFER
            s.direction = env + Env.DF
            s.error_code = env + Env.ERROR_CODE
        self.clear_resume(True)
        s.tsc_epoch = -1
        #: What an interrupt number costs, ns; PAUSE has a price of its own.
        self.costs = (c_int64 * INTERRUPTS)()
        s.costs = ctypes.addressof(self.costs)
        s.stop = lib.address_of(lib.uc_emu_stop)
        s.ple_window = -1
        #: One byte a guest page: 1 when code was translated from it since :meth:`forget_code`. Sparse: the host gives
        #: memory for what was touched.
        self.code_pages = mmap.mmap(-1, PHYSICAL_END // PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.code_pages.madvise(mmap.MADV_NOHUGEPAGE)
        s.code_pages = ctypes.addressof(ctypes.c_char.from_buffer(self.code_pages))
        s.code_page_count = len(self.code_pages)
        #: The guest's first store to a page since a log was taken is noted in that log (the C hook alone).
        self.notes_stores = False
        self.cover(())
        s.translate = lib.address_of(lib.uc_vmem_translate)
        s.fetch = lib.address_of(lib.uc_vmem_read)
        s.read_register = lib.address_of(lib.uc_reg_read)
        s.flags_register = _RFLAGS
        self._handlers = handlers
        s.interrupt, s.fail, s.port_in, s.port_out, s.behind_io = handlers
        self._delivers = native and bool(env)
        #: C functions for IN and OUT, and for loads and stores where no memory is; 0: Python's are called.
        self.on_in = self.on_out = self.on_mmio_read = self.on_mmio_write = 0
        self.address = ctypes.addressof(s)
        if native:
            if _budget is None:
                from aiovm.errors import ConfigError

                raise ConfigError(
                    "the native block hook is not built: install with a C compiler, or use the Python twin"
                )
            s.start = lib.address_of(lib.uc_emu_start)
            core = [lib.internal(name) for name in (_TLB_FILL, _LEAVE, _CALL, _INLINE_HOOK, _WALK_STORE)]
            *hooks, size = _budget.addresses(core[0], CPU_TLB, *core[1:])
            assert size == ctypes.sizeof(BudgetStruct)
            self.on_block = hooks[0 if env else 1]
            if env:
                s.leave = core[1]  # other cores' blocks may have been shortened already
            self.on_interrupt, self.on_translate, self._on_fill, self._on_new_code = hooks[2:6]
            self._on_call, self._on_inline_hook, self._enter = hooks[6:9]
            if env:
                self.on_in, self.on_out = hooks[9:11]
            self.on_mmio_read, self.on_mmio_write, self._on_walk_store = hooks[11:]
        else:
            self._pending = ctypes.c_uint16.from_address(s.exit_pending)
            self._eip = ctypes.c_uint64.from_address(env + Env.EIP) if env else None
            self._hflags = ctypes.c_uint32.from_address(env + Env.HFLAGS) if env else None
            if env:
                self._source = ctypes.c_uint64.from_address(env + Env.CC_SRC)
                self._operation = ctypes.c_uint32.from_address(env + Env.CC_OP)
                self._computed = ctypes.c_uint64()
            self._block_twin = lib.HOOK_BLOCK_T(self._twin_block)
            self._interrupt_twin = lib.HOOK_INTR_T(self._twin_interrupt)
            self.on_block = lib.address_of(self._block_twin)
            self.on_interrupt = lib.address_of(self._interrupt_twin)
            self._translate_twin = lib.HOOK_EDGE_T(self._twin_translate)
            self.on_translate = lib.address_of(self._translate_twin)

    def deliver(self, vector: int, kind: int, error_code: int | None, return_rip: int | None) -> bool:
        """In C, with the loaded vCPU's registers: see :meth:`aiovm.engine.base.Context.deliver`."""
        if not self._delivers:
            return False
        error = -1 if error_code is None else error_code
        delivered: bool = _budget.deliver(self.address, vector, kind, error, return_rip)
        return delivered

    def take_delivered(self) -> bytes:
        """The vectors of the last exceptions that C delivered by itself, oldest first; they are counted no more."""
        s = self.struct
        count = s.delivered
        if not count:
            return b""
        s.delivered = 0
        return bytes(s.vectors[at & 7] for at in range(max(0, count - 8), count))

    def entry(self, uc: c_void_p, *, release_gil: bool) -> Callable[[int, int], int]:
        """What runs the core's code from an address, so many instructions or, with 0, until a hook stops it."""
        self.struct.uc = uc.value
        if self.native:
            prototype = ctypes.CFUNCTYPE if release_gil else ctypes.PYFUNCTYPE
            return partial(prototype(c_int, c_void_p, c_void_p, c_uint64, c_size_t)(self._enter), self.address, uc)
        start = lib.uc_emu_start if release_gil else lib.uc_emu_start_holding
        return lambda rip, count: start(uc, rip, 0, 0, count)

    def serve_tsc(self, khz: int, epoch: int | None) -> None:
        """The machine's counter runs at ``khz``.

        ``epoch``: on the wall clock, ``time.monotonic_ns()`` at the machine's time 0; else time is ``cells[0]``. Only
        where the C hook knows that clock; elsewhere Python goes on answering.
        """
        s = self.struct
        if s.regs and (epoch is None or _KNOWS_MONOTONIC):
            s.tsc_khz = khz
            s.tsc_epoch = -1 if epoch is None else epoch

    def clear_resume(self, wanted: bool) -> None:
        """Whether a block clears RFLAGS.RF."""
        self._resume = self._flags if wanted else self._no_flags
        self.struct.resume = ctypes.addressof(self._resume)

    def serve_cr3(self, width: int) -> None:
        """CR3 has so many bits. After :meth:`spare_stores` has found the TLB."""
        if self.struct.cpu:
            self.struct.cr3_width = width

    def cover(self, ram: Sequence[tuple[int, int, int, bool, int]]) -> None:
        """Memory is at these ranges: first address, the one behind the last, the host's; whether it may be stored to;
        and the host's of the log of stores, or 0. The caller flushes the TLB."""
        self._ram = (_MemoryRange * (len(ram) + 1))(*(_MemoryRange(*one) for one in ram))
        self.struct.ram = ctypes.addressof(self._ram)
        self.struct.logs = sum(log != 0 for *_, log in ram)

    def spare_stores(self, cpu: int, seen: int) -> None:
        """Let data accesses fill the TLB of the core at ``cpu`` without the right to execute (the C hook alone).

        ``seen``: an address whose code has just run. Its TLB entry proves that the core is laid out as we believe.
        """
        if not self.native:
            return
        tables = (_TlbTable * MMU_MODES).from_address(cpu + CPU_TLB)
        entries = [t.entries + (seen >> 12 - TLB_ENTRY_BITS & t.mask) for t in tables]
        codes = [ctypes.c_uint64.from_address(entry + TLB_CODE).value for entry in entries]
        fills = (ctypes.c_uint64 * 2).from_address(ctypes.c_uint64.from_address(cpu + CPU_CLASS).value + CLASS_TLB_FILL)
        if seen & -PAGE in codes and list(fills) == [lib.internal(_TLB_FILL)] * 2:
            self.struct.tlb = cpu + CPU_TLB
            self.struct.flush_tlb = lib.internal("tlb_flush_x86_64")
            self.struct.cpu = cpu
            fills[0] = self._on_fill
            if new_code := calls.slot(_NEW_CODE):
                ctypes.c_uint64.from_address(new_code).value = self._on_new_code
            if walk_store := calls.slot(_WALK_STORE):
                ctypes.c_uint64.from_address(walk_store).value = self._on_walk_store
                self.notes_stores = True
            self._shorten_blocks()

    def _shorten_blocks(self) -> None:
        """Blocks translated from now on leave the look whether to leave to the block hook, which is registered once."""
        assert self.struct.uc is not None  # since entry()
        call = calls.slot(_CALL)
        words = (c_uint64 * _UC_WORDS).from_address(self.struct.uc)
        hooks = [at for at, word in enumerate(words) if word == lib.internal(_INLINE_HOOK)]
        if self.struct.leave and call and len(hooks) == 1:
            ctypes.c_uint64.from_address(call).value = self._on_call
            words[hooks[0]] = self._on_inline_hook

    def forget_code(self) -> None:
        """Every translation was thrown away, of code and of addresses."""
        self.code_pages.madvise(mmap.MADV_DONTNEED)  # zeroes

    def _twin_translate(self, uc: int, now: int, _before: int, _user: int) -> None:
        block = _Block.from_address(now)
        self.mark_code(uc, block.pc)
        last = block.pc + max(block.size, 1) - 1
        if (block.pc ^ last) >> 12:
            self.mark_code(uc, last)

    def mark_code(self, uc: int | c_void_p, linear: int) -> None:
        """Code was translated from ``linear``."""
        if not lib.uc_vmem_translate(uc, linear, lib.const.UC_PROT_EXEC, ctypes.byref(self._physical)):
            page = self._physical.value >> 12
            if page < len(self.code_pages):
                self.code_pages[page] = 1

    def _twin_block(self, uc: int, _address: int, size: int, _user: int) -> None:
        if self._pending.value:
            return
        cells, s = self.cells, self.struct
        now = cells[0]
        if now >= cells[1]:
            s.stops += 1
            lib.uc_emu_stop(uc)
            return
        charge = s.frac + size * s.rate
        cells[0] = now + (charge >> 8)
        s.frac = charge & 255
        if self._resume.value & _RF:
            self._resume.value &= ~_RF

    def _twin_interrupt(self, uc: int, number: int, _user: int) -> None:
        if number == PAUSE and self._eip is not None and self._hflags is not None:
            flags = self._hflags.value
            self._eip.value = self._eip.value + 2 if flags & Hf.CS64 else self._eip.value + 2 & 0xFFFF_FFFF
            self._hflags.value = flags & ~Hf.INHIBIT_IRQ
            if not self.pause(flags & Hf.CPL):
                return
        if number in _EVENTS and self._eip is not None:
            self._settle_flags(uc)
        cells = self.cells
        cells[0] += self.costs[number]
        try:
            self._handlers.interrupt(number)
        except BaseException as error:
            self._handlers.fail(error)
        if cells[0] >= cells[1]:
            lib.uc_emu_stop(uc)

    def _settle_flags(self, uc: int) -> None:
        if self._operation.value != _COMPUTED and not lib.uc_reg_read(uc, _RFLAGS, ctypes.byref(self._computed)):
            self._source.value = self._computed.value & _OSZAPC
            self._operation.value = _COMPUTED

    def pause(self, cpl: int) -> bool:
        """Charge one PAUSE at ``cpl``; whether the pause-loop window closed. The core has not moved RIP for it."""
        cells, s = self.cells, self.struct
        now = cells[0]
        end = now + s.pause_cost
        s.pauses += 1
        cells[0] = end
        if s.ple_window < 0 or cpl:
            return False
        if now - s.ple_last > s.ple_gap:
            s.ple_first = now
        s.ple_last = end
        if now - s.ple_first <= s.ple_window:
            return False
        s.ple_first = end
        return True
