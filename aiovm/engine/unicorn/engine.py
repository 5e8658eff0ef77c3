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

from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.budget import NATIVE, Budget, Handlers
from aiovm.engine.unicorn.claims import READ_REFUSED, Claims
from aiovm.engine.unicorn.context import UnicornContext
from aiovm.engine.unicorn.core import Core
from aiovm.engine.unicorn.intercepts import Intercepts, interrupt_costs
from aiovm.engine.unicorn.io import PortIo
from aiovm.engine.unicorn.layout import CPU_TO_ENV, Env
from aiovm.engine.unicorn.physical import PhysicalSpace
from aiovm.engine.unicorn.syscall import SystemCalls
from aiovm.errors import StateError
from aiovm.exits import BUDGET, EngineFault, Exit, Interrupted

if TYPE_CHECKING:
    from aiovm.costs import Costs
    from aiovm.engine.base import GuestPort
    from aiovm.engine.unicorn.state import EnvState
    from aiovm.memory import GuestMemory

__all__ = ["UnicornEngine"]

_EIP: Final = Env.EIP >> 3
_EFLAGS: Final = Env.EFLAGS >> 3
_IF: Final = 0x200
_RF: Final = 1 << 16
_PSE, _PAE = 1 << 4, 1 << 5
#: KVM's ple_gap: TSC cycles between two PAUSEs of one loop (``arch/x86/kvm/vmx/vmx.c``).
PLE_GAP_CYCLES: Final = 128
_STOP_NOW: Final = -(1 << 62)
_FETCH_ERRORS: Final = frozenset({lib.const.UC_ERR_FETCH_UNMAPPED, lib.const.UC_ERR_FETCH_PROT})
#: ns of guest time between looks at IF on the public path.
_WINDOW_NS: Final = 500


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
        self.intercepts = Intercepts(self)
        self.io = PortIo(self)
        self.claims = Claims(self)
        self.pointers = layout_holds() if pointers is None else pointers
        self.core = Core(pointers=self.pointers)
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
        #: The paging registers for which the TLB's contents hold; vCPUs that share them share it.
        self._tlb_of: tuple[int, int, int, int, int] | None = None
        self._keep: list[object] = []
        self._watches: list[ctypes.c_size_t] = []
        self._on_access = lib.HOOK_ACCESS_T(self._note_access)
        self.budget = Budget(
            cells,
            native=self.native,
            handlers=Handlers(
                self.intercepts.on_interrupt, self.fail, self.io.port_in, self.io.port_out, self.io.behind_io
            ),
            pending=self.core.pending_at,
            windows=self.core.windows_at,
            env=self.core.env,
        )
        for number, cost in interrupt_costs(costs).items():
            self.budget.costs[number] = cost
        self.budget.struct.exit_cost = costs.exit_ns
        self.budget.struct.inject_cost = costs.inject_ns
        self.budget.struct.fault_address = self.core.fault_address_at
        self.budget.struct.rate = costs.code_rate
        self.budget.struct.pause_cost = costs.pause_ns
        self.budget.struct.ple_gap = PLE_GAP_CYCLES * 1_000_000 // costs.tsc_khz
        self._emu_start = self.budget.entry(self.core.handle, release_gil=release_gil)
        self._hook()
        self._prime()
        self._space = PhysicalSpace(self)

    def _hook(self) -> None:
        c, x86, calls = lib.const, lib.x86, SystemCalls(self)

        def add(kind: int, callback: int, *extra: ctypes.c_int) -> None:
            lib.check(lib.hook_add(self.core.handle, kind, callback, self.budget.address, *extra), f"hook {kind}")

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
        add(c.UC_HOOK_INSN, keep(lib.HOOK_SYSCALL_T(calls.on_syscall)), ctypes.c_int(x86.UC_X86_INS_SYSCALL))
        add(c.UC_HOOK_INSN, keep(lib.HOOK_SYSCALL_T(calls.on_sysenter)), ctypes.c_int(x86.UC_X86_INS_SYSENTER))

    def _prime(self) -> None:
        """Run a loop of the engine's own: the core tells of a translation only once a block has run to its end."""
        struct, cells = self.budget.struct, self.cells
        now, limit = cells[0], cells[1]
        rate, struct.rate = struct.rate, 256
        cells[1] = now + 4
        lib.check(lib.uc_emu_start(self.core.handle, self.core.loop, 0, 0, 0), "run the first block")
        struct.rate, struct.frac, struct.stops = rate, 0, 0
        cells[0], cells[1] = now, limit
        if self.pointers:
            self.budget.spare_stores(self.core.env - CPU_TO_ENV, self.core.loop)

    # ---- contexts ------------------------------------------------------------------------------------------------

    def create_context(self, index: int, port: GuestPort) -> UnicornContext:
        return UnicornContext(self, index, port)

    def load(self, context: UnicornContext) -> None:
        """Make ``context`` the one whose state is in the core."""
        if self.current is context:
            return
        if self.closed:
            raise StateError("the machine is closed: its vCPUs have no CPU to run on")
        self.unload()
        self.core.live[:] = context.buffer
        context.bind(self.core.loaded)
        self.current = context
        s = self.budget.struct
        s.frac, s.ple_first, s.ple_last = context.carried
        s.ple_window = context.ple_window
        s.port = context.port
        self.load_tsc(context)
        self.core.sync_out()
        if _paging_key(context.state) != self._tlb_of:
            context.state.paging_changed = True

    def unload(self) -> None:
        """Take the loaded vCPU's state out of the core."""
        context = self.current
        if context is None:
            return
        if not context.state.paging_changed:
            self._tlb_of = _paging_key(context.state)
        context.buffer[:] = self.core.live
        context.bind(None)
        s = self.budget.struct
        context.carried = (s.frac, s.ple_first, s.ple_last)
        context.delivered += self.budget.take_delivered()
        self.current = None

    def claim(self, base: int, length: int) -> None:
        """Loads from these addresses leave before they happen (:mod:`aiovm.engine.unicorn.claims`)."""
        self._space.claim(base, length)

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
        """Code is translated anew before another block runs: the running slice ends there."""
        self._dirty_code = True
        if self.current is not None and self.current.map_generation >= 0:
            self.cells[1] = _STOP_NOW

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

    def apply_windows(self, context: UnicornContext) -> None:
        """Open or close the interrupt and NMI windows of the loaded vCPU."""
        if self.pointers:
            # A slice that is leaving takes nothing more: its HLT must not be halting an interrupt's handler.
            wanted = 0 if self._exit is not None else context.window | context.nmi_window << 1
            self.core.open_windows(wanted)
        elif context.window or context.nmi_window:
            self.cells[1] = min(self.cells[1], self.cells[0] + _WINDOW_NS)

    def flush_tlb(self, context: UnicornContext) -> None:
        """The loaded vCPU's paging changed: forget every translation of addresses."""
        context.state.paging_changed = False
        self.core.flush_tlb()

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, context: UnicornContext, limit: int) -> Exit:
        """One slice of ``context``; see :meth:`aiovm.engine.base.Context.run`."""
        self.load(context)
        state = context.state
        if self._dirty_code:
            self._flush_code()
        if state.paging_changed:
            self.core.sync_out()
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
        self.cells[0] += self.costs.exit_ns
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

    def enter(self, context: UnicornContext, count: int = 0) -> int:
        """Guest code runs, ``count`` instructions if it is not 0; the core's error number."""
        return self._emu_start(context.state.q[_EIP], count)

    def _set_stepping(self, wanted: bool) -> None:
        """Counted instructions need the exit checks that :data:`UC_NO_EXIT_REQUEST` leaves out of translations."""
        self.stepping = wanted
        self.budget.clear_resume(not wanted)
        self.core.check_exits(wanted)
        self._flush_code()

    def _watch(self, wanted: bool) -> None:
        """Have the core report accesses to memory, or no longer: translations carry the choice."""
        if wanted and not self._watches:
            for kind in (lib.const.UC_HOOK_MEM_READ, lib.const.UC_HOOK_MEM_WRITE):
                hook = ctypes.c_size_t()
                lib.check(
                    lib.hook_add(self.core.handle, kind, lib.address_of(self._on_access), 0, out=hook), "hook accesses"
                )
                self._watches.append(hook)
        elif self._watches and not wanted:
            for hook in self._watches:
                lib.uc_hook_del(self.core.handle, hook)
            self._watches.clear()
        else:
            return
        self._flush_code()

    def _flush_code(self) -> None:
        """Forget every translation of code, and with it where code is."""
        self._dirty_code = False
        self.budget.forget_code()
        self.core.flush_code()

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
        self.core.sync_out()
        error = self.enter(context, count)
        self.core.sync_in()
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
        lib.uc_emu_stop(self.core.handle)

    def fail(self, error: BaseException) -> None:
        """A Python error in a hook: the slice ends, and :meth:`run` raises it."""
        self._failure = self._failure or error
        self.cells[1] = _STOP_NOW

    def close(self) -> None:
        """Free the core. The contexts must not be used any more."""
        if not self.closed:
            self.closed = True
            self.unload()
            self.core.close()


def _paging_key(state: EnvState) -> tuple[int, int, int, int, int]:
    """What a translation depends on: CR0, CR3, CR4, EFER and PKRU. Under PAE, PSE means nothing (SDM vol. 3A, 4.1.4):
    Linux's first CPU has it, its others have not."""
    q, at = state.q, Env.CR >> 3
    cr4 = q[at + 4]
    return q[at], q[at + 3], cr4 & ~_PSE if cr4 & _PAE else cr4, q[Env.EFER >> 3], state.d[Env.PKRU >> 2]
