"""KVM's calls on a whole machine that get and set its state: the clock, the interrupt chips, the timer.

The counterpart of :mod:`aiovm.vcpu_state`. Values are this package's own: :class:`~aiovm.kvmclock.ClockData`, and the
chips' state classes, which hold what ``kvm_ioapic_state``, ``kvm_pic_state`` and ``kvm_pit_state2`` hold.

Rules: on the wall clock not while a slice runs. ``set_clock`` makes CLOCK_UPDATE due on every vCPU; chips that were
loaded are armed anew. Source: ``arch/x86/kvm/x86.c`` of Linux 6.16.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING

from aiovm.devices.ioapic import IoApicState
from aiovm.errors import ConfigError, StateError
from aiovm.requests import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.clock import Clock
    from aiovm.devices.pic8259 import PicState
    from aiovm.devices.pit8254 import Pit8254State
    from aiovm.kvmclock import ClockData, KvmClock
    from aiovm.pc import Pc
    from aiovm.vcpu import Vcpu

__all__ = ["IrqChip", "VmIoctls"]


class IrqChip(enum.IntEnum):
    """``KVM_IRQCHIP_*``."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


class VmIoctls:
    """What :class:`aiovm.vm.Vm` inherits."""

    clock: Clock
    kvmclock: KvmClock
    pc: Pc
    vcpus: Sequence[Vcpu]

    if TYPE_CHECKING:

        @property
        def slice_runs(self) -> bool: ...
        def wall_ns(self) -> int: ...

    def _no_slice(self, call: str) -> None:
        if self.slice_runs:
            raise StateError(f"{call}: a slice runs; await vm.between_slices() first")

    def get_clock(self) -> ClockData:
        """KVM_GET_CLOCK."""
        self._no_slice("get_clock")
        return self.kvmclock.get_clock(self.clock.now(), self.wall_ns())

    def set_clock(self, data: ClockData) -> None:
        """KVM_SET_CLOCK."""
        self._no_slice("set_clock")
        self.kvmclock.set_clock(data, self.clock.now(), self.wall_ns())
        for vcpu in self.vcpus:
            vcpu.make_request(Request.CLOCK_UPDATE)
            vcpu.kick()

    def get_irqchip(self, chip: IrqChip) -> PicState | IoApicState:
        """KVM_GET_IRQCHIP."""
        self._no_slice("get_irqchip")
        return self.pc.ioapic.save() if chip is IrqChip.IOAPIC else self.pc.pic.save().chips[chip]

    def set_irqchip(self, chip: IrqChip, state: PicState | IoApicState) -> None:
        """KVM_SET_IRQCHIP."""
        self._no_slice("set_irqchip")
        if isinstance(state, IoApicState) is not (chip is IrqChip.IOAPIC):
            raise ConfigError(f"{type(state).__name__} is no state of {chip.name}")
        if isinstance(state, IoApicState):
            self.pc.ioapic.restore(state)
            self.pc.rearm(self.pc.ioapic)
        else:
            both = self.pc.pic.save()
            master, slave = both.chips
            self.pc.pic.restore(replace(both, chips=(state, slave) if chip is IrqChip.PIC_MASTER else (master, state)))

    def get_pit2(self) -> Pit8254State:
        """KVM_GET_PIT2."""
        self._no_slice("get_pit2")
        return self.pc.pit.save()

    def set_pit2(self, state: Pit8254State) -> None:
        """KVM_SET_PIT2."""
        self._no_slice("set_pit2")
        self.pc.pit.restore(state)
        self.pc.rearm(self.pc.pit)
