"""Real machine code on Unicorn: one ``Uc`` a machine, one context a vCPU, intercepts answered in place.

How it works. The core (QEMU 5.0.1's TCG) has AMD-V intercept checks. With HF_GUEST set in ``hflags`` and the masks
filled in, an intercepted event arrives in the interrupt hook as ``0x100 +`` the SVM exit code, RIP at the
instruction and the state live: the hook answers by calling the vCPU's :class:`~aiovm.engine.base.GuestPort`, and the
guest goes on in the same slice. What must wait leaves: the port calls :meth:`UnicornEngine.leave`.

Rules that keep a guest whole (each is a measured fact of this build; docs/design.md tells how):

* One instance a machine, its vCPUs one at a time: LOCK is not atomic across instances, and they do not see each
  other's code changes.
* Slices end only from inside a hook, before a block's first instruction. Asynchronous stops re-execute half-done
  instructions; a kick therefore lowers the limit, and the block hook stops.
* ``no_exit_request`` is set before anything is translated, else every load and store may restart its instruction.
* Stale translations are dropped when the host writes to guest memory that may hold code.
* An I/O instruction is left exactly: the core's own I/O breakpoint raises #DB right behind it.
* vCPUs with equal paging registers share the TLB's contents; others flush at the switch.

A Python error in a hook would be swallowed by the C boundary: it is kept, the slice ends, and :meth:`run` raises it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import ContextState, Reg, Seg, Segment
from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.budget import NATIVE, Budget, DeviceRange, Handlers
from aiovm.engine.unicorn.claims import READ_REFUSED, Claims
from aiovm.engine.unicorn.fpu import read_fpu, write_fpu
from aiovm.engine.unicorn.intercepts import Intercepts, interrupt_costs
from aiovm.engine.unicorn.io import PortIo
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
from aiovm.engine.unicorn.state import EnvState, Views
from aiovm.engine.unicorn.syscall import syscall, sysenter
from aiovm.errors import ConfigError
from aiovm.exits import BUDGET, EngineFault, Exit, Interrupted
from aiovm.memory import PAGE, GuestMemory, MemoryMap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiovm.costs import Costs
    from aiovm.engine.base import GuestPort
    from aiovm.events import EventKind
    from aiovm.kvm_structs import KvmFpu

__all__ = ["UnicornContext", "UnicornEngine"]

#: Private pages of the engine, above every address that a guest can form (MAXPHYADDR is 40).
_VMCB: Final = 1 << 50
_VMCB_SIZE: Final = 0x8000
_MSRPM: Final = _VMCB + 0x2000
_EXITINFO2: Final = 0x80
_LOOP: Final = 0x4000
_PHYSICAL_END: Final = 1 << 40
_4G: Final = 1 << 32
_READ_EXEC: Final = 5
_ALL: Final = 7
_STORES_ONLY: Final = 2

_EIP: Final = Env.EIP >> 3
_EFLAGS: Final = Env.EFLAGS >> 3
_HFLAGS: Final = Env.HFLAGS >> 2
_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF
_IF: Final = 0x200
_RF: Final = 1 << 16
_SYSCALL: Final = b"\x0f\x05"
_SYSENTER: Final = b"\x0f\x34"
#: KVM's ple_gap: TSC cycles between two PAUSEs of one loop (``arch/x86/kvm/vmx/vmx.c``).
PLE_GAP_CYCLES: Final = 128
_STOP_NOW: Final = -(1 << 62)
_WITH_ERROR: Final = frozenset({8, 10, 11, 12, 13, 14, 17})
_FETCH_ERRORS: Final = frozenset({lib.const.UC_ERR_FETCH_UNMAPPED, lib.const.UC_ERR_FETCH_PROT})
#: ns of guest time between looks at IF on the public path.
_WINDOW_NS: Final = 500

#: MSRs that are the bases of FS and GS.
_BASES: Final = frozenset({0xC000_0100, 0xC000_0101})
#: 32-bit MSRs of the core.
_NARROW: Final = frozenset({0x174, 0xC000_0084, 0xC000_0103})
#: Those to which a store is a store and no more, by the word.
_PLAIN_MSRS: Final = {index: at >> 3 for index, at in MSRS.items() if index not in _NARROW | _BASES}


class UnicornContext:
    """One vCPU on the engine (:class:`~aiovm.engine.base.Context`)."""

    def __init__(self, engine: UnicornEngine, index: int, port: GuestPort) -> None:
        self.engine = engine
        self.index = index
        self.port = port
        self.buffer = bytearray(engine.template)
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
        return self.engine.read_register(lib.x86.UC_X86_REG_EFLAGS)

    def reset(self, *, init: bool) -> None:
        """Power-on or INIT (SDM vol. 3A, table 10-1; KVM ``kvm_vcpu_reset``): real mode at F000:FFF0.

        INIT keeps the FPU, SSE state and the MSRs; CR0 keeps CD and NW.
        """
        s = self.state
        cr0 = s.cr0
        if not init:
            if self.engine.current is self:
                self.engine.unload()
            self.buffer[:] = self.engine.template
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

    def write_msr(self, index: int, value: int) -> None:
        """Store an MSR that the core holds; the caller has checked the value."""
        at = _PLAIN_MSRS.get(index)
        if at is not None:
            self.state.q[at] = value
        elif index == EFER_MSR:
            self.state.efer = value
        elif index in _NARROW:
            self.state.d[MSRS[index] >> 2] = value & _M32
        else:
            self.state.q[MSRS[index] >> 3] = value
            self.state.guard_bases()

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


class UnicornEngine:
    """One machine's engine.

    ``memory``: the guest's physical memory, followed as it changes. ``cells``: the clock's pair (now, limit), ns.
    ``costs``: the timing model. ``native``: the C block hook (default: when built). ``pointers``: reach the core's
    state directly (default: when the proof holds). ``release_gil``: let other Python threads run during a slice.
    """

    def __init__(
        self,
        memory: GuestMemory,
        cells: memoryview,
        *,
        costs: Costs,
        native: bool | None = None,
        pointers: bool | None = None,
        release_gil: bool = False,
    ) -> None:
        from aiovm.engine.unicorn.proof import layout_holds

        self.memory = memory
        self.cells = cells
        self.costs = costs
        self._exit_ns = costs.exit_ns
        self.intercepts = Intercepts(self)
        self.io = PortIo(self)
        self.claims = Claims(self)
        self.pointers = layout_holds() if pointers is None else pointers
        self.native = NATIVE if native is None else native
        self.signature = 0
        self.current: UnicornContext | None = None
        self.closed = False
        self._exit: Exit | None = None
        self._failure: BaseException | None = None
        #: This slice goes instruction by instruction.
        self.stepping = False
        self._kicked = False
        self._dirty_code = False
        #: What is mapped, with the callbacks that keep alive.
        self._mapped: dict[_Range, tuple[object, ...]] = {}
        self._watching_rom = False
        #: The paging registers for which the TLB's contents hold; vCPUs that share them share it.
        self._tlb_of: tuple[int, int, int, int] | None = None
        self._keep: list[object] = []
        self._watches: list[ctypes.c_size_t] = []
        self._on_access = lib.HOOK_ACCESS_T(self._note_access)
        self._scratch = ctypes.create_string_buffer(16)
        self._register = ctypes.c_uint64()
        self._register_at = ctypes.byref(self._register)
        self._open()
        self.budget = Budget(
            cells,
            native=self.native,
            handlers=Handlers(
                self.intercepts.on_interrupt, self.fail, self.io.port_in, self.io.port_out, self.io.behind_io
            ),
            pending=self._pending_at,
            windows=ctypes.addressof(self._virq) if self.pointers else 0,
            env=self._env if self.pointers else 0,
        )
        for number, cost in interrupt_costs(costs).items():
            self.budget.costs[number] = cost
        self.budget.struct.exit_cost = costs.exit_ns
        self.budget.struct.inject_cost = costs.inject_ns
        self.budget.struct.fault_address = ctypes.addressof(self._exitinfo2)
        self.budget.struct.rate = costs.code_rate
        self.budget.struct.pause_cost = costs.pause_ns
        self.budget.struct.ple_gap = PLE_GAP_CYCLES * 1_000_000 // costs.tsc_khz
        self._emu_start = self.budget.entry(self._uc, release_gil=release_gil)
        self._hook()
        self._prime()
        memory.on_change(self._remap)
        memory.on_write(self._host_wrote)
        self._remap(MemoryMap(), memory.map)

    # ---- opening ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        out = ctypes.c_void_p()
        lib.check(lib.open_core(out), "open the core")
        self._uc = out
        assert out.value is not None
        lib.ctl(out, lib.CTL_TCG_BUFFER, ctypes.c_uint32(32 << 20))
        lib.check(lib.ctl(out, lib.CTL_EXITS_ENABLE, ctypes.c_int(1)), "enable exits")
        self.write_register(lib.x86.UC_X86_REG_MXCSR, 0x1F80)
        self.write_register(lib.x86.UC_X86_REG_FPCW, 0x37F)
        self._private = ctypes.create_string_buffer(_VMCB_SIZE + PAGE)
        start = -(-ctypes.addressof(self._private) // PAGE) * PAGE
        self.private = memoryview((ctypes.c_char * _VMCB_SIZE).from_address(start)).cast("B")
        self._exitinfo2 = ctypes.c_uint64.from_address(start + _EXITINFO2)
        lib.check(lib.uc_mem_map_ptr(out, _VMCB, _VMCB_SIZE, 7, start), "map the engine's pages")
        self.private[0x48:0x50] = _MSRPM.to_bytes(8, "little")
        self.private[0x2000:0x4000] = b"\xff" * 0x2000
        for msr in (*MSRS, EFER_MSR):
            at = msr * 2 if msr < 0x2000 else (0x2000 + msr - 0xC000_0000) * 2
            self.private[0x2000 + at // 8] &= ~(1 << at % 8)  # reads pass, writes exit

        self._context = ctypes.c_void_p()
        lib.check(lib.uc_context_alloc(out, ctypes.byref(self._context)), "allocate a context")
        lib.check(lib.uc_context_save(out, self._context), "save the initial state")
        assert self._context.value is not None
        payload = (ctypes.c_char * ENV_END).from_address(self._context.value + CONTEXT_PAYLOAD)
        self._payload = memoryview(payload).cast("B")
        if self.pointers:
            cpu = ctypes.c_uint64.from_address(out.value + UC_CPU).value
            self._env = ctypes.c_uint64.from_address(cpu + CPU_ENV).value
            assert self._env == cpu + CPU_TO_ENV
            self._pending_at = ctypes.c_uint64.from_address(cpu + CPU_ICOUNT_DECR).value + 2
            self._pending = ctypes.c_uint16.from_address(self._pending_at)
            self._virq = ctypes.c_uint8.from_address(cpu + CPU_INTERRUPT_REQUEST + VIRQ_BYTE)
            self._no_exit_request = ctypes.c_uint8.from_address(out.value + UC_NO_EXIT_REQUEST)
            self._no_exit_request.value = 1
            for at, (_, wanted) in FEATURES.items():
                ctypes.c_uint64.from_address(self._env + at).value = wanted
            self._live = memoryview((ctypes.c_char * ENV_END).from_address(self._env)).cast("B")
        else:
            self._env = self._pending_at = 0
            self._live = self._payload
        self._loaded = Views.of(self._live)
        self.template = self._make_template()

    def _make_template(self) -> bytes:
        """The core's fresh state with the intercepts filled in; a context's reset starts from it."""
        data = bytearray(self._payload)
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

    def _hook(self) -> None:
        c, x86 = lib.const, lib.x86

        def add(kind: int, callback: int, *extra: ctypes.c_int) -> None:
            lib.check(lib.hook_add(self._uc, kind, callback, self.budget.address, *extra), f"hook {kind}")

        def keep(function: ctypes._FuncPointer) -> int:
            self._keep.append(function)
            return lib.address_of(function)

        add(c.UC_HOOK_BLOCK, self.budget.on_block)
        add(c.UC_HOOK_EDGE_GENERATED, self.budget.on_translate)
        add(c.UC_HOOK_INTR, self.budget.on_interrupt)
        on_in = self.budget.on_in or keep(lib.HOOK_IN_T(self.io.on_in))
        on_out = self.budget.on_out or keep(lib.HOOK_OUT_T(self.io.on_out))
        add(c.UC_HOOK_INSN, on_in, ctypes.c_int(x86.UC_X86_INS_IN))
        add(c.UC_HOOK_INSN, on_out, ctypes.c_int(x86.UC_X86_INS_OUT))
        add(c.UC_HOOK_INSN, keep(lib.HOOK_SYSCALL_T(self._on_syscall)), ctypes.c_int(x86.UC_X86_INS_SYSCALL))
        add(c.UC_HOOK_INSN, keep(lib.HOOK_SYSCALL_T(self._on_sysenter)), ctypes.c_int(x86.UC_X86_INS_SYSENTER))

    def _prime(self) -> None:
        """Run a loop of the engine's own: the core tells of a translation only once a block has run to its end."""
        struct, cells = self.budget.struct, self.cells
        now, limit = cells[0], cells[1]
        self.private[_LOOP : _LOOP + 2] = b"\xeb\xfe"  # jmp to itself
        rate, struct.rate = struct.rate, 256
        cells[1] = now + 4
        lib.check(lib.uc_emu_start(self._uc, _VMCB + _LOOP, 0, 0, 0), "run the first block")
        struct.rate, struct.frac, struct.stops = rate, 0, 0
        cells[0], cells[1] = now, limit
        if self.pointers:
            self.budget.spare_stores(self._env - CPU_TO_ENV, _VMCB + _LOOP)

    # ---- memory ------------------------------------------------------------------------------------------------

    def _remap(self, _old: MemoryMap, new: MemoryMap) -> None:
        """Follow the memory map: slots become host memory, all else calls the port. What stays is left alone."""
        wanted = dict.fromkeys(_layout(new, self.claims.ranges))
        for low, high, address, rights in [r for r in self._mapped if r not in wanted]:
            lib.check(lib.uc_mem_unmap(self._uc, low, high - low), f"unmap {low:#x}")
            del self._mapped[low, high, address, rights]
        for low, high, address, rights in [r for r in wanted if r not in self._mapped]:
            keep: tuple[object, ...] = ()
            if address:
                error = lib.uc_mem_map_ptr(self._uc, low, high - low, 7, address)
                if rights != 7:
                    # What is mapped read-only from the start the core reports stores to, and then makes them.
                    error = error or lib.uc_mem_protect(self._uc, low, high - low, rights)
            else:
                device = DeviceRange(self.budget.address, low)
                reader = self.claims.reader(low) if rights == _STORES_ONLY else self._mmio_read(low)
                twins = lib.MMIO_READ_T(reader), lib.MMIO_WRITE_T(self._mmio_write(low))
                read, write = (lib.address_of(twin) for twin in twins)
                if rights != _STORES_ONLY:
                    read = self.budget.on_mmio_read or read
                write = self.budget.on_mmio_write or write
                at = ctypes.addressof(device)
                keep = device, *twins
                error = lib.uc_mmio_map(self._uc, low, high - low, read, at, write, at)
                if rights == _STORES_ONLY:
                    error = error or lib.uc_mem_protect(self._uc, low, high - low, rights)
            lib.check(error, f"map {low:#x}+{high - low:#x}")
            self._mapped[low, high, address, rights] = keep
        if not all(slot.writable for slot in new.slots):
            self._watch_rom()
        self.budget.cover(
            [(slot.base, slot.end, slot.host_address, slot.writable and slot.dirty is None) for slot in new.slots]
        )
        if self.current is not None:
            self.current.state.paging_changed = True
        self._dirty_code = True

    def claim(self, base: int, length: int) -> None:
        """Loads from these addresses leave before they happen (:mod:`aiovm.engine.unicorn.claims`)."""
        self.claims.add(base, length)
        self._remap(self.memory.map, self.memory.map)

    def _host_wrote(self, gpa: int, length: int) -> None:
        """The host stored into guest memory: what was translated from those pages is stale."""
        pages = self.budget.code_pages
        if 1 in pages[gpa >> 12 : (gpa + length - 1 >> 12) + 1]:
            self._dirty_code = True

    def _mmio_read(self, base: int) -> Callable[[int, int, int, int], int]:
        def read(_uc: int, offset: int, size: int, _user: int) -> int:
            try:
                self.cells[0] += self._exit_ns
                assert self.current is not None
                return self.current.port.on_mmio_read(base + offset, size) & (1 << 8 * size) - 1
            except BaseException as error:
                self.fail(error)
                return 0

        return read

    def _mmio_write(self, base: int) -> Callable[[int, int, int, int, int], None]:
        return lambda _uc, offset, size, value, _user: self._mmio_store(base + offset, size, value)

    def _mmio_store(self, gpa: int, size: int, value: int) -> None:
        try:
            self.cells[0] += self._exit_ns
            assert self.current is not None
            self.current.port.on_mmio_write(gpa, size, value & (1 << 8 * size) - 1)
        except BaseException as error:
            self.fail(error)

    def _watch_rom(self) -> None:
        """Hear of stores to read-only slots. Only where there are any: a memory hook of whatever kind sends every load
        and store through the core's slow path, which costs a factor of fifteen (benchmarks/bench_engine.py)."""
        if not self._watching_rom:
            self._watching_rom = True
            callback = lib.HOOK_MEM_T(self._on_rom_write)
            self._keep.append(callback)
            kind = lib.const.UC_HOOK_MEM_WRITE_PROT
            lib.check(lib.hook_add(self._uc, kind, lib.address_of(callback), 0), "hook stores to ROM")

    def _on_rom_write(self, _uc: int, _kind: int, gpa: int, size: int, value: int, _user: int) -> bool:
        """A store to a read-only slot is MMIO, and the core drops it. An unaligned one comes again byte by byte."""
        if not gpa & size - 1:
            self._mmio_store(gpa, size, value)
        return True

    # ---- contexts ------------------------------------------------------------------------------------------------

    def create_context(self, index: int, port: GuestPort) -> UnicornContext:
        return UnicornContext(self, index, port)

    def load(self, context: UnicornContext) -> None:
        """Make ``context`` the one whose state is in the core."""
        if self.current is context:
            return
        self.unload()
        self._live[:] = context.buffer
        context.bind(self._loaded)
        self.current = context
        s = self.budget.struct
        s.frac, s.ple_first, s.ple_last = context.carried
        s.ple_window = context.ple_window
        s.port = context.port
        self.load_tsc(context)
        if not self.pointers:
            lib.check(lib.uc_context_restore(self._uc, self._context), "restore")
        if _paging_key(context.state) != self._tlb_of:
            context.state.paging_changed = True

    def unload(self) -> None:
        """Take the loaded vCPU's state out of the core."""
        context = self.current
        if context is None:
            return
        if not context.state.paging_changed:
            self._tlb_of = _paging_key(context.state)
        context.buffer[:] = self._live
        context.bind(None)
        s = self.budget.struct
        context.carried = (s.frac, s.ple_first, s.ple_last)
        context.delivered += self.budget.take_delivered()
        self.current = None

    def load_tsc(self, context: UnicornContext) -> None:
        """The loaded vCPU's TSC moved."""
        s = self.budget.struct
        s.tsc_ratio, s.tsc_offset = context.tsc

    def serve_tsc(self, khz: int, epoch: int | None) -> None:
        """Answer RDTSC without asking the port where that is possible: see :meth:`Budget.serve_tsc`."""
        self.budget.serve_tsc(khz, epoch)

    def serve_cr3(self, width: int) -> None:
        """Load CR3 without asking the port where that is possible: see :meth:`Budget.serve_cr3`."""
        self.budget.serve_cr3(width)

    def forget_translations(self) -> None:
        """The next slice translates all code anew."""
        self._dirty_code = True

    @property
    def tsc_last(self) -> int:
        """What any vCPU has seen of the machine's counter."""
        return self.budget.struct.tsc_last

    @tsc_last.setter
    def tsc_last(self, value: int) -> None:
        self.budget.struct.tsc_last = value

    def latest_tsc(self, tsc: int) -> int:
        """The machine's counter is ``tsc``, or what some CPU has seen of it already."""
        s = self.budget.struct
        last: int = s.tsc_last
        if tsc < last:
            return last
        s.tsc_last = tsc
        return tsc

    def read_register(self, register: int) -> int:
        """A register of the loaded vCPU by Unicorn's number."""
        self._register.value = 0
        lib.check(lib.uc_reg_read(self._uc, register, self._register_at), "read a register")
        return self._register.value

    def write_register(self, register: int, value: int) -> None:
        """Store a register of the loaded vCPU by Unicorn's number, with what the core derives from it."""
        self._register.value = value
        lib.check(lib.uc_reg_write(self._uc, register, self._register_at), "write a register")

    def apply_windows(self, context: UnicornContext) -> None:
        """Open or close the interrupt and NMI windows of the loaded vCPU."""
        if self.pointers:
            # A slice that is leaving takes nothing more: its HLT must not be halting an interrupt's handler.
            wanted = 0 if self._exit is not None else context.window | context.nmi_window << 1
            self._virq.value = wanted
            if wanted:
                self._pending.value = 0xFFFF
        elif context.window or context.nmi_window:
            self.cells[1] = min(self.cells[1], self.cells[0] + _WINDOW_NS)

    def sync_in(self) -> None:
        """Without pointers: the core's registers come to the copy that the state looks at."""
        if not self.pointers:
            lib.check(lib.uc_context_save(self._uc, self._context), "save")

    def sync_out(self) -> None:
        """And back."""
        if not self.pointers:
            lib.check(lib.uc_context_restore(self._uc, self._context), "restore")

    def flush_tlb(self, context: UnicornContext) -> None:
        """The loaded vCPU's paging changed: forget every translation of addresses."""
        context.state.paging_changed = False
        lib.uc_ctl_0(self._uc, lib.CTL_TLB_FLUSH)

    def fetch(self, linear: int, length: int) -> bytes:
        """Code at a linear address as the loaded vCPU sees it; nothing where it may not execute."""
        error = lib.uc_vmem_read(self._uc, linear, lib.const.UC_PROT_EXEC, self._scratch, length)
        return b"" if error else self._scratch.raw[:length]

    @property
    def fault_address(self) -> int:
        """The linear address of the page fault that the core reports."""
        return self._exitinfo2.value

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, context: UnicornContext, limit: int) -> Exit:
        """One slice of ``context``; see :meth:`aiovm.engine.base.Context.run`."""
        self.load(context)
        state = context.state
        if self._dirty_code:
            self._flush_code()
        if state.paging_changed:
            self.sync_out()
            self.flush_tlb(context)
        if state.flags_changed:
            state.fold_flags()
        self.budget.struct.ple_window = context.ple_window
        self.budget.struct.unheard = not context.port.hears_exceptions
        self._exit = None
        self.apply_windows(context)
        # Invariant: a kick stores its flag, then the limit; here the other way round. One of the two sees it.
        self.cells[1] = limit
        if self._kicked:
            self._kicked = False
            return Interrupted()
        if context.stepping is not self.stepping:
            self._set_stepping(context.stepping)
        context.map_generation = self.memory.map.generation
        if context.stepping:
            error = self._step(context)
        else:
            if self._watches:
                self._watch(False)
            error = self._go(context)
            while error == READ_REFUSED and not self._over():
                error = self._refused(context)
        context.map_generation = -1
        self._kicked = False
        if error in _FETCH_ERRORS and self._failure is None:
            # Nothing to execute from: a bus that nobody drives reads all ones, and FF FF is no instruction.
            context.port.on_exception(6, None, 0)
            error = 0
        return self._outcome(error)

    def _refused(self, context: UnicornContext) -> int:
        """A load from a claimed page: the program's, which leaves, or of the page's other part; then on we go."""
        load = self.claims.probe(context)
        if load is None:  # the page tables have changed meanwhile
            return self._go(context)
        self.cells[0] += self._exit_ns
        if context.port.on_user_read(*load):
            return 0
        missing = self.claims.replay(context)
        if missing is not None:
            context.port.on_user_read(*missing)
        return 0 if self._over() or self.cells[0] >= self.cells[1] else self._go(context)

    def _go(self, context: UnicornContext, count: int = 0) -> int:
        """As :meth:`enter`, with what the public path needs around it."""
        return self.enter(context, count) if self.pointers else self._enter_public(context, count)

    def finish_read(self, context: UnicornContext) -> tuple[int, int] | None:
        """Between slices: execute the load at RIP with ``context.answers``; the next load that lacks one, if any."""
        self.load(context)
        if context.state.flags_changed:
            context.state.fold_flags()
        now, limit = self.cells[0], self.cells[1]
        self._exit = None
        missing = self.claims.replay(context)
        self.cells[0], self.cells[1] = now, limit
        self._outcome(0)
        return missing

    @property
    def handle(self) -> ctypes.c_void_p:
        """The core, for raw calls."""
        return self._uc

    def close_windows(self) -> None:
        """Nothing is delivered until :meth:`apply_windows`."""
        if self.pointers:
            self._virq.value = 0
            self._pending.value = 0

    def enter(self, context: UnicornContext, count: int = 0) -> int:
        """Guest code runs, ``count`` instructions if it is not 0; the core's error number."""
        return self._emu_start(context.state.q[_EIP], count)

    def _set_stepping(self, wanted: bool) -> None:
        """Counted instructions need the exit checks that :data:`UC_NO_EXIT_REQUEST` leaves out of translations."""
        self.stepping = wanted
        self.budget.clear_resume(not wanted)
        if self.pointers:
            self._no_exit_request.value = 0 if wanted else 1
        self._flush_code()

    def _watch(self, wanted: bool) -> None:
        """Have the core report accesses to memory, or no longer: translations carry the choice."""
        if wanted and not self._watches:
            for kind in (lib.const.UC_HOOK_MEM_READ, lib.const.UC_HOOK_MEM_WRITE):
                hook = ctypes.c_size_t()
                lib.check(lib.hook_add(self._uc, kind, lib.address_of(self._on_access), 0, out=hook), "hook accesses")
                self._watches.append(hook)
        elif self._watches and not wanted:
            for hook in self._watches:
                lib.uc_hook_del(self._uc, hook)
            self._watches.clear()
        else:
            return
        self._flush_code()

    def _flush_code(self) -> None:
        """Forget every translation of code, and with it where code is."""
        self._dirty_code = False
        self.budget.forget_code()
        lib.uc_ctl_0(self._uc, lib.CTL_TB_FLUSH)
        lib.uc_ctl_0(self._uc, lib.CTL_TLB_FLUSH)

    def _note_access(self, _uc: int, kind: int, gpa: int, size: int, _value: int, _user: int) -> None:
        assert self.current is not None
        self.current.accesses.append((gpa, size, kind == lib.const.UC_MEM_WRITE))

    def _step(self, context: UnicornContext) -> int:
        """Instruction by instruction, with the port asked around each."""
        error = 0
        self._watch(context.watching)
        while context.stepping and self.cells[0] < self.cells[1]:
            context.port.on_step()
            if self._over():
                break
            before, linear = self.cells[0], context.linear_rip
            context.state.q[_EFLAGS] &= ~_RF
            error = self._go(context, 1)
            context.ss_shadow = context.state.interrupt_shadow and self.intercepts.loads_ss(context, linear)
            if error or self._over():
                break
            context.port.on_stepped()
            if self._over():
                break
            if self.cells[0] == before:
                self.cells[0] += 1  # an instruction takes time, be its block's share a fraction of a nanosecond
        return error

    def _over(self) -> bool:
        """Whether the slice ends whatever its time."""
        return self._exit is not None or self._failure is not None

    def _enter_public(self, context: UnicornContext, count: int = 0) -> int:
        """Without pointers there is no interrupt window: look at IF before a slice, and keep slices short meanwhile."""
        if context.nmi_window:
            if not context.state.nmi_masked and not context.state.interrupt_shadow:
                context.nmi_window = False
                context.port.on_nmi_window()
                if self._exit is not None:
                    return 0
            else:
                self.cells[1] = min(self.cells[1], self.cells[0] + _WINDOW_NS)
        if context.window:
            if context.state.rflags & _IF and not context.state.interrupt_shadow:
                context.port.on_irq_window()
                if self._exit is not None:
                    return 0
            if context.window:
                self.cells[1] = min(self.cells[1], self.cells[0] + _WINDOW_NS)
        self.sync_out()
        error = self.enter(context, count)
        self.sync_in()
        return error

    def _outcome(self, error: int) -> Exit:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._exit is not None:
            return self._exit
        return EngineFault(error, lib.words(error)) if error else BUDGET

    def kick(self) -> None:
        """End the running slice at its next block, or the next one before it begins; from any thread."""
        self._kicked = True
        self.cells[1] = _STOP_NOW

    @property
    def leaving(self) -> bool:
        """Whether an exit was chosen that ends this slice."""
        return self._exit is not None

    def leave(self, exit_: Exit) -> None:
        """End the slice with ``exit_``: at once from an intercept or an I/O instruction, else at the next block."""
        self._exit = exit_
        if self.current is not None:
            self.apply_windows(self.current)
        self.cells[1] = _STOP_NOW

    def stop(self) -> None:
        """From the interrupt hook: no more of the guest's code runs in this slice."""
        lib.uc_emu_stop(self._uc)

    def fail(self, error: BaseException) -> None:
        """A Python error in a hook: the slice ends, and :meth:`run` raises it."""
        self._failure = self._failure or error
        self.cells[1] = _STOP_NOW

    def close(self) -> None:
        """Free the core. The contexts must not be used any more."""
        if not self.closed:
            self.closed = True
            self.unload()
            lib.uc_context_free(self._context)
            lib.uc_close(self._uc)

    # ---- system calls ---------------------------------------------------------------------------------------------

    def _on_syscall(self, _uc: int, _user: int) -> None:
        self._transition(_SYSCALL, syscall)

    def _on_sysenter(self, _uc: int, _user: int) -> None:
        self._transition(_SYSENTER, lambda state, _next: sysenter(state))

    def _transition(self, plain: bytes, enter: Callable[[EnvState, int], int | None]) -> None:
        """SYSCALL or SYSENTER: the core steps over the instruction afterwards, prefixes included."""
        try:
            context = self.current
            assert context is not None
            self.sync_in()
            length = 2
            if self.fetch(context.linear_rip, 2) != plain:
                insn = self.intercepts.decode(context)
                length = 2 if insn is None else insn.length
            vector = enter(context.state, context.state.rip + length & _M64)
            if vector is not None:
                context.port.on_exception(vector, 0 if vector in _WITH_ERROR else None, 0)
            context.state.rip -= length
            self.sync_out()
        except BaseException as error:
            self.fail(error)


