"""The machine's side of the paravirtual clock: its offset, the master clock, the wall clock, GET_CLOCK and SET_CLOCK.

    a guest's clock = host time + kvmclock_offset

**Master clock.** If every vCPU derives its record from the *same* pair (host ns, host TSC), their clocks agree to the
nanosecond and the guest may read any of them: TSC_STABLE. That holds when all TSCs match and the boot vCPU has not
registered through the old MSR. Otherwise each record gets an instant of its own and the guest must keep a maximum.
While the pair is taken, MCLOCK_INPROGRESS holds all vCPUs out of the guest; CLOCK_UPDATE follows on each.

Rules (``arch/x86/kvm/x86.c`` of Linux 6.16):

* The clock starts at 0 when the machine is made (``kvmclock_offset`` = -now).
* SET_CLOCK measures from the master pair when it is in use, so that system times never become negative.
* The wall clock record says when the guest's clock was 0. It is written once, at the MSR's store; address 0 is ignored.

Time is an argument: ``now`` in ns, ``wall_ns`` since 1970 where it matters; the host TSC is ``now`` in cycles.

Modelled: the above. Not modelled: what keeps drifting host clocks together, as host TSC and time here are one: the
delayed update of all vCPUs (100 ms; GLOBAL_CLOCK_UPDATE is CLOCK_UPDATE on the asking one), the periodic one (300 s).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from aiovm.bits import mask
from aiovm.errors import ConfigError
from aiovm.memory import NoMemory
from aiovm.pvclock import ClockSnapshot, clock_scale
from aiovm.tsc import ns_to_tsc
from aiovm.units import SEC

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["ClockData", "ClockFlag", "KvmClock", "KvmClockState", "clock_pairing", "write_wall_clock"]

_WALL_CLOCK = struct.Struct("<III")
_PAIRING = struct.Struct("<qqQI36x")
_EFAULT, _EOPNOTSUPP = -14, -95


class ClockFlag(enum.IntFlag):
    """``KVM_CLOCK_*``."""

    NONE = 0
    TSC_STABLE = 2
    REALTIME = 4
    HOST_TSC = 8


class ClockData(NamedTuple):
    """``kvm_clock_data``; ``realtime`` and ``host_tsc`` count when their flag is set."""

    clock: int
    flags: ClockFlag = ClockFlag.NONE
    realtime: int = 0
    host_tsc: int = 0


@dataclass(slots=True)
class KvmClockState:
    """KVM's names; ``wall_clock`` is the wall clock MSR."""

    kvmclock_offset: int = 0
    use_master_clock: bool = False
    master_kernel_ns: int = 0
    master_cycle_now: int = 0
    boot_vcpu_runs_old_kvmclock: bool = False
    wall_clock: int = 0


class KvmClock:
    """One machine's clock, made at ``now``."""

    __slots__ = ("_khz", "_s")

    def __init__(self, *, host_khz: int, now: int) -> None:
        self._khz = host_khz
        self._s = KvmClockState(kvmclock_offset=-now)
        self.update_masterclock(now)

    @property
    def use_master_clock(self) -> bool:
        """Whether records are stable."""
        return self._s.use_master_clock

    @property
    def wall_clock(self) -> int:
        """MSR 0x11 and 0x4B564D00."""
        return self._s.wall_clock

    def register(self, *, old_msr: bool) -> bool:
        """The boot vCPU's guest stored to the system time MSR; whether MASTERCLOCK_UPDATE is due."""
        changed = self._s.boot_vcpu_runs_old_kvmclock != old_msr
        self._s.boot_vcpu_runs_old_kvmclock = old_msr
        return changed

    def update_masterclock(self, now: int, *, tscs_match: bool = True) -> None:
        """MASTERCLOCK_UPDATE: decide, and take a new pair; CLOCK_UPDATE is due on every vCPU."""
        s = self._s
        s.use_master_clock = tscs_match and not s.boot_vcpu_runs_old_kvmclock
        s.master_kernel_ns, s.master_cycle_now = now, ns_to_tsc(now, self._khz)

    def snapshot(self, now: int) -> ClockSnapshot:
        """The instant that a record is made from: the master pair, or this one."""
        s = self._s
        if s.use_master_clock:
            return ClockSnapshot(s.master_kernel_ns + s.kvmclock_offset, s.master_cycle_now, True)
        return ClockSnapshot(now + s.kvmclock_offset, ns_to_tsc(now, self._khz), False)

    def read(self, now: int) -> int:
        """The guest's clock: with the master clock computed as the guest computes it."""
        base = self.snapshot(now)
        return base.system_time + clock_scale(self._khz).scale(ns_to_tsc(now, self._khz) - base.host_tsc)

    def get_clock(self, now: int, wall_ns: int) -> ClockData:
        """KVM_GET_CLOCK."""
        clock = self.read(now)
        if not self._s.use_master_clock:
            return ClockData(clock)
        flags = ClockFlag.TSC_STABLE | ClockFlag.REALTIME | ClockFlag.HOST_TSC
        return ClockData(clock, flags, wall_ns, ns_to_tsc(now, self._khz))

    def set_clock(self, data: ClockData, now: int, wall_ns: int) -> None:
        """KVM_SET_CLOCK; CLOCK_UPDATE is due on every vCPU. With REALTIME the clock advances by what has passed."""
        if int(data.flags) & ~0xE:
            raise ConfigError(f"KVM_SET_CLOCK: unknown flags {int(data.flags):#x} (EINVAL)")
        self.update_masterclock(now)
        clock = data.clock
        if data.flags & ClockFlag.REALTIME and wall_ns > data.realtime:
            clock += wall_ns - data.realtime
        s = self._s
        s.kvmclock_offset = clock - (s.master_kernel_ns if s.use_master_clock else now)

    def write_wall_clock(self, memory: GuestMemory, gpa: int, now: int, wall_ns: int) -> None:
        """A store to the wall clock MSR."""
        self._s.wall_clock = gpa
        write_wall_clock(memory, gpa, wall_ns - self.read(now))

    def save(self) -> KvmClockState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: KvmClockState) -> None:
        """Take over a saved state; CLOCK_UPDATE is due on every vCPU."""
        self._s = replace(state)


def write_wall_clock(memory: GuestMemory, gpa: int, epoch_ns: int) -> None:
    """Store ``pvclock_wall_clock`` {version, sec, nsec}: the wall time at which the guest's clock was 0."""
    if gpa == 0:
        return
    sec, nsec = divmod(epoch_ns, SEC)
    try:
        version = memory.read_u(gpa, 4)
        version += 2 if version & 1 else 1
        memory.write_u(gpa, 4, version)
        memory.write(gpa, _WALL_CLOCK.pack(version & mask(32), sec & mask(32), nsec))
        memory.write_u(gpa, 4, version + 1)
    except NoMemory:
        return


def clock_pairing(memory: GuestMemory, gpa: int, kind: int, wall_ns: int, guest_tsc: int) -> int:
    """KVM_HC_CLOCK_PAIRING: store the wall time and the guest's TSC of one instant; the hypercall's result."""
    if kind != 0:
        return _EOPNOTSUPP
    sec, nsec = divmod(wall_ns, SEC)
    try:
        memory.write(gpa, _PAIRING.pack(sec, nsec, guest_tsc & mask(64), 0))
    except NoMemory:
        return _EFAULT
    return 0
