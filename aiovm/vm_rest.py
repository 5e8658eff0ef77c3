"""A machine at rest: paused with nobody in the guest and nothing on its way, so that it can be saved, and its waking.

Rules:

* A pause takes each vCPU out of ``run()`` as a signal takes KVM's out of KVM_RUN; each then waits in its task. What is
  on its way between CPUs and chips (:meth:`VmRest.post`) arrives before the pause is complete.
* At rest, what would be on its way arrives at once: there is nobody who could see a difference.
* Waking has one order, which a restored machine follows as well: every timer is armed anew, then the vCPUs go on by
  number. Guests with a paravirtual clock are told that they were stopped (KVM_KVMCLOCK_CTRL).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiovm.errors import StateError
from aiovm.vm_life import LifeEvent, LifeState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.clock import Timer
    from aiovm.pc import Pc
    from aiovm.vcpu import Vcpu

__all__ = ["VmRest"]


class VmRest:
    """What :class:`aiovm.vm.Vm` inherits."""

    life: LifeState
    pc: Pc
    vcpus: Sequence[Vcpu]

    if TYPE_CHECKING:

        def _move(self, event: LifeEvent) -> None: ...
        def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer: ...
        async def between_slices(self) -> None: ...

    def _init_rest(self) -> None:
        #: What is on its way between CPUs and chips; and who waits, paused.
        self._in_flight: set[object] = set()
        self._parked: dict[int, asyncio.Future[None]] = {}
        self._settled = asyncio.Event()
        self._at_rest = False

    def _no_rest(self) -> None:
        """The machine has ended."""
        self._at_rest = False
        self._settled.set()

    async def pause(self) -> None:
        """Every vCPU leaves ``run()``, as by a signal, and what is on its way arrives; :meth:`resume` goes on.

        Time goes on meanwhile, and the chips with it. :class:`StateError` when the guest ends first.
        """
        self._move(LifeEvent.PAUSE)
        await self.between_slices()
        for vcpu in self.vcpus:
            vcpu.immediate_exit = True
            vcpu.kick()
        while self._in_flight or len(self._parked) < len(self.vcpus):
            if self.life is not LifeState.PAUSED:
                raise StateError(f"the machine is {self.life.value} before it was paused")
            self._settled.clear()
            await self._settled.wait()
        self._at_rest = True

    async def _park(self, vcpu: Vcpu) -> None:
        resumed = self._parked[vcpu.index] = asyncio.get_running_loop().create_future()
        self._settled.set()
        await resumed

    def resume(self) -> None:
        """Go on after :meth:`pause`. A guest with a paravirtual clock is told that it was stopped."""
        self._move(LifeEvent.RESUME)
        self._wake_up()
        for index in sorted(self._parked):
            self._parked[index].set_result(None)
        self._parked.clear()

    def _wake_up(self) -> None:
        """Leave the rest, in the one order that a restored machine knows: every timer anew, no vCPU interrupted."""
        self._at_rest = False
        for vcpu in self.vcpus:
            vcpu.immediate_exit = False
            vcpu.disarm_timer()
            vcpu.arm_timer()
            if vcpu.pv.clock.enabled:
                vcpu.kvmclock_ctrl()
        self.pc.rearm_all()

    def check_at_rest(self) -> None:
        """Whether the machine can be saved: it is loaded and not started, or paused; :class:`StateError` if not."""
        if self._at_rest:
            return
        if self.life is not LifeState.LOADED:
            raise StateError(f"a machine that is {self.life.value} cannot be saved: await vm.pause() first")
        if self._in_flight:
            raise StateError("an interrupt is on its way: let time pass before the machine is saved")

    def post(self, deadline: int, callback: Callable[[], object]) -> None:
        if self._at_rest:  # nobody runs who could see a difference, and nothing must be on its way
            callback()
            return
        what = object()
        self._in_flight.add(what)  # a set, for a slice's thread adds while the loop takes away
        self.call_at(deadline, partial(self._land, what, callback))

    def _land(self, what: object, callback: Callable[[], object]) -> None:
        self._in_flight.discard(what)
        callback()
        if not self._in_flight:
            self._settled.set()
