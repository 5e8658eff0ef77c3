"""The local APIC: xAPIC and x2APIC registers, priorities, accepting, EOI, local interrupts (SDM vol. 3A, ch. 10).

One chip a vCPU. Methods return values that say what the vCPU must do; nobody is called. Rules, from
``arch/x86/kvm/lapic.c`` (Linux 6.16):

* Deliverable is the highest IRR vector whose class is above PPR; PPR is a function of TPR and ISR alone.
* A vector may be in IRR and ISR at once; a third one merges. TMR holds the last accepted trigger mode of a vector.
* EOI retires the highest ISR bit. It is reported for vectors whose TMR bit is set, and for those in
  :attr:`Lapic.watched_vectors` (somebody awaits that acknowledge).
* Software disable (SPIV bit 8) masks the local vectors and drops new fixed interrupts; what is in IRR stays
  deliverable, and NMI, INIT, SIPI, SMI and the kick get through. Hardware disable (base MSR bit 11) delivers nothing.

Modelled: version 0x14 with six local vectors, the transitions of IA32_APIC_BASE, the KVM_GET/SET_LAPIC page.
Not modelled: CMCI, directed EOI (KVM hides it beside a version 0x11 I/O APIC), recorded errors (ESR reads 0, as
KVM's), arbitration ids, the spurious vector (nothing deliverable is "none"), the MMIO hole while disabled (the page
reads all ones).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aiovm.errors import ConfigError
from aiovm.lapic_message import Accepted, DeliveryMode, IpiMessage, Shorthand, decode_icr
from aiovm.lapic_registers import (
    APIC_BASE,
    LVT_MASKED,
    LVT_WRITABLE,
    NO_EFFECT,
    BaseMsr,
    LapicEffect,
    LapicState,
    Lvt,
    Reg,
)
from aiovm.lapic_timer import LapicTimer, LapicTimerState, TimerMode
from aiovm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "APIC_BASE",
    "Accepted",
    "DeliveryMode",
    "IpiMessage",
    "Lapic",
    "LapicEffect",
    "LapicState",
    "Lvt",
    "Shorthand",
]

_SW_ENABLE: Final = 1 << 8
#: Reserved bits of the 64-bit ICR: 31:20, 17:16 and 13.
_X2APIC_ICR_RESERVED: Final = 0xFFF3_2000
_PAGE_BYTES: Final = 0x400
_HIDDEN: Final = -PAGE
_MODES: Final = tuple(DeliveryMode)
_TIMER_MODES: Final = tuple(TimerMode)

_EVENT: Final = LapicEffect(event=True)
_TIMER: Final = LapicEffect(timer=True)
_MAP: Final = LapicEffect(map_changed=True)


class Lapic:
    """The local APIC of vCPU ``vcpu_id``. ``bsp``: base bit 8 at reset. The rest is what CPUID promises."""

    __slots__ = (
        "_bsp",
        "_enabled",
        "_hw",
        "_ppr",
        "_reserved_base",
        "_s",
        "_timer_mask",
        "_x2apic",
        "page",
        "timer",
        "vcpu_id",
        "watched_vectors",
    )

    def __init__(
        self,
        vcpu_id: int,
        *,
        bsp: bool,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        maxphyaddr: int = 46,
        bus_cycle_ns: int = 1,
    ) -> None:
        if not 0 <= vcpu_id < 1 << 32:
            raise ConfigError(f"vCPU id {vcpu_id:#x} is not an APIC id")
        if not 32 <= maxphyaddr <= 52 or bus_cycle_ns < 1:
            raise ConfigError(f"maxphyaddr {maxphyaddr} or bus cycle {bus_cycle_ns} ns is out of range")
        self.vcpu_id = vcpu_id
        self.timer = LapicTimer(bus_cycle_ns=bus_cycle_ns)
        #: Edge-triggered vectors whose EOI somebody awaits, as a 256-bit map (KVM's acknowledge notifiers).
        self.watched_vectors = 0
        self._bsp = bsp
        self._reserved_base = BaseMsr.RESERVED | ~((1 << maxphyaddr) - 1) | (0 if x2apic else BaseMsr.EXTD)
        self._timer_mask = 0x6_0000 if tsc_deadline else 0x2_0000
        self._s = LapicState()
        self._hw = self._enabled = self._x2apic = False
        self._ppr = 0
        #: Where the register page lies; below every address while the page is not to be seen.
        self.page = _HIDDEN
        self.reset()

    # ---- what it is ----------------------------------------------------------------------------------------

    @property
    def state(self) -> LapicState:
        """The live state, to look at."""
        return self._s

    @property
    def hw_enabled(self) -> bool:
        """IA32_APIC_BASE bit 11."""
        return self._hw

    @property
    def enabled(self) -> bool:
        """Enabled by hardware and by software (SPIV bit 8)."""
        return self._enabled

    @property
    def x2apic(self) -> bool:
        """x2APIC mode."""
        return self._x2apic

    @property
    def apic_id(self) -> int:
        """The id that physical destinations compare: 8 bits in xAPIC mode, 32 in x2APIC mode."""
        return self._s.apic_id if self._x2apic else self._s.apic_id >> 24

    @property
    def is_bsp(self) -> bool:
        """IA32_APIC_BASE bit 8, as it stands now."""
        return bool(self._s.base & BaseMsr.BSP)

    @property
    def base_address(self) -> int:
        """Where the register page lies."""
        return self._s.base & ~0xFFF

    @property
    def apic_base(self) -> int:
        """IA32_APIC_BASE."""
        return self._s.base

    def set_apic_base(self, value: int, *, host_initiated: bool = False) -> bool:
        """Write IA32_APIC_BASE; False is #GP. After True, rebuild the destination map."""
        s = self._s
        old = s.base
        if value == old:
            return True
        mode = value & (BaseMsr.EN | BaseMsr.EXTD)
        if value & self._reserved_base or mode == BaseMsr.EXTD:
            return False
        if not host_initiated:
            was = old & (BaseMsr.EN | BaseMsr.EXTD)
            if (was == BaseMsr.EN | BaseMsr.EXTD and mode == BaseMsr.EN) or (not was and mode & BaseMsr.EXTD):
                return False
        s.base = value
        changed = old ^ value
        if mode & BaseMsr.EXTD:
            if changed & BaseMsr.EXTD:
                self._set_x2apic_id()
        elif value & BaseMsr.EN and changed & (BaseMsr.EN | BaseMsr.EXTD):
            s.apic_id = (self.vcpu_id & 0xFF) << 24
        self._decode()
        return True

    # ---- register access -----------------------------------------------------------------------------------

    def mmio_read(self, offset: int, size: int, now: int) -> int:
        """The register page: 1, 2 or 4 bytes inside one register; anything else reads 0, a disabled page all ones."""
        if self.page < 0:
            return (1 << (8 * size)) - 1
        shift = offset & 0xF
        if shift + size > 4:
            return 0
        load = _LOADS.get(offset & 0xFF0)
        if load is None:
            return 0
        value = load(self, now)
        return value if size == 4 else value >> (8 * shift) & ((1 << (8 * size)) - 1)

    def mmio_write(self, offset: int, size: int, value: int, now: int) -> LapicEffect:
        """The register page: 4 bytes at a multiple of 16; anything else is ignored."""
        if size != 4 or self.page < 0:
            return NO_EFFECT
        store = _STORES.get(offset)
        return NO_EFFECT if store is None else store(self, value & 0xFFFF_FFFF, now)

    def msr_read(self, index: int, now: int) -> int | None:
        """RDMSR of 0x800–0x8FF; None is #GP."""
        if not self._x2apic or not 0x800 <= index <= 0x8FF:
            return None
        offset = (index - 0x800) << 4
        if offset == Reg.ICR:
            return self._s.icr
        if offset in (Reg.DFR, Reg.ICR2, 0x090):
            return None
        return self._read(offset, now)

    def msr_write(self, index: int, value: int, now: int) -> LapicEffect | None:
        """WRMSR of 0x800–0x8FF; None is #GP."""
        if not self._x2apic or not 0x800 <= index <= 0x8FF:
            return None
        offset = (index - 0x800) << 4
        if offset == Reg.ICR:
            if value & _X2APIC_ICR_RESERVED:
                return None
            self._s.icr = value & ~0x1000
            return LapicEffect(decode_icr(value, value >> 32))
        if value >> 32 or offset in (Reg.ID, Reg.LDR, Reg.DFR, Reg.ICR2) or (offset == Reg.ESR and value):
            return None
        if offset == Reg.SELF_IPI:
            return None if value & ~0xFF else LapicEffect(decode_icr(0x4_0000 | value, 0))
        store = _STORES.get(offset)  # what only one of the modes has is filtered before
        return None if store is None else store(self, value, now)

    def read_deadline(self) -> int:
        """IA32_TSC_DEADLINE."""
        return self.timer.read_deadline() if self._hw else 0

    def write_deadline(self, tsc_value: int, deadline_ns: int, now: int) -> None:
        """IA32_TSC_DEADLINE := ``tsc_value``, which the guest's TSC reaches at ``deadline_ns``; re-arm afterwards."""
        if self._hw:
            self.timer.write_deadline(tsc_value, deadline_ns, now)

    # ---- priorities ----------------------------------------------------------------------------------------

    @property
    def tpr(self) -> int:
        """The task priority."""
        return self._s.tpr

    def write_tpr(self, value: int) -> LapicEffect:
        """Set the task priority."""
        self._s.tpr = value & 0xFF
        old = self._ppr
        self._update_ppr()
        return _EVENT if self._ppr < old and self.pending_vector() >= 0 else NO_EFFECT

    @property
    def cr8(self) -> int:
        """TPR bits 7:4."""
        return self._s.tpr >> 4

    def write_cr8(self, value: int) -> LapicEffect:
        """MOV to CR8: TPR := bits 3:0, shifted (6.16 clears TPR's low nibble)."""
        return self.write_tpr((value & 0xF) << 4)

    @property
    def ppr(self) -> int:
        """The processor priority."""
        return self._ppr

    # ---- interrupts ----------------------------------------------------------------------------------------

    @property
    def has_irr(self) -> bool:
        """Some vector is requested, deliverable or not."""
        return self._s.irr != 0

    def highest_isr(self) -> int:
        """The vector in service with the highest priority, or -1."""
        return self._s.isr.bit_length() - 1

    def pending_vector(self) -> int:
        """The vector that could be delivered now, or -1."""
        irr = self._s.irr
        if not irr or not self._hw:
            return -1
        vector = irr.bit_length() - 1
        return vector if vector & 0xF0 > self._ppr else -1

    def acknowledge(self) -> int:
        """Take the deliverable vector from IRR into ISR and return it; -1 when there is none."""
        s = self._s
        irr = s.irr
        if not irr or not self._hw:
            return -1
        vector = irr.bit_length() - 1
        if vector & 0xF0 <= self._ppr:
            return -1
        bit = 1 << vector
        s.irr = irr ^ bit
        s.isr |= bit
        self._ppr = vector & 0xF0  # its class is above PPR, hence above TPR's
        return vector

    def eoi(self) -> LapicEffect:
        """Retire the highest vector in service; nothing happens when there is none."""
        s = self._s
        isr = s.isr
        if not isr:
            return NO_EFFECT
        vector = isr.bit_length() - 1
        bit = 1 << vector
        s.isr = isr ^ bit
        self._update_ppr()
        if (s.tmr | self.watched_vectors) & bit:
            return LapicEffect(None, vector, s.tmr & bit != 0, True)
        return _EVENT

    def accept(self, mode: DeliveryMode, vector: int, *, level: bool = True, trigger_level: bool = False) -> Accepted:
        """Take a message that was sent to this chip; the answer says what the vCPU is owed."""
        s = self._s
        if mode is DeliveryMode.FIXED or mode is DeliveryMode.LOWEST_PRIORITY:
            if mode is DeliveryMode.LOWEST_PRIORITY:
                s.arb_prio += 1
            if not self._enabled or (trigger_level and not level):
                return Accepted.DROPPED
            bit = 1 << (vector & 0xFF)
            if trigger_level:
                s.tmr |= bit
            else:
                s.tmr &= ~bit
            s.irr |= bit
            return Accepted.EVENT
        if mode is DeliveryMode.REMOTE_READ:
            return Accepted.UNHALT
        if mode is DeliveryMode.NMI:
            return Accepted.NMI
        if mode is DeliveryMode.SMI:
            return Accepted.SMI
        if mode is DeliveryMode.INIT:
            if trigger_level and not level:
                return Accepted.DROPPED
            s.init_pending = True
            s.sipi_pending = False  # INIT overwrites a SIPI that was not taken yet
            return Accepted.INIT
        if mode is DeliveryMode.STARTUP:
            s.sipi_vector = vector & 0xFF
            s.sipi_pending = True
            return Accepted.STARTUP
        return Accepted.DROPPED  # ExtINT: see accepts_extint()

    def accepts_extint(self) -> bool:
        """Whether the 8259's INTR reaches this CPU: through LVT0 in ExtINT mode, or past a disabled chip."""
        return not self._hw or self._s.lvt[Lvt.LINT0] & 0x1_0700 == 0x700

    @property
    def lint0_is_nmi(self) -> bool:
        """LVT0 is in NMI mode, unmasked: each tick of the 8254 is an NMI here (the old watchdog)."""
        return self._s.lvt[Lvt.LINT0] & 0x1_0700 == 0x400

    def deliver_lvt(self, which: Lvt) -> Accepted:
        """A local interrupt source fired. A delivered performance interrupt masks its entry, as on Intel."""
        entry = self._s.lvt[which]
        if not self._hw or entry & LVT_MASKED:
            return Accepted.DROPPED
        answer = self.accept(_MODES[entry >> 8 & 7], entry & 0xFF, trigger_level=entry & 0x8000 != 0)
        if which is Lvt.PERFORMANCE and answer is not Accepted.DROPPED:
            self._set_lvt(which, entry | LVT_MASKED)
        return answer

    # ---- the timer, as the run loop sees it ----------------------------------------------------------------

    def has_pending_timer(self) -> bool:
        """An expired timer waits that delivering would turn into an interrupt: a halted vCPU wakes."""
        return self.timer.pending and self._enabled and not self._s.lvt[Lvt.TIMER] & LVT_MASKED

    def inject_timer(self) -> bool:
        """Deliver a pending expiry; whether IRR got it (a masked timer's tick is lost)."""
        if not self.timer.pending:
            return False
        answer = self.deliver_lvt(Lvt.TIMER)
        self.timer.delivered()
        return answer is Accepted.EVENT

    # ---- INIT and SIPI -------------------------------------------------------------------------------------

    @property
    def pending_events(self) -> bool:
        """INIT or SIPI waits to be taken."""
        return self._s.init_pending or self._s.sipi_pending

    def take_init(self) -> bool:
        """Whether INIT was pending; it no longer is."""
        taken = self._s.init_pending
        self._s.init_pending = False
        return taken

    def latch_init(self, pending: bool) -> None:
        """KVM_SET_VCPU_EVENTS: an INIT waits for the end of SMM, or none does."""
        self._s.init_pending = pending

    def take_sipi(self) -> int | None:
        """The vector of a pending SIPI, which no longer is, or None."""
        if not self._s.sipi_pending:
            return None
        self._s.sipi_pending = False
        return self._s.sipi_vector

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> LapicState:
        """A copy of the state."""
        return replace(self._s, timer=self.timer.save())

    def restore(self, state: LapicState) -> None:
        """Take over a copy of ``state``."""
        self.timer.restore(state.timer)
        self._s = replace(state, timer=self.timer.state)
        self._decode()

    def reset(self, *, init: bool = False) -> None:
        """RESET, or INIT, which keeps the base MSR, the id and, in x2APIC mode, LDR. Latched INIT/SIPI stay."""
        old = self._s
        new = LapicState(init_pending=old.init_pending, sipi_pending=old.sipi_pending, sipi_vector=old.sipi_vector)
        if init:
            new.base = old.base
            new.apic_id = old.apic_id
            if self._x2apic:
                new.ldr = old.ldr
        else:
            new.apic_id = (self.vcpu_id & 0xFF) << 24
            if self._bsp:
                new.base |= BaseMsr.BSP
        if self._bsp:
            # KVM_X86_QUIRK_LINT0_REENABLED: firmware that never sets LVT0 still gets the 8259.
            new.lvt = (*new.lvt[: Lvt.LINT0], 0x700, *new.lvt[Lvt.LINT0 + 1 :])
        self.restore(new)

    def to_page(self, now: int) -> bytes:
        """``struct kvm_lapic_state``: the first 1 KiB of the register page; a 32-bit id in x2APIC mode."""
        page = bytearray(_PAGE_BYTES)
        for offset in range(Reg.ID, _PAGE_BYTES, 0x10):
            value = self._read(offset, now)
            if value is not None:
                page[offset : offset + 4] = value.to_bytes(4, "little")
        return bytes(page)

    def from_page(self, page: bytes, now: int) -> bool:
        """KVM_SET_LAPIC; False (EINVAL) when an x2APIC's id differs. The timer goes on from TMCCT.

        The page has no place for a pending expiry: a one-shot timer whose TMCCT is 0 expires at once.
        """
        if len(page) != _PAGE_BYTES:
            raise ConfigError(f"a LAPIC page is {_PAGE_BYTES:#x} bytes, not {len(page):#x}")

        def word(offset: int) -> int:
            return int.from_bytes(page[offset : offset + 4], "little")

        def bitmap(offset: int) -> int:
            return sum(word(offset + 0x10 * i) << (32 * i) for i in range(8))

        s = self._s
        if self._x2apic and word(Reg.ID) != self.vcpu_id:
            return False
        if not self._x2apic:
            s.apic_id = word(Reg.ID) & 0xFF00_0000
            s.ldr = word(Reg.LDR) & 0xFF00_0000
            s.dfr = word(Reg.DFR) | 0x0FFF_FFFF
        s.tpr = word(Reg.TPR) & 0xFF
        s.spiv = word(Reg.SPIV) & 0x3FF
        s.isr, s.tmr, s.irr = bitmap(Reg.ISR), bitmap(Reg.TMR), bitmap(Reg.IRR)
        s.icr = word(Reg.ICR) | word(Reg.ICR2) << 32
        s.lvt = tuple(word(Reg.LVTT + 0x10 * i) & self._lvt_writable(i) for i in range(6))
        s.arb_prio = 0
        self.timer.restore(
            LapicTimerState(
                mode=_TIMER_MODES[s.lvt[Lvt.TIMER] >> 17 & 3], tmict=word(Reg.TMICT), tdcr=word(Reg.TDCR) & 0xB
            )
        )
        s.timer = self.timer.state
        self.timer.start_at_count(word(Reg.TMCCT), now)
        self._decode()
        return True

    # ---- inside --------------------------------------------------------------------------------------------

    def _read(self, offset: int, now: int) -> int | None:
        """The register at ``offset``, or None where none is readable."""
        load = _LOADS.get(offset)
        return None if load is None else load(self, now)

    def _write_eoi(self, _value: int, _now: int) -> LapicEffect:
        return self.eoi()

    def _write_icr(self, value: int, _now: int) -> LapicEffect:
        s = self._s
        low = value & ~0x1000
        s.icr = s.icr & 0xFFFF_FFFF_0000_0000 | low
        return LapicEffect(decode_icr(low, s.icr >> 56))

    def _write_icr2(self, value: int, _now: int) -> LapicEffect:
        s = self._s
        s.icr = s.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
        return NO_EFFECT

    def _write_tmict(self, value: int, now: int) -> LapicEffect:
        self.timer.write_tmict(value, now)
        return _TIMER

    def _write_tdcr(self, value: int, now: int) -> LapicEffect:
        self.timer.write_tdcr(value, now)
        return _TIMER

    def _write_tpr(self, value: int, _now: int) -> LapicEffect:
        return self.write_tpr(value)

    def _write_esr(self, _value: int, _now: int) -> LapicEffect:
        return NO_EFFECT

    def _write_spiv(self, value: int, _now: int) -> LapicEffect:
        s = self._s
        value &= 0x3FF
        changed = (s.spiv ^ value) & _SW_ENABLE
        s.spiv = value
        if not value & _SW_ENABLE:
            s.lvt = tuple(entry | LVT_MASKED for entry in s.lvt)
            self.timer.drop_pending()
        self._decode()
        return _MAP if changed else NO_EFFECT

    def _write_lvt(self, which: Lvt, value: int, _now: int) -> LapicEffect:
        if not self._s.spiv & _SW_ENABLE:
            value |= LVT_MASKED
        value &= self._lvt_writable(which)
        self._set_lvt(which, value)
        if which is not Lvt.TIMER:
            return NO_EFFECT
        self.timer.set_mode(_TIMER_MODES[value >> 17 & 3])
        return _TIMER

    def _lvt_writable(self, which: int) -> int:
        return LVT_WRITABLE[which] | (0 if which else self._timer_mask)

    def _set_lvt(self, which: Lvt, value: int) -> None:
        lvt = self._s.lvt
        self._s.lvt = (*lvt[:which], value, *lvt[which + 1 :])

    def _set_x2apic_id(self) -> None:
        s = self._s
        s.apic_id = self.vcpu_id
        s.ldr = (self.vcpu_id >> 4) << 16 & 0xFFFF_0000 | 1 << (self.vcpu_id & 0xF)

    def _update_ppr(self) -> None:
        s = self._s
        tpr = s.tpr
        service = (s.isr.bit_length() - 1) & 0xF0 if s.isr else 0
        self._ppr = tpr if tpr & 0xF0 >= service else service

    def _decode(self) -> None:
        """Refresh what the hot paths keep decoded."""
        s = self._s
        self._hw = s.base & BaseMsr.EN != 0
        self._x2apic = s.base & (BaseMsr.EN | BaseMsr.EXTD) == BaseMsr.EN | BaseMsr.EXTD
        self._enabled = self._hw and s.spiv & _SW_ENABLE != 0
        self.page = self.base_address if self._hw and not self._x2apic else _HIDDEN
        self._update_ppr()


