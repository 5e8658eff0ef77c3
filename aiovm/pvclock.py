"""The paravirtual clock of one vCPU: a record from which the guest computes the time without leaving.

The host stores, at one instant, the guest's TSC and the nanoseconds; the guest adds the cycles since then, converted:

    ns = system_time + scale(TSC - tsc_timestamp)       scale(d) = (d shifted by tsc_shift) * mul >> 32

Fixed point, because a guest must be able to do it in a handful of instructions, and because both sides then lose the
same fraction: at most a nanosecond in a few seconds, always downwards, so a later record never steps back.

The record (32 bytes, little-endian), at the address in MSR 0x4B564D01 (or 0x12, the old one), bit 0 enables:

    0 u32 version   4 u32 pad   8 u64 tsc_timestamp   16 u64 system_time   24 u32 mul   28 s8 shift   29 u8 flags

Rules (``arch/x86/kvm/x86.c`` of Linux 6.16, ``pvclock-abi.h``):

* ``version`` is odd while the record changes: ``(v + 1) | 1``, the record, then one more. Junk parity is thus repaired.
* Nobody publishes a timestamp in the guest's future: the difference is unsigned, and the clock would leap.
* TSC_STABLE iff the machine's master clock is in use (:mod:`aiovm.kvmclock`). GUEST_STOPPED is ORed in once when asked
  for (:meth:`PvClock.ctrl`) and stays until the guest clears it in its copy.
* A record must lie in one page of memory; otherwise the store to the MSR succeeds and the clock stays off.
* The record is written before the guest's next instruction after the store: the store asks for an update.
* RESET and INIT unregister the record. A changed memory map is noticed by the pointer.

Modelled: all of it. Not modelled: TSC catch-up.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from aiovm.bits import mask
from aiovm.errors import ConfigError, StateError
from aiovm.memory import PAGE, GuestPtr
from aiovm.units import SEC

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = [
    "ClockSnapshot",
    "PvClock",
    "PvClockState",
    "PvclockFlag",
    "PvclockRecord",
    "TimeScale",
    "clock_scale",
    "time_scale",
]

_ENABLED = 1
_RECORD = struct.Struct("<I4xQQIbB2x")
_VERSION = struct.Struct("<I")


class PvclockFlag(enum.IntFlag):
    """The record's byte 29."""

    NONE = 0
    TSC_STABLE = 1
    GUEST_STOPPED = 2


class TimeScale(NamedTuple):
    """A ratio as the guest computes it: shift (left when positive), then multiply by ``mul`` / 2^32."""

    shift: int
    mul: int

    def scale(self, delta: int) -> int:
        """``delta``, 64 bits unsigned, converted (``pvclock_scale_delta``)."""
        delta &= mask(64)
        delta = delta << self.shift & mask(64) if self.shift >= 0 else delta >> -self.shift
        return delta * self.mul >> 32 & mask(64)


