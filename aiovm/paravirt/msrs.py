"""KVM's MSRs of one vCPU, and the mechanisms behind them in one place.

A store answers with a value: None means #GP, a :class:`PvEffect` says what the vCPU owes. Requests must be served
before the guest's next instruction: the guest reads its clock record right after it has registered it.

Source: ``arch/x86/kvm/x86.c`` (``kvm_set_msr_common``) of Linux 6.16.
An MSR whose feature the guest's CPUID lacks faults only while features are enforced.

Modelled: 0x11, 0x12, 0x4B564D00 to 0x4B564D07. Not modelled: MIGRATION_CONTROL (..08), which only an embedding program
could answer; it faults.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aiovm.paravirt.async_pf import AsyncPf, AsyncPfState
from aiovm.paravirt.cpuid import KvmFeature
from aiovm.paravirt.eoi import PvEoi, PvEoiState
from aiovm.paravirt.steal import StealTime, StealTimeState
from aiovm.pvclock import PvClock, PvClockState
from aiovm.requests import Request

if TYPE_CHECKING:
    from aiovm.kvmclock import KvmClock
    from aiovm.memory import GuestMemory

__all__ = ["Paravirt", "ParavirtState", "PvEffect", "PvMsr"]

_ENABLED = 1


class PvMsr(enum.IntEnum):
    """``MSR_KVM_*``."""

    WALL_CLOCK = 0x11
    SYSTEM_TIME = 0x12
    WALL_CLOCK_NEW = 0x4B56_4D00
    SYSTEM_TIME_NEW = 0x4B56_4D01
    ASYNC_PF_EN = 0x4B56_4D02
    STEAL_TIME = 0x4B56_4D03
    PV_EOI_EN = 0x4B56_4D04
    POLL_CONTROL = 0x4B56_4D05
    ASYNC_PF_INT = 0x4B56_4D06
    ASYNC_PF_ACK = 0x4B56_4D07


_NEEDS: dict[int, KvmFeature] = {
    PvMsr.WALL_CLOCK: KvmFeature.CLOCKSOURCE,
    PvMsr.SYSTEM_TIME: KvmFeature.CLOCKSOURCE,
    PvMsr.WALL_CLOCK_NEW: KvmFeature.CLOCKSOURCE2,
    PvMsr.SYSTEM_TIME_NEW: KvmFeature.CLOCKSOURCE2,
    PvMsr.ASYNC_PF_EN: KvmFeature.ASYNC_PF,
    PvMsr.STEAL_TIME: KvmFeature.STEAL_TIME,
    PvMsr.PV_EOI_EN: KvmFeature.PV_EOI,
    PvMsr.POLL_CONTROL: KvmFeature.POLL_CONTROL,
    PvMsr.ASYNC_PF_INT: KvmFeature.ASYNC_PF_INT,
    PvMsr.ASYNC_PF_ACK: KvmFeature.ASYNC_PF_INT,
}


class PvEffect(NamedTuple):
    """What a store owes: requests to make, and an address at which to write the wall clock record (or None)."""

    requests: tuple[Request, ...] = ()
    wall_clock: int | None = None


_NOTHING = PvEffect()
_STEAL = PvEffect((Request.STEAL_UPDATE,))
_APF = PvEffect((Request.APF_READY,))
_CLOCK = PvEffect((Request.GLOBAL_CLOCK_UPDATE,))
_MASTERCLOCK = PvEffect((Request.MASTERCLOCK_UPDATE, Request.GLOBAL_CLOCK_UPDATE))


@dataclass(slots=True)
class ParavirtState:
    """The states of the mechanisms; ``poll_control`` is the MSR."""

    clock: PvClockState = field(default_factory=PvClockState)
    steal: StealTimeState = field(default_factory=StealTimeState)
    eoi: PvEoiState = field(default_factory=PvEoiState)
    apf: AsyncPfState = field(default_factory=AsyncPfState)
    poll_control: int = 1


class Paravirt:
    """One vCPU's paravirtual side: ``clock``, ``steal``, ``eoi``, ``apf``.

    ``enforced``: the features in the guest's CPUID, if only they may be used (KVM_CAP_ENFORCE_PV_FEATURE_CPUID).
    """

    __slots__ = ("_enforced", "_kvmclock", "_vcpu_id", "apf", "clock", "eoi", "poll_control", "steal")

    def __init__(
        self, memory: GuestMemory, kvmclock: KvmClock, *, vcpu_id: int, enforced: KvmFeature | None = None
    ) -> None:
        self._kvmclock = kvmclock
        self._vcpu_id = vcpu_id
        self._enforced = enforced
        self.clock = PvClock(memory)
        self.steal = StealTime(memory)
        self.eoi = PvEoi(memory)
        self.apf = AsyncPf(memory, vcpu_id)
        self.poll_control = 1

    @property
    def halt_poll_allowed(self) -> bool:
        """Whether the guest lets the host poll before it sleeps; without, the window is not adapted either."""
        return bool(self.poll_control & 1)

    def read_msr(self, index: int) -> int | None:
        """RDMSR; None is #GP."""
        if not self._has(index):
            return None
        match index:
            case PvMsr.WALL_CLOCK | PvMsr.WALL_CLOCK_NEW:
                return self._kvmclock.wall_clock
            case PvMsr.SYSTEM_TIME | PvMsr.SYSTEM_TIME_NEW:
                return self.clock.read_msr()
            case PvMsr.ASYNC_PF_EN:
                return self.apf.read_en()
            case PvMsr.STEAL_TIME:
                return self.steal.read_msr()
            case PvMsr.PV_EOI_EN:
                return self.eoi.read_msr()
            case PvMsr.POLL_CONTROL:
                return self.poll_control
            case PvMsr.ASYNC_PF_INT:
                return self.apf.read_int()
            case _:  # ASYNC_PF_ACK
                return 0

    def write_msr(self, index: int, value: int, *, host_initiated: bool = False) -> PvEffect | None:
        """WRMSR; None is #GP."""
        if not self._has(index):
            return None
        match index:
            case PvMsr.WALL_CLOCK | PvMsr.WALL_CLOCK_NEW:
                return PvEffect(wall_clock=value)
            case PvMsr.SYSTEM_TIME | PvMsr.SYSTEM_TIME_NEW:
                self.clock.write_msr(value)
                decides = self._vcpu_id == 0 and not host_initiated
                changed = decides and self._kvmclock.register(old_msr=index == PvMsr.SYSTEM_TIME)
                return _MASTERCLOCK if changed else _CLOCK
            case PvMsr.ASYNC_PF_EN:
                if not self.apf.write_en(value):
                    return None
                return _APF if self.apf.completions else _NOTHING
            case PvMsr.STEAL_TIME:
                if not self.steal.write_msr(value):
                    return None
                return _STEAL if value & _ENABLED else _NOTHING
            case PvMsr.PV_EOI_EN:
                return _NOTHING if self.eoi.write_msr(value) else None
            case PvMsr.POLL_CONTROL:
                if value >> 1:
                    return None
                self.poll_control = value
            case PvMsr.ASYNC_PF_INT:
                return _NOTHING if self.apf.write_int(value) else None
            case _:  # ASYNC_PF_ACK
                self.apf.write_ack(value)
                return _APF if value & 1 else _NOTHING
        return _NOTHING

    def _has(self, index: int) -> bool:
        needs = _NEEDS.get(index)
        return needs is not None and (self._enforced is None or needs in self._enforced)

    def save(self) -> ParavirtState:
        """A copy of the state."""
        return ParavirtState(self.clock.save(), self.steal.save(), self.eoi.save(), self.apf.save(), self.poll_control)

    def restore(self, state: ParavirtState) -> None:
        """Take over a saved state; CLOCK_UPDATE and STEAL_UPDATE are due afterwards."""
        self.clock.restore(state.clock)
        self.steal.restore(state.steal)
        self.eoi.restore(state.eoi)
        self.apf.restore(state.apf)
        self.poll_control = state.poll_control

    def reset(self) -> None:
        """RESET and INIT alike turn everything off; poll control stays as it is."""
        self.clock.reset()
        self.steal.reset()
        self.eoi.reset()
        self.apf.reset()
