"""Breakpoints: the guest's own debug registers, and KVM_SET_GUEST_DEBUG's (SDM vol. 3B, 18.2).

Rules:

* Four breakpoints, enabled by DR7's L or G bits: on an instruction, on data written, or read and written. A debugger
  with USE_HW_BP has them all, and the guest's do nothing meanwhile.
* Instruction breakpoints are faults and do not strike with RFLAGS.RF; data breakpoints are traps. A load of SS holds
  both back: the one on the next instruction does not strike, its own strikes behind that, together with INT1's (SDM
  vol. 3A, 6.8.3).
* While one is enabled, or the debugger steps, the engine goes instruction by instruction. Data breakpoints compare
  physical addresses, so that every alias counts.
* I/O breakpoints (CR4.DE, type 2) are the core's own.

This module compares; the vCPU's port leaves or injects.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Breakpoint", "DebugControl", "breakpoints", "data_hits", "instruction_hits"]

_LENGTHS: Final = (1, 2, 8, 4)
_EXECUTE, _WRITE, _ANY = 0, 1, 3


class DebugControl(enum.IntFlag):
    """``KVM_GUESTDBG_*``."""

    NONE = 0
    ENABLE = 1
    SINGLESTEP = 2
    USE_SW_BP = 0x1_0000
    USE_HW_BP = 0x2_0000
    INJECT_DB = 0x4_0000
    INJECT_BP = 0x8_0000
    BLOCKIRQ = 0x10_0000


class Breakpoint(NamedTuple):
    """One enabled breakpoint: its number, DR7's type (0 execute, 1 write, 3 read or write), linear range."""

    number: int
    type: int
    address: int
    length: int


def breakpoints(addresses: Sequence[int], dr7: int) -> tuple[Breakpoint, ...]:
    """The enabled ones of DR0-DR3 but for I/O breakpoints."""
    found = []
    for index in range(4):
        type_ = dr7 >> 16 + 4 * index & 3
        if dr7 >> 2 * index & 3 and type_ in (_EXECUTE, _WRITE, _ANY):
            length = _LENGTHS[dr7 >> 18 + 4 * index & 3]
            found.append(Breakpoint(index, type_, addresses[index] & -length, length))
    return tuple(found)


def instruction_hits(points: Iterable[Breakpoint], rip: int) -> int:
    """DR6's B0-B3 for the instruction at linear ``rip``."""
    return sum(1 << point.number for point in points if point.type == _EXECUTE and point.address == rip)


def data_hits(
    points: Iterable[Breakpoint], accesses: Sequence[tuple[int, int, bool]], translate: Callable[[int], int | None]
) -> int:
    """DR6's B0-B3 for an instruction's ``accesses`` (physical address, size, write); ``translate``: linear to that."""
    hits = 0
    for point in points:
        if point.type == _EXECUTE:
            continue
        start = translate(point.address)
        if start is None:
            continue
        if any(
            at < start + point.length and start < at + size and (write or point.type == _ANY)
            for at, size, write in accesses
        ):
            hits |= 1 << point.number
    return hits
