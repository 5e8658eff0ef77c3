"""A vCPU's registers inside the core's own structure (:class:`~aiovm.engine.base.CpuState`).

The view works on any memory that holds ``CPUX86State``: the live one while the vCPU is loaded, its saved copy
otherwise. Writes derive ``hflags`` as the core does (QEMU ``target/i386/cpu.h``, x86_update_hflags): the core
translates by these bits, so a segment written without them runs as the wrong mode.

EFLAGS are lazy in the core: the condition codes live in ``cc_op`` and its operands. Reading asks the core unless
they are already folded; writing folds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.engine.unicorn.layout import SEGMENT_SIZE, Env, Hf, Hf2, Intercept
from aiovm.interrupt_return import loses_selector

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EnvState", "Views"]

_M64 = (1 << 64) - 1
_CC = 0x8D5  # O S Z A P C
_DF = 0x400
_CC_OP_EFLAGS = 1
_SEGMENT_AT = (*(Env.SEGS + SEGMENT_SIZE * s for s in range(6)), Env.LDT, Env.TR)  # by Seg

_SS, _DS, _TR = int(Seg.SS), int(Seg.DS), int(Seg.TR)
_new = tuple.__new__

_EIP = Env.EIP >> 3
_CC_SRC = Env.CC_SRC >> 3
_CC_OP = Env.CC_OP >> 2
_DF_AT = Env.DF >> 2
_EFLAGS = Env.EFLAGS >> 3
_HFLAGS = Env.HFLAGS >> 2
_CR0 = Env.CR >> 3
_EFER = Env.EFER >> 3
#: PE, WP and PG: what the core's translations depend on.
_CR0_PAGING = 0x8001_0001
_CS_FLAGS = _SEGMENT_AT[Seg.CS] + 20 >> 2
_SS_FLAGS = _SEGMENT_AT[Seg.SS] + 20 >> 2
#: KVM's register bits: CR3, RFLAGS, and all of them.
_CR3, _RFLAGS, _ALL_REGS = 1 << 18, 1 << 19, (1 << 21) - 1
#: The core leaves parts of base and limit between the flags that it loads by itself.
_SEGMENT_FLAGS = 0x00F0_FF00
_IRET_BIT = 1 << Intercept.IRET - 0x60
#: Bit 1 of a task-state segment's type.
_BUSY = 0x200
_DS_BASE, _ES_BASE, _SS_BASE = (_SEGMENT_AT[s] + 8 >> 3 for s in (Seg.DS, Seg.ES, Seg.SS))
#: Names of one look-up: these are read at every exit.
_CPL, _SHADOW, _CS64, _NMI = Hf.CPL, Hf.INHIBIT_IRQ, Hf.CS64, Hf2.NMI
_KEPT = _CPL | _SHADOW | Hf.GUEST | Hf.IOBPT
_FROM_CR0 = Hf.MP | Hf.EM | Hf.TS
_PE, _LMA, _CS32, _SS32, _ADDSEG = Hf.PE, Hf.LMA, Hf.CS32, Hf.SS32, Hf.ADDSEG
_OSFXSR, _SMAP = Hf.OSFXSR, Hf.SMAP
_LONG_CODE = _LMA | _CS32 | _SS32 | _CS64
_HFLAGS2 = Env.HFLAGS2 >> 2
_VM = 1 << 17


class Views(NamedTuple):
    """A place of the core's structure, by words of eight, four and two bytes; and the general registers."""

    q: memoryview
    d: memoryview
    h: memoryview
    gpr: memoryview

    @classmethod
    def of(cls, where: memoryview) -> Views:
        """The views of ``where``, a byte view."""
        q = where.cast("Q")
        return cls(q, where.cast("I"), where.cast("H"), q[0:16])


