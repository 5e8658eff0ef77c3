"""The local APIC's registers and state as plain values (SDM vol. 3A, table 10-1).

What they do is in :mod:`aiovm.lapic`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.lapic_timer import LapicTimerState

if TYPE_CHECKING:
    from aiovm.lapic_message import IpiMessage

__all__ = ["APIC_BASE", "LVT_MASKED", "LVT_WRITABLE", "NO_EFFECT", "BaseMsr", "LapicEffect", "LapicState", "Lvt", "Reg"]

#: Where the register page lies at reset.
APIC_BASE: Final = 0xFEE0_0000

#: The mask bit of a local vector.
LVT_MASKED: Final = 1 << 16

#: Writable bits of each local vector; the timer's mode bits come on top (``arch/x86/kvm/lapic.c`` of Linux 6.16).
LVT_WRITABLE: Final = (0x110FF, 0x117FF, 0x117FF, 0x1F7FF, 0x1F7FF, 0x110FF)


class BaseMsr:
    """Bits of IA32_APIC_BASE."""

    BSP: Final = 1 << 8
    EXTD: Final = 1 << 10
    EN: Final = 1 << 11
    RESERVED: Final = 0x2FF


class Reg:
    """Register offsets (SDM vol. 3A, table 10-1); plain integers, for they are compared on every access."""

    ID: Final = 0x020
    VERSION: Final = 0x030
    TPR: Final = 0x080
    PPR: Final = 0x0A0
    EOI: Final = 0x0B0
    LDR: Final = 0x0D0
    DFR: Final = 0x0E0
    SPIV: Final = 0x0F0
    ISR: Final = 0x100
    TMR: Final = 0x180
    IRR: Final = 0x200
    ESR: Final = 0x280
    ICR: Final = 0x300
    ICR2: Final = 0x310
    LVTT: Final = 0x320
    LVT_ERROR: Final = 0x370
    TMICT: Final = 0x380
    TMCCT: Final = 0x390
    TDCR: Final = 0x3E0
    SELF_IPI: Final = 0x3F0


class Lvt(enum.IntEnum):
    """Local vectors, in register order from 0x320."""

    TIMER = 0
    THERMAL = 1
    PERFORMANCE = 2
    LINT0 = 3
    LINT1 = 4
    ERROR = 5


class LapicEffect(NamedTuple):
    """What a register access owes: a message to send, an EOI to pass on, an event to look for, a deadline that
    moved, a destination map to rebuild. ``eoi_level``: the retired vector's TMR bit."""

    ipi: IpiMessage | None = None
    eoi: int | None = None
    eoi_level: bool = False
    event: bool = False
    timer: bool = False
    map_changed: bool = False


#: Most accesses owe nothing: this very value.
NO_EFFECT: Final = LapicEffect()


@dataclass(slots=True)
class LapicState:
    """The chip's registers. IRR, ISR and TMR are 256-bit maps; ``apic_id`` is the raw ID register."""

    base: int = APIC_BASE | BaseMsr.EN
    apic_id: int = 0
    tpr: int = 0
    ldr: int = 0
    dfr: int = 0xFFFF_FFFF
    spiv: int = 0xFF
    isr: int = 0
    tmr: int = 0
    irr: int = 0
    icr: int = 0
    lvt: tuple[int, ...] = (LVT_MASKED,) * 6
    timer: LapicTimerState = field(default_factory=LapicTimerState)
    init_pending: bool = False
    sipi_pending: bool = False
    sipi_vector: int = 0
    arb_prio: int = 0