def time_scale(scaled_hz: int, base_hz: int) -> TimeScale:
    """The scale that turns counts of ``base_hz`` into counts of ``scaled_hz`` (``kvm_get_time_scale``).

    >>> time_scale(10**9, 2_400_000_000)
    TimeScale(shift=-1, mul=3579139413)
    """
    if scaled_hz <= 0 or base_hz <= 0:
        raise ConfigError(f"no clock runs at {scaled_hz} Hz on {base_hz} Hz")
    shift = 0
    while base_hz > 2 * scaled_hz or base_hz >> 32:
        base_hz >>= 1
        shift -= 1
    while base_hz <= scaled_hz or scaled_hz >> 32:
        if scaled_hz >> 32 or base_hz >> 31:
            scaled_hz >>= 1
        else:
            base_hz <<= 1
        shift += 1
    return TimeScale(shift, (scaled_hz << 32) // base_hz)


def clock_scale(tsc_khz: int) -> TimeScale:
    """The scale of a clock on a TSC of ``tsc_khz``."""
    return time_scale(SEC, tsc_khz * 1000)


class PvclockRecord(NamedTuple):
    """``pvclock_vcpu_time_info``."""

    version: int
    tsc_timestamp: int
    system_time: int
    scale: TimeScale
    flags: PvclockFlag

    def pack(self) -> bytes:
        """The 32 bytes."""
        return _RECORD.pack(
            self.version, self.tsc_timestamp, self.system_time, self.scale.mul, self.scale.shift, self.flags
        )

    @classmethod
    def unpack(cls, data: bytes) -> PvclockRecord:
        """What 32 bytes say."""
        version, timestamp, system_time, mul, shift, flags = _RECORD.unpack(data)
        return cls(version, timestamp, system_time, TimeScale(shift, mul), PvclockFlag(flags))

    def read(self, tsc: int) -> int:
        """The time that a guest computes when its TSC is ``tsc``."""
        return self.system_time + self.scale.scale(tsc - self.tsc_timestamp) & mask(64)


class ClockSnapshot(NamedTuple):
    """One instant: the time for the record, the host's TSC then, and whether all vCPUs are given this same pair."""

    system_time: int
    host_tsc: int
    stable: bool


_UNPUBLISHED = PvclockRecord(0, 0, 0, TimeScale(0, 0), PvclockFlag.NONE)


@dataclass(slots=True)
class PvClockState:
    """KVM's names: ``time`` is the MSR, ``pv_time_enabled`` a record is registered, ``hv_clock`` what was stored last.

    ``hw_tsc_khz`` is the frequency for which ``hv_clock.scale`` was computed.
    """

    time: int = 0
    pv_time_enabled: bool = False
    hw_tsc_khz: int = 0
    hv_clock: PvclockRecord = _UNPUBLISHED
    pvclock_set_guest_stopped_request: bool = False


class PvClock:
    """One vCPU's clock record."""

    __slots__ = ("_memory", "_pv_time", "_s")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._s = PvClockState()
        self._pv_time: GuestPtr | None = None

    @property
    def enabled(self) -> bool:
        """Whether a record is registered."""
        return self._s.pv_time_enabled

    @property
    def pv_time(self) -> GuestPtr | None:
        """Where the record lies; None when none is registered."""
        return self._pv_time

    def read_msr(self) -> int:
        """MSR 0x12 and 0x4B564D01: the value as it was stored, even when no record could be registered."""
        return self._s.time

    def write_msr(self, value: int) -> None:
        """Any value is allowed; GLOBAL_CLOCK_UPDATE is due afterwards."""
        s = self._s
        s.time = value
        pointer = self._point(value) if value & _ENABLED else None
        s.pv_time_enabled = pointer is not None and pointer.valid
        self._pv_time = pointer if s.pv_time_enabled else None

    def update(self, snapshot: ClockSnapshot, guest_tsc: int, guest_khz: int) -> bool:
        """CLOCK_UPDATE: store the record; whether the guest got one.

        ``guest_tsc`` is this vCPU's TSC at ``snapshot.host_tsc``, ``guest_khz`` its speed.
        """
        s = self._s
        if s.hw_tsc_khz != guest_khz:
            s.hw_tsc_khz = guest_khz
            scale = clock_scale(guest_khz)
        else:
            scale = s.hv_clock.scale
        flags = PvclockFlag.TSC_STABLE if snapshot.stable else PvclockFlag.NONE
        record = PvclockRecord(s.hv_clock.version, guest_tsc, snapshot.system_time & mask(64), scale, flags)
        s.hv_clock = record
        if not s.pv_time_enabled or self._pv_time is None:
            return False
        if s.pvclock_set_guest_stopped_request:
            s.pvclock_set_guest_stopped_request = False
            record = record._replace(flags=flags | PvclockFlag.GUEST_STOPPED)
        return self._publish(self._pv_time, record)

    def ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped; CLOCK_UPDATE is due afterwards."""
        if not self._s.pv_time_enabled:
            raise StateError("KVMCLOCK_CTRL: this vCPU has not registered a clock record (EINVAL)")
        self._s.pvclock_set_guest_stopped_request = True

    def save(self) -> PvClockState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: PvClockState) -> None:
        """Take over a saved state; CLOCK_UPDATE is due afterwards."""
        self._s = replace(state)
        self._pv_time = self._point(state.time) if state.pv_time_enabled else None

    def reset(self) -> None:
        """RESET and INIT: no record any more."""
        self._s.time = 0
        self._s.pv_time_enabled = False
        self._pv_time = None

    def _point(self, value: int) -> GuestPtr | None:
        gpa = value & ~_ENABLED
        fits = gpa % PAGE + _RECORD.size <= PAGE
        return GuestPtr(self._memory, gpa, _RECORD.size) if fits else None

    def _publish(self, pointer: GuestPtr, record: PvclockRecord) -> bool:
        """The version protocol. No guest code runs meanwhile, but a sibling may stand in the middle of its read."""
        data = pointer.read(0, _RECORD.size)
        if data is None:
            return False
        guest = PvclockRecord.unpack(data)
        odd = (guest.version + 1 | 1) & mask(32)
        if not pointer.write(0, _VERSION.pack(odd)):
            return False
        pointer.write(
            0, record._replace(version=odd, flags=record.flags | guest.flags & PvclockFlag.GUEST_STOPPED).pack()
        )
        even = odd + 1 & mask(32)
        pointer.write(0, _VERSION.pack(even))
        self._s.hv_clock = self._s.hv_clock._replace(version=even)
        return True