def _paging_key(state: EnvState) -> tuple[int, int, int, int]:
    """What a translation depends on: CR0, CR3, CR4 and EFER."""
    q, at = state.q, Env.CR >> 3
    return q[at], q[at + 3], q[at + 4], q[Env.EFER >> 3]


_Range = tuple[int, int, int, int]


def _layout(map_: MemoryMap, claims: Sequence[tuple[int, int]]) -> list[_Range]:
    """The physical address space as (low, high, host address or 0 where nobody is, rights), in order.

    ``claims``: where nobody is, what leaves to the embedding program."""
    ranges: list[_Range] = []
    at = 0
    for slot in map_.slots:
        ranges += _device(at, slot.base, claims)
        rights = _ALL if slot.writable else _READ_EXEC
        ranges.append((slot.base, slot.end, slot.host_address, rights))
        at = slot.end
    return ranges + _device(at, _PHYSICAL_END, claims)


def _device(low: int, high: int, claims: Sequence[tuple[int, int]]) -> list[_Range]:
    """Nobody's addresses, with the claims among them."""
    ranges: list[_Range] = []
    for start, end in claims:
        if start < high and low < end:
            ranges += _hole(low, start)
            ranges.append((max(start, low), min(end, high), 0, _STORES_ONLY))
            low = min(end, high)
    return ranges + _hole(low, high)


def _hole(low: int, high: int) -> list[_Range]:
    """Nobody's addresses in pieces: the core takes a time for each page that it unmaps, so that a slot that comes or
    goes should not unmap a terabyte. Every half GiB up to 4 GiB, then doubling."""
    pieces: list[_Range] = []
    while low < high:
        end = (low >> 29) + 1 << 29 if low < _4G else 1 << low.bit_length()
        end = min(end, high)
        pieces.append((low, end, 0, 0))
        low = end
    return pieces