def _map_store(name: str, writable: int, ones: int = 0) -> Callable[[Lapic, int, int], LapicEffect]:
    """To a register by which others find this APIC: what is writable of it, and its bits that read 1."""

    def store(apic: Lapic, value: int, _now: int) -> LapicEffect:
        value = value & writable | ones
        if getattr(apic._s, name) == value:
            return NO_EFFECT
        setattr(apic._s, name, value)
        return _MAP

    return store


def _lvt_store(which: Lvt) -> Callable[[Lapic, int, int], LapicEffect]:
    return lambda apic, value, now: apic._write_lvt(which, value, now)


def _vector_load(name: str, at: int) -> Callable[[Lapic, int], int]:
    """32 of the 256 bits of ISR, TMR or IRR, the ``at``-th."""
    return lambda apic, _now: getattr(apic._s, name) >> 32 * at & 0xFFFF_FFFF


def _lvt_load(at: int) -> Callable[[Lapic, int], int]:
    return lambda apic, _now: apic._s.lvt[at]


#: What a load gets, by register.
_LOADS: Final[dict[int, Callable[[Lapic, int], int]]] = {
    Reg.ID: lambda apic, _: apic._s.apic_id,
    Reg.VERSION: lambda _apic, _now: 0x5_0014,
    Reg.TPR: lambda apic, _: apic._s.tpr,
    0x090: lambda _apic, _now: 0,  # the arbitration priority
    Reg.PPR: lambda apic, _: apic._ppr,
    Reg.LDR: lambda apic, _: apic._s.ldr,
    Reg.DFR: lambda apic, _: apic._s.dfr,
    Reg.SPIV: lambda apic, _: apic._s.spiv,
    Reg.ESR: lambda _apic, _now: 0,
    Reg.ICR: lambda apic, _: apic._s.icr & 0xFFFF_FFFF,
    Reg.ICR2: lambda apic, _: apic._s.icr >> 32,
    Reg.TMICT: lambda apic, _: apic._s.timer.tmict,
    Reg.TMCCT: lambda apic, now: apic.timer.read_tmcct(now),
    Reg.TDCR: lambda apic, _: apic._s.timer.tdcr,
    **{Reg.LVTT + 0x10 * at: _lvt_load(at) for at in range(6)},
    **{
        base + 0x10 * at: _vector_load(name, at)
        for base, name in ((Reg.ISR, "isr"), (Reg.TMR, "tmr"), (Reg.IRR, "irr"))
        for at in range(8)
    },
}
#: Who takes a store, by register.
_STORES: Final[dict[int, Callable[[Lapic, int, int], LapicEffect]]] = {
    Reg.EOI: Lapic._write_eoi,
    Reg.ICR: Lapic._write_icr,
    Reg.ICR2: Lapic._write_icr2,
    Reg.TMICT: Lapic._write_tmict,
    Reg.TDCR: Lapic._write_tdcr,
    Reg.TPR: Lapic._write_tpr,
    Reg.ID: _map_store("apic_id", 0xFF00_0000),
    Reg.LDR: _map_store("ldr", 0xFF00_0000),
    Reg.DFR: _map_store("dfr", 0xF000_0000, 0x0FFF_FFFF),
    Reg.SPIV: Lapic._write_spiv,
    Reg.ESR: Lapic._write_esr,
    **{Reg.LVTT + 0x10 * which: _lvt_store(which) for which in Lvt},
}
