"""What a comparison of Linux's own spinlocks found, as values that go to a table or a file.

The JSON names and their order are those of the fields, and part of the command's interface. In virtual time the same
inputs and seed give the same bytes.
"""

from __future__ import annotations

import msgspec

from aiovm.results import to_json

__all__ = ["LinuxLockReport", "LinuxLockRow"]


class LinuxLockRow(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of spinlock under one load."""

    #: As ``--locks`` takes it: pvqspinlock, qspinlock (``nopvspin``), tas (a host without PV_UNHALT).
    lock: str
    #: As ``--loads`` takes it.
    load: str
    vcpus: int
    pcpus: int
    #: Pause-loop exiting.
    ple: bool
    #: virtual or wall.
    clock: str
    #: The window, in the guest's time; everything below happened in it.
    elapsed_ns: int
    #: Rounds of system calls, all vCPUs together.
    calls: int
    calls_per_s: float
    #: Calls a second, relative to qspinlock in the same circumstances; None when that was not measured.
    relative: float | None
    #: PV kicks that reached a vCPU.
    kicks: int
    halts: int
    ple_exits: int
    #: Directed yields tried, and those that had a candidate and reached it.
    yields_tried: int
    yields_won: int
    #: The part of the vCPUs' time in which they wanted a physical CPU and had none, 0 to 1.
    steal_share: float


class LinuxLockReport(msgspec.Struct, frozen=True, kw_only=True):
    """All rows of one command; in virtual time with the hash of everything that happened under load."""

    rows: list[LinuxLockRow]
    trace_hash: str | None

    def to_json(self) -> bytes:
        """The report as JSON, two spaces an indent, with a newline at the end."""
        return to_json(self)
