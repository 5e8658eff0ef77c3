"""Steal time: how long a vCPU waited for a CPU, and whether it is off its CPU now, in a record that its guest reads.

The record, 64 bytes at the 64-byte aligned address in MSR 0x4B564D03:

    0 u64 steal (ns)   8 u32 version   12 u32 flags   16 u8 preempted   17.. padding

Rules (``arch/x86/kvm/x86.c`` of Linux 6.16):

* An update brings ``version`` to odd, adds the run delay since the last update, makes it even. Junk that is odd is made
  even first. ``last_steal`` starts at 0, so the first update reports everything since the vCPU's thread began.
* A host that takes a vCPU off its CPU stores PREEMPTED, once. A sibling that wants its TLB flushed may then set
  FLUSH_TLB with a compare-and-exchange instead of sending an IPI. The next update swaps the byte with 0, and the TLB
  must be flushed before guest code runs.
* An address without memory is accepted; the updates then do nothing.

The byte's swap is a read and a write here, so :meth:`StealTime.update` is called while no code of this machine runs.
Being halted is not being stolen from: the run delay counts waiting for a CPU only, and is the caller's figure.

Modelled: all of it. Not modelled: refusing the MSR when the host keeps no such account; this host always does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiovm.bits import mask
from aiovm.memory import GuestPtr

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["PreemptedFlag", "StealTime", "StealTimeState"]

_ENABLED = 1
_RESERVED = 0x3E
_SIZE, _VERSION, _PREEMPTED = 64, 8, 16


class PreemptedFlag(enum.IntFlag):
    """The record's byte 16."""

    PREEMPTED = 1
    FLUSH_TLB = 2


@dataclass(slots=True)
class StealTimeState:
    """``msr_val`` is the MSR, ``last_steal`` the run delay at the last update, ``preempted`` what the host stored."""

    msr_val: int = 0
    last_steal: int = 0
    preempted: bool = False


class StealTime:
    """One vCPU's record."""

    __slots__ = ("_memory", "_record", "_s")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._s = StealTimeState()
        self._record: GuestPtr | None = None

    def read_msr(self) -> int:
        """MSR 0x4B564D03."""
        return self._s.msr_val

    def write_msr(self, value: int) -> bool:
        """Whether the store is allowed; one that enables (bit 0) asks for STEAL_UPDATE."""
        if value & _RESERVED:
            return False
        self._s.msr_val = value
        self._map()
        return True

    @property
    def enabled(self) -> bool:
        """Whether the guest asked for updates."""
        return self._record is not None

    def update(self, run_delay: int) -> bool:
        """The vCPU got a CPU, having waited ``run_delay`` ns in its life; whether its TLB must be flushed now."""
        record = self._record
        head = None if record is None else record.read(0, _PREEMPTED + 1)
        if record is None or head is None or not record.write(_PREEMPTED, b"\0"):
            return False
        s = self._s
        s.preempted = False
        version = int.from_bytes(head[_VERSION : _VERSION + 4], "little")
        version += 2 if version & 1 else 1
        steal = int.from_bytes(head[:8], "little") + run_delay - s.last_steal & mask(64)
        record.write(_VERSION, (version & mask(32)).to_bytes(4, "little"))
        record.write(0, steal.to_bytes(8, "little"))
        record.write(_VERSION, (version + 1 & mask(32)).to_bytes(4, "little"))
        s.last_steal = run_delay
        return bool(head[_PREEMPTED] & PreemptedFlag.FLUSH_TLB)

    def report_preempted(self) -> bool:
        """The vCPU lost its CPU at an instruction's boundary, still wanting it; whether the guest can see that now."""
        if self._record is None:
            return False
        if not self._s.preempted:
            self._s.preempted = self._record.write(_PREEMPTED, bytes([PreemptedFlag.PREEMPTED]))
        return self._s.preempted

    def save(self) -> StealTimeState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: StealTimeState) -> None:
        """Take over a saved state."""
        self._s = replace(state)
        self._map()

    def reset(self) -> None:
        """RESET and INIT: off. The thread's account goes on, so ``last_steal`` stays."""
        self.restore(StealTimeState(last_steal=self._s.last_steal))

    def _map(self) -> None:
        value = self._s.msr_val
        self._record = GuestPtr(self._memory, value & ~mask(6), _SIZE) if value & _ENABLED else None
