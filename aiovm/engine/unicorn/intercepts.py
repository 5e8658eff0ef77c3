"""What the core reports in place: one handler an intercept, from the registers to the guest port and back.

Rules:

* RIP stands at the instruction. A handler asks the port, writes the results, and steps over the whole instruction,
  prefixes included; when the port answered with a fault, RIP stays where the port put it.
* The single-step trap (RFLAGS.TF) follows an instruction that was answered here, as it follows the core's own.
* Control and debug registers are written by the port alone; the TLB is flushed before the guest goes on.

Not modelled: the trap of a single step over an instruction that leaves to the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.engine.base import DescriptorTable, Seg
from aiovm.engine.unicorn.budget import FAULTED, INTERRUPTS
from aiovm.engine.unicorn.decode import Instruction, decode, leaves_the_stack
from aiovm.engine.unicorn.layout import Env, Hf, Intercept
from aiovm.engine.unicorn.operand import load_operand, store_operand
from aiovm.engine.unicorn.system_store import store_register, store_system
from aiovm.errors import EngineError
from aiovm.events import EventKind
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.costs import Costs
    from aiovm.engine.unicorn.context import UnicornContext
    from aiovm.engine.unicorn.engine import UnicornEngine
    from aiovm.engine.unicorn.state import EnvState

__all__ = ["Intercepts", "interrupt_costs"]

_EIP: Final = Env.EIP >> 3
_EFLAGS: Final = Env.EFLAGS >> 3
_HFLAGS: Final = Env.HFLAGS >> 2
_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF
_TF: Final = 0x100
_LMA: Final = 1 << 10
_DR6_BS: Final = 1 << 14
_WITH_ERROR: Final = frozenset({8, 10, 11, 12, 13, 14, 17})
_LONGEST: Final = 15
_CALLS: Final = frozenset({0xC1, 0xD9})  # VMCALL, VMMCALL
_MOVBE_LOAD, _MOVBE_STORE = 0x0F38F0, 0x0F38F1
_PLAIN_CALLS: Final = frozenset({0xC1_010F, 0xD9_010F})


class Intercepts:
    """The handlers of one engine; ``table`` says who answers an interrupt number."""

    def __init__(self, engine: UnicornEngine) -> None:
        self._engine = engine
        table: dict[int, Callable[[UnicornContext, int], None]] = dict.fromkeys(range(INTERRUPTS), self._unexpected)
        table[FAULTED] = self._settle
        exits: dict[int, Callable[[UnicornContext, int], None]] = {
            Intercept.CPUID: self._cpuid,
            Intercept.MSR: self._msr,
            Intercept.HLT: self._hlt,
            Intercept.RDPMC: self._rdpmc,
            Intercept.RSM: self._rsm,
            Intercept.IRET: self._iret,
            Intercept.IDTR_WRITE: self._load_table,
            Intercept.GDTR_WRITE: self._load_table,
            Intercept.LDTR_WRITE: self._load_selector,
            Intercept.TR_WRITE: self._load_selector,
            Intercept.PAUSE: self._pause,
            Intercept.VINTR: self.irq_window,
            Intercept.NMI: self.nmi_window,
            Intercept.SWINT: self._soft_interrupt,
            Intercept.RDTSC: self._rdtsc,
            Intercept.RDTSCP: self._rdtsc,
        }
        exits.update(dict.fromkeys(range(Intercept.CR0_READ, Intercept.CR0_READ + 16), self._cr_read))
        stores = (Intercept.CR0_READ, *range(Intercept.IDTR_READ, Intercept.TR_READ + 1))
        exits.update(dict.fromkeys(stores, self._system_store))
        exits.update(dict.fromkeys(range(Intercept.CR0_WRITE, Intercept.CR0_WRITE + 16), self._cr_write))
        exits.update(dict.fromkeys(range(Intercept.DR0_READ, Intercept.DR0_READ + 16), self._dr_read))
        exits.update(dict.fromkeys(range(Intercept.DR0_WRITE, Intercept.DR0_WRITE + 16), self._dr_write))
        exits.update(dict.fromkeys(range(Intercept.EXCEPTION, Intercept.EXCEPTION + 32), self._exception))
        exits[Intercept.EXCEPTION + 6] = self._undefined
        table.update({0x100 + code: handler for code, handler in exits.items()})
        self.table = table

    def _settle(self, context: UnicornContext, _number: int) -> None:
        """An instruction that the C hook carried has raised a fault already."""

    def _unexpected(self, context: UnicornContext, number: int) -> None:
        raise EngineError(f"unexpected intercept {number:#x} at RIP {context.state.rip:#x}")

    # ---- code --------------------------------------------------------------------------------------------------------

    def code_bytes(self, linear: int, length: int) -> bytes:
        """The instruction bytes at a linear address, as many of ``length`` as are mapped executable."""
        near = min(length, PAGE - linear % PAGE)
        code = self._engine.core.fetch(linear, near)
        return code + self._engine.core.fetch(linear + near, length - near) if code and near < length else code

    def decode(self, context: UnicornContext, linear: int | None = None) -> Instruction | None:
        """The instruction at RIP or ``linear``; None when its bytes cannot be read any more."""
        if linear is None:
            linear = context.linear_rip
        flags = context.state.d[_HFLAGS]
        mode = 64 if flags & Hf.CS64 else 32 if flags & Hf.CS32 else 16
        return decode(self.code_bytes(linear, _LONGEST), mode)

    def loads_ss(self, context: UnicornContext, linear: int) -> bool:
        """Whether MOV to SS or POP SS stands there."""
        insn = self.decode(context, linear)
        return insn is not None and (insn.opcode == 0x17 or (insn.opcode == 0x8E and insn.reg & 7 == Seg.SS))

    def _length(self, context: UnicornContext, plain: int, size: int = 2) -> int:
        """How long the instruction is whose ``size`` bytes, little-endian, are ``plain`` but for prefixes."""
        if self._engine.budget.struct.code & (1 << 8 * size) - 1 == plain:
            return size
        insn = self.decode(context)
        return size if insn is None else insn.length

    def skip(self, context: UnicornContext, length: int) -> bool:
        """Step over the instruction; a shadow ends. Whether that was the whole of it: no single-step trap follows."""
        q, d = context.state.q, context.state.d
        flags = d[_HFLAGS]
        q[_EIP] = q[_EIP] + length & (_M64 if flags & Hf.CS64 else _M32)
        if flags & Hf.INHIBIT_IRQ:
            d[_HFLAGS] = flags & ~Hf.INHIBIT_IRQ
        if not q[_EFLAGS] & _TF:
            return True
        self.trap(context)
        return False

    def trap(self, context: UnicornContext) -> None:
        """The single-step #DB (SDM vol. 3B, 18.3.1.4)."""
        state = context.state
        state.set_dr(6, state.get_dr(6) | _DR6_BS)
        context.port.on_exception(1, None, 0)

    # ---- identity, MSRs, time ----------------------------------------------------------------------------------------

    def _cpuid(self, context: UnicornContext, _number: int) -> None:
        q = context.state.q
        q[0], q[3], q[1], q[2] = context.port.on_cpuid(q[0] & _M32, q[1] & _M32)
        self.skip(context, self._length(context, 0xA20F))

    def _msr(self, context: UnicornContext, _number: int) -> None:
        q = context.state.q
        index = q[1] & _M32
        if context.state.d[Env.ERROR_CODE >> 2] & 1:
            length = self._length(context, 0x300F)
            if context.port.on_wrmsr(index, (q[2] & _M32) << 32 | q[0] & _M32):
                self.skip(context, length)
        else:
            value = context.port.on_rdmsr(index)
            if value is not None:
                q[0], q[2] = value & _M32, value >> 32
                self.skip(context, self._length(context, 0x320F))

    def _rdtsc(self, context: UnicornContext, _number: int) -> None:
        q = context.state.q
        length, with_aux = 2, False
        if self._engine.budget.struct.code & 0xFFFF != 0x310F:
            insn = self.decode(context)
            if insn is not None:
                length, with_aux = insn.length, insn.opcode == 0x0F01
        value = context.port.on_rdtsc()
        q[0], q[2] = value & _M32, value >> 32
        if with_aux:
            aux = context.port.on_rdmsr(0xC000_0103)
            q[1] = (aux or 0) & _M32
        self.skip(context, length)

    def _rdpmc(self, context: UnicornContext, _number: int) -> None:
        context.port.on_exception(13, 0, 0)

    # ---- waiting and windows -----------------------------------------------------------------------------------------

    def _hlt(self, context: UnicornContext, _number: int) -> None:
        if self.skip(context, self._length(context, 0xF4, 1)):
            context.port.on_hlt()

    def _pause(self, context: UnicornContext, _number: int) -> None:
        engine = self._engine
        if not engine.pointers:
            self.skip(context, self._length(context, 0x90F3))
            if not engine.budget.pause(context.state.cpl):
                return
        engine.cells[0] += engine.costs.exit_ns
        context.port.on_pause_loop()

    def irq_window(self, context: UnicornContext, _number: int = 0) -> None:
        """The guest takes interrupts."""
        context.window = False
        self._engine.apply_windows(context)
        context.port.on_irq_window()

    def nmi_window(self, context: UnicornContext, _number: int = 0) -> None:
        """The guest takes NMIs."""
        context.nmi_window = False
        self._engine.apply_windows(context)
        context.port.on_nmi_window()

    # ---- events ------------------------------------------------------------------------------------------------------

    def _exception(self, context: UnicornContext, number: int) -> None:
        vector = number - 0x100 - Intercept.EXCEPTION
        engine = self._engine
        state = context.state
        if vector == 1 and (engine.io.finish(context) or engine.claims.finish(context)):
            return
        if engine.claims.replaying and engine.claims.close(context):
            engine.stop()
        error = state.d[Env.ERROR_CODE >> 2] if vector in _WITH_ERROR else None
        if vector == 13 and not error and state.long_mode:
            insn = self.decode(context)
            if insn is not None and leaves_the_stack(state, insn):  # the core calls it #GP
                vector = 12
        context.port.on_exception(vector, error, engine.core.fault_address if vector == 14 else 0)

    def _undefined(self, context: UnicornContext, number: int) -> None:
        """#UD, unless the instruction is one that the core does not know."""
        engine = self._engine
        if engine.budget.struct.code & 0xFF_FFFF in _PLAIN_CALLS:
            engine.cells[0] += engine.costs.exit_ns
            self._call(context)
            self.skip(context, 3)
        elif not self._meant(context):
            self._exception(context, number)

    def _call(self, context: UnicornContext) -> None:
        q, flags = context.state.q, context.state.d[_HFLAGS]
        cut = _M64 if flags & Hf.CS64 else _M32
        q[0] = cut & context.port.on_hypercall(
            q[0] & cut, q[3] & cut, q[1] & cut, q[2] & cut, q[6] & cut, flags & Hf.CPL
        )

    def _meant(self, context: UnicornContext) -> bool:
        """Whether an instruction that the core does not know is a hypercall, INT1 or MOVBE; then it is done."""
        insn = self.decode(context)
        if insn is None:
            return False
        if insn.opcode == 0x0F01 and insn.modrm in _CALLS and not insn.lock:
            self._engine.cells[0] += self._engine.costs.exit_ns
            self._call(context)
            self.skip(context, insn.length)
            return True
        if insn.opcode == 0xF1 and not insn.lock:
            context.port.on_soft_interrupt(1, insn.length, EventKind.ICEBP)
            return True
        if insn.opcode in (_MOVBE_LOAD, _MOVBE_STORE) and not (insn.is_register or insn.rep or insn.lock):
            self._movbe(context, insn)
            return True
        return False

    def _movbe(self, context: UnicornContext, insn: Instruction) -> None:
        """The core's own would take registers for memory, so it has none (SDM vol. 2B, MOVBE)."""
        state, memory, size = context.state, self._engine.memory, insn.operand_size
        if insn.opcode == _MOVBE_LOAD:
            value = load_operand(context, memory, insn, size)
            if value is None:
                return
            swapped = int.from_bytes(value.to_bytes(size, "little"), "big")
            store_register(state, insn.reg, swapped, size)
        else:
            low: int = state.q[insn.reg] & (1 << 8 * size) - 1
            if not store_operand(context, memory, insn, low.to_bytes(size, "big")):
                return
        self.skip(context, insn.length)

    def _soft_interrupt(self, context: UnicornContext, _number: int) -> None:
        insn = self.decode(context)
        if insn is None:  # its bytes have gone: the next fetch finds out
            context.port.on_exception(6, None, 0)
        elif insn.opcode == 0xCD:
            context.port.on_soft_interrupt(insn.immediate, insn.length, EventKind.SOFT_INT)
        else:
            context.port.on_soft_interrupt(3 if insn.opcode == 0xCC else 4, insn.length, EventKind.SOFT_EXC)

    def _iret(self, context: UnicornContext, _number: int) -> None:
        state = context.state
        if not state.efer & _LMA:  # bases come from descriptors alone: the core's IRET will do, which comes now
            state.iret_intercepted = False
            return
        insn = self._decoded(context)
        if insn is None:
            return
        stepped = state.q[_EFLAGS] & _TF
        if context.port.on_interrupt_return(insn.operand_size) and stepped:
            self.trap(context)

    def _rsm(self, context: UnicornContext, _number: int) -> None:
        context.port.on_rsm()

    # ---- control, debug and task registers ---------------------------------------------------------------------------

    def _cr_read(self, context: UnicornContext, number: int) -> None:
        insn = self._decoded(context)
        if insn is None:
            return
        value = context.port.on_cr_read(number - 0x100 - Intercept.CR0_READ)
        if value is not None:
            _store(context.state, insn.rm, value)
            self.skip(context, insn.length)

    def _system_store(self, context: UnicornContext, _number: int) -> None:
        """SGDT, SIDT, SLDT, STR and SMSW; and MOV from CR0, which is intercepted with SMSW."""
        insn = self._decoded(context)
        if insn is None:
            return
        if insn.opcode == 0x0F20:
            _store(context.state, insn.rm, context.state.cr0)
            self.skip(context, insn.length)
        elif store_system(context, self._engine.memory, insn):
            self.skip(context, insn.length)

    def _cr_write(self, context: UnicornContext, number: int) -> None:
        """MOV to a control register; CLTS and LMSW are stores to CR0 (SDM vol. 3A, 2.5)."""
        insn = self._decoded(context)
        if insn is None:
            return
        state = context.state
        if insn.opcode == 0x0F06:
            value: int | None = state.cr0 & ~8
        elif insn.opcode == 0x0F01:
            operand = self._operand(context, insn)
            value = None if operand is None else state.cr0 & ~0xE | operand & 0xF
        else:
            value = _load(state, insn.rm)
        if value is not None and context.port.on_cr_write(number - 0x100 - Intercept.CR0_WRITE, value):
            self.skip(context, insn.length)

    def _dr_read(self, context: UnicornContext, number: int) -> None:
        insn = self._decoded(context)
        if insn is None:
            return
        value = context.port.on_dr_read(number - 0x100 - Intercept.DR0_READ)
        if value is not None:
            _store(context.state, insn.rm, value)
            self.skip(context, insn.length)

    def _dr_write(self, context: UnicornContext, number: int) -> None:
        insn = self._decoded(context)
        if insn is None:
            return
        if context.port.on_dr_write(number - 0x100 - Intercept.DR0_WRITE, _load(context.state, insn.rm)):
            self.skip(context, insn.length)

    def _load_selector(self, context: UnicornContext, number: int) -> None:
        """LLDT or LTR."""
        insn = self._decoded(context)
        if insn is None:
            return
        selector, port = self._operand(context, insn), context.port
        load = port.on_load_ldt if number - 0x100 == Intercept.LDTR_WRITE else port.on_load_tr
        if selector is not None and load(selector):
            self.skip(context, insn.length)

    def _load_table(self, context: UnicornContext, number: int) -> None:
        """LGDT or LIDT: two bytes of limit; eight of base in 64-bit mode, else four, or three."""
        insn = self._decoded(context)
        if insn is None:
            return
        limit = self._operand(context, insn)
        if limit is None:
            return
        long = context.state.long_mode
        base = self._operand(context, insn, 8 if long else 4, offset=2)
        if base is None:
            return
        if insn.operand_size == 2 and not long:
            base &= 0xFF_FFFF
        interrupts = number - 0x100 == Intercept.IDTR_WRITE
        if context.port.on_load_table(DescriptorTable(base, limit), interrupts=interrupts):
            self.skip(context, insn.length)

    def _decoded(self, context: UnicornContext) -> Instruction | None:
        """As :meth:`decode`; bytes that have gone are an invalid opcode."""
        insn = self.decode(context)
        if insn is None:
            context.port.on_exception(6, None, 0)
        return insn

    def _operand(self, context: UnicornContext, insn: Instruction, size: int = 2, *, offset: int = 0) -> int | None:
        """A 16-bit register, or ``size`` bytes of the memory operand; None: its fault was raised."""
        if insn.is_register:
            return context.state.q[insn.rm] & 0xFFFF
        return load_operand(context, self._engine.memory, insn, size, offset=offset)

    # ---- the entry from the core -------------------------------------------------------------------------------------

    def on_interrupt(self, number: int) -> None:
        """The core's interrupt hook."""
        engine = self._engine
        context = engine.current
        assert context is not None  # while code runs
        if engine.pointers:
            self.table[number](context, number)
        else:
            engine.core.sync_in()
            self.table[number](context, number)
            engine.core.sync_out()
        if context.state.paging_changed:
            engine.flush_tlb(context)
        if context.stepping is not engine.stepping:
            engine.stop()


def interrupt_costs(costs: Costs) -> dict[int, int]:
    """ns by interrupt number. KVM itself intercepts neither exceptions, RDTSC nor loads of CR0, and windows come with
    an entry."""
    leaving = (
        Intercept.CPUID, Intercept.MSR, Intercept.HLT, Intercept.RDPMC, Intercept.RSM, Intercept.TR_WRITE,
        *range(Intercept.CR0_READ + 1, Intercept.DR0_WRITE + 16),
    )  # fmt: skip
    return dict.fromkeys((0x100 + code for code in leaving), costs.exit_ns) | {
        0x100 + Intercept.RDTSC: costs.rdtsc_ns,
        0x100 + Intercept.RDTSCP: costs.rdtsc_ns,
    }


def _load(state: EnvState, register: int) -> int:
    """A general register as MOV to CR or DR reads it: 64 bits in 64-bit mode, else 32."""
    value: int = state.q[register]
    return value if state.d[_HFLAGS] & Hf.CS64 else value & _M32


def _store(state: EnvState, register: int, value: int) -> None:
    state.q[register] = value if state.d[_HFLAGS] & Hf.CS64 else value & _M32