class EnvState:
    """The registers of one vCPU; ``bind`` says where they are now."""

    __slots__ = ("_read_flags", "d", "flags_changed", "gpr", "h", "paging_changed", "q")

    def __init__(self, read_flags: Callable[[], int], views: Views) -> None:
        self._read_flags = read_flags
        #: A control register, EFER or PKRU was written: the TLB must be flushed before the vCPU runs.
        self.paging_changed = False
        #: RFLAGS was written: see :meth:`fold_flags`.
        self.flags_changed = False
        self.bind(views)

    def bind(self, views: Views) -> None:
        """Use the state that ``views`` look at."""
        self.q, self.d, self.h, self.gpr = views

    # ---- instruction pointer and flags ------------------------------------------------------------------------

    @property
    def rip(self) -> int:
        value: int = self.q[_EIP]
        return value

    @rip.setter
    def rip(self, value: int) -> None:
        self.q[_EIP] = value & _M64

    @property
    def regs_avail(self) -> int:
        return _ALL_REGS if self.d[_CC_OP] == _CC_OP_EFLAGS else _ALL_REGS & ~_RFLAGS

    @property
    def regs_dirty(self) -> int:
        return (_RFLAGS if self.flags_changed else 0) | (_CR3 if self.paging_changed else 0)

    @property
    def rflags(self) -> int:
        d, q = self.d, self.q
        if d[_CC_OP] == _CC_OP_EFLAGS:
            down = _DF if d[_DF_AT] & 0x8000_0000 else 0
            value: int = q[_EFLAGS] & ~(_CC | _DF) | q[_CC_SRC] & _CC | down | 2
            return value
        return self._read_flags()

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.q[_CC_SRC] = value & _CC
        self.d[_CC_OP] = _CC_OP_EFLAGS
        self.d[_DF_AT] = 0xFFFF_FFFF if value & _DF else 1
        moved = (self.q[_EFLAGS] ^ value) & _VM
        self.q[_EFLAGS] = value & 0xFFFF_FFFF & ~(_CC | _DF) | 2
        self.flags_changed = True
        if moved:
            self._derive()

    def fold_flags(self) -> None:
        """Before the core is entered: it takes all flags from the register, and spreads them by itself."""
        self.q[_EFLAGS] = self.rflags
        self.flags_changed = False

    # ---- control registers ----------------------------------------------------------------------------------

    @property
    def cr0(self) -> int:
        value: int = self.q[_CR0]
        return value

    @cr0.setter
    def cr0(self, value: int) -> None:
        value = value & _M64 | 0x10
        if (value ^ self.q[_CR0]) & _CR0_PAGING:
            self.paging_changed = True
        self.q[_CR0] = value
        self._derive()

    @property
    def cr2(self) -> int:
        value: int = self.q[_CR0 + 2]
        return value

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.q[_CR0 + 2] = value & _M64

    @property
    def cr3(self) -> int:
        value: int = self.q[_CR0 + 3]
        return value

    @cr3.setter
    def cr3(self, value: int) -> None:
        self.q[_CR0 + 3] = value & _M64
        self.paging_changed = True

    @property
    def cr4(self) -> int:
        value: int = self.q[_CR0 + 4]
        return value

    @cr4.setter
    def cr4(self, value: int) -> None:
        self.q[_CR0 + 4] = value & _M64
        self.paging_changed = True
        self._derive()

    @property
    def efer(self) -> int:
        value: int = self.q[_EFER]
        return value

    @efer.setter
    def efer(self, value: int) -> None:
        self.q[_EFER] = value & _M64
        self.paging_changed = True
        self._derive()

    @property
    def xcr0(self) -> int:
        value: int = self.q[Env.XCR0 >> 3]
        return value

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.q[Env.XCR0 >> 3] = value

    @property
    def pkru(self) -> int:
        value: int = self.d[Env.PKRU >> 2]
        return value

    @pkru.setter
    def pkru(self, value: int) -> None:
        self.d[Env.PKRU >> 2] = value
        self.paging_changed = True

    def get_dr(self, index: int) -> int:
        value: int = self.q[(Env.DR >> 3) + index]
        return value

    def set_dr(self, index: int, value: int) -> None:
        self.q[(Env.DR >> 3) + index] = value & _M64

    # ---- privilege and shadow ----------------------------------------------------------------------------------

    @property
    def cpl(self) -> int:
        value: int = self.d[_HFLAGS] & _CPL
        return value

    @cpl.setter
    def cpl(self, value: int) -> None:
        self.d[_HFLAGS] = self.d[_HFLAGS] & ~_CPL | value & 3

    @property
    def interrupt_shadow(self) -> bool:
        return self.d[_HFLAGS] & _SHADOW != 0

    @interrupt_shadow.setter
    def interrupt_shadow(self, value: bool) -> None:
        self.d[_HFLAGS] = self.d[_HFLAGS] & ~_SHADOW | (_SHADOW if value else 0)

    @property
    def nmi_masked(self) -> bool:
        """NMIs are blocked until the next IRET, which the core itself executes."""
        return self.d[_HFLAGS2] & _NMI != 0

    @nmi_masked.setter
    def nmi_masked(self, value: bool) -> None:
        self.d[_HFLAGS2] = self.d[_HFLAGS2] & ~_NMI | (_NMI if value else 0)

    @property
    def long_mode(self) -> bool:
        return self.d[_HFLAGS] & _CS64 != 0

    @property
    def iret_intercepted(self) -> bool:
        """IRET is answered outside the core, which would lose the bases of FS and GS: see :meth:`guard_bases`."""
        return bool(self.q[Env.INTERCEPT >> 3] & _IRET_BIT)

    @iret_intercepted.setter
    def iret_intercepted(self, value: bool) -> None:
        self.q[Env.INTERCEPT >> 3] = self.q[Env.INTERCEPT >> 3] & ~_IRET_BIT | (_IRET_BIT if value else 0)

    def guard_bases(self) -> None:
        """FS or GS got a base by an MSR: from now on IRET is intercepted if it would take the selector."""
        if any(loses_selector(self.segment(which), 3) for which in (Seg.FS, Seg.GS)):
            self.iret_intercepted = True

    # ---- segments and tables -------------------------------------------------------------------------------------

    def selector(self, which: Seg) -> int:
        value: int = self.d[_SEGMENT_AT[which] >> 2]
        return value

    def segment(self, which: Seg) -> Segment:
        at = _SEGMENT_AT[which] >> 3
        q = self.q
        hidden = q[at + 2]
        flags = hidden >> 32 & _SEGMENT_FLAGS
        if which == _TR:
            flags |= _BUSY
        return _new(Segment, (q[at] & 0xFFFF_FFFF, q[at + 1], hidden & 0xFFFF_FFFF, flags))

    def set_segment(self, which: Seg, value: Segment) -> None:
        at = _SEGMENT_AT[which]
        d = self.d
        selector, base, limit, flags = value
        d[at >> 2] = selector & 0xFFFF
        self.q[at + 8 >> 3] = base & _M64
        d[at + 16 >> 2] = limit & 0xFFFF_FFFF
        if which == _TR:
            # The core keeps the type without Busy, and aborts the process on anything but a present TSS.
            flags = flags & ~0x1600 | 0x8100
        d[at + 20 >> 2] = flags & 0xFFFF_FFFF
        if which <= _DS:
            if which == _SS:
                d[_HFLAGS] = d[_HFLAGS] & ~_CPL | flags >> 13 & 3
            self._derive()

    @property
    def gdt(self) -> DescriptorTable:
        return DescriptorTable(self.q[Env.GDT + 8 >> 3], self.d[Env.GDT + 16 >> 2])

    @gdt.setter
    def gdt(self, value: DescriptorTable) -> None:
        self.q[Env.GDT + 8 >> 3] = value.base & _M64
        self.d[Env.GDT + 16 >> 2] = value.limit & 0xFFFF

    @property
    def idt(self) -> DescriptorTable:
        return DescriptorTable(self.q[Env.IDT + 8 >> 3], self.d[Env.IDT + 16 >> 2])

    @idt.setter
    def idt(self, value: DescriptorTable) -> None:
        self.q[Env.IDT + 8 >> 3] = value.base & _M64
        self.d[Env.IDT + 16 >> 2] = value.limit & 0xFFFF

    # ---- derived -------------------------------------------------------------------------------------------------

    def _derive(self) -> None:
        """Recompute the mode and size bits of hflags; CPL, the shadow and the intercept bits stay."""
        d, q = self.d, self.q
        cr0, eflags, cs = q[_CR0], q[_EFLAGS], d[_CS_FLAGS]
        flags = d[_HFLAGS] & _KEPT | (cr0 << 8) & _FROM_CR0  # CR0 bits 1-3 -> hflags 9-11
        if cr0 & 1:
            flags |= _PE
        cr4 = q[_CR0 + 4]
        if cr4 & 0x200:
            flags |= _OSFXSR
        if cr4 & 0x20_0000:
            flags |= _SMAP
        lma = q[_EFER] & 0x400
        if lma and cs & 0x20_0000:
            flags |= _LONG_CODE
        else:
            if lma:
                flags |= _LMA
            if cs & 0x40_0000:
                flags |= _CS32
            if d[_SS_FLAGS] & 0x40_0000:
                flags |= _SS32
            if not cr0 & 1 or eflags & _VM or not flags & _CS32 or q[_DS_BASE] | q[_ES_BASE] | q[_SS_BASE]:
                flags |= _ADDSEG
        if eflags & _VM and cr0 & 1:
            flags |= 3  # virtual-8086 code runs at CPL 3
        d[_HFLAGS] = flags
