"""Stopping a machine and letting it go on: what a debugger does, without its protocol.

Rules:

* All or nothing: when one vCPU stops, all do, and virtual time stands still until somebody resumes. On the wall clock
  the guest sees that time has passed.
* A vCPU is stopped when its ``run`` has returned and its task waits here: its registers are whole and nobody's slice
  runs. It is made to return by a signal (:meth:`~aiovm.vcpu.Vcpu.send_signal`), asleep or not.
* Breakpoints in code are INT3 instructions in guest memory (KVM_GUESTDBG_USE_SW_BP), as many as wanted, at full speed;
  reads through :meth:`DebugSession.read` show what was there before. Hardware ones and watchpoints are the four debug
  registers (KVM_GUESTDBG_USE_HW_BP), which the guest's own do not notice; they make the engine go step by step.
* An INT3 that is the guest's own is delivered to the guest.
* A step takes no interrupt (KVM_GUESTDBG_BLOCKIRQ), so that it ends at the next instruction of the same code.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.clock import VirtualClock
from aiovm.errors import ConfigError, StateError
from aiovm.exits import Debug, Interrupted
from aiovm.guest_debug import DebugControl
from aiovm.memory import PAGE, NoMemory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiovm.vcpu import Vcpu
    from aiovm.vm import Vm

__all__ = ["Action", "DebugSession", "Stop", "Watch"]

#: The signal number that stops a vCPU; SIGTRAP's.
_TRAP: Final = 5
_INT3: Final = b"\xcc"
_BP: Final = 3
_LENGTH_CODES: Final = {1: 0, 2: 1, 4: 3, 8: 2}
_SLOTS: Final = 4
_STEP: Final = DebugControl.SINGLESTEP | DebugControl.BLOCKIRQ


class Watch(enum.IntEnum):
    """DR7's types of breakpoint."""

    EXECUTE = 0
    WRITE = 1
    ACCESS = 3


class Action(enum.Enum):
    """What a vCPU does next."""

    CONTINUE = "continue"
    STEP = "step"


class Stop(NamedTuple):
    """Why the machine stopped: which vCPU, why, and the watchpoint that was hit, if any."""

    vcpu: int
    reason: str = "signal"
    address: int = 0
    kind: Watch = Watch.EXECUTE


class _Slot(NamedTuple):
    """One of the four debug registers."""

    kind: Watch
    address: int
    length: int


def _slot(kind: Watch, gva: int, length: int) -> _Slot:
    return _Slot(kind, gva, 1 if kind is Watch.EXECUTE else length)


class DebugSession:
    """A debugger on ``vm``; one at a time. Make it before :meth:`aiovm.vm.Vm.run`, and the machine stops at once."""

    def __init__(self, vm: Vm) -> None:
        if vm.debugger is not None:
            raise StateError("this machine has a debugger already")
        self.vm = vm
        vm.debugger = self
        #: Original bytes by guest physical address.
        self._patched: dict[int, bytes] = {}
        #: Where each breakpoint was put, by linear address: page tables may say something else when it is removed.
        self._points: dict[int, int] = {}
        self._slots: list[_Slot | None] = [None] * _SLOTS
        self._parked: set[int] = set()
        self._may_go = [asyncio.Event() for _ in vm.vcpus]
        self._actions = [Action.CONTINUE for _ in vm.vcpus]
        #: Those that step over an INT3 of the guest's own.
        self._passing: set[int] = set()
        self._all_parked = asyncio.Event()
        self._cause: Stop | None = None
        self.stop()

    # ---- stopping --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Have every vCPU come out; :meth:`wait_stopped` returns when they have."""
        for index, vcpu in enumerate(self.vm.vcpus):
            self._may_go[index].clear()
            vcpu.send_signal(_TRAP)

    async def wait_stopped(self) -> Stop:
        """Wait until every vCPU has stopped, and say why."""
        await self._all_parked.wait()
        cause, self._cause = self._cause, None
        return Stop(0) if cause is None else cause

    @property
    def stopped(self) -> bool:
        """Whether every vCPU stands still."""
        return self._all_parked.is_set()

    async def on_exit(self, vcpu: Vcpu, exit_: Debug | Interrupted) -> None:
        """The machine calls this from a vCPU's task when its ``run`` has returned; returns when it may go on."""
        index = vcpu.index
        if isinstance(exit_, Debug):
            if not self._is_ours(vcpu, exit_):
                return
            if self._cause is None:
                self._cause = self._why(index, exit_)
            self.stop()
        self._parked.add(index)
        if len(self._parked) == len(self.vm.vcpus):
            self._hold(True)
            self._all_parked.set()
        await self._may_go[index].wait()
        self._parked.discard(index)

    def _is_ours(self, vcpu: Vcpu, exit_: Debug) -> bool:
        """Whether an exit is for the debugger. A step that nobody hears of executes an INT3 of the guest's own."""
        index = vcpu.index
        if index in self._passing:
            self._passing.discard(index)
            self._apply(vcpu)
            return self._actions[index] is Action.STEP
        if exit_.vector == _BP:
            gpa = self._translate(vcpu, exit_.pc)
            if gpa not in self._patched:
                self._passing.add(index)
                vcpu.set_guest_debug(DebugControl.ENABLE | _STEP)
                return False
        return True

    def _why(self, index: int, exit_: Debug) -> Stop:
        if exit_.vector == _BP:
            return Stop(index, "swbreak")
        for number, slot in enumerate(self._slots):
            if slot is not None and exit_.dr6 >> number & 1:
                return Stop(index, "hwbreak" if slot.kind is Watch.EXECUTE else "watch", slot.address, slot.kind)
        return Stop(index, "step")

    def _hold(self, wanted: bool) -> None:
        """Virtual time stands still, or goes on."""
        clock = self.vm.clock
        if isinstance(clock, VirtualClock):
            clock.held = wanted

    # ---- going on --------------------------------------------------------------------------------------------------

    def resume(self, actions: Mapping[int, Action] | None = None) -> None:
        """Let vCPUs go on: those that ``actions`` names by index, each as it says, or all."""
        if not self.stopped:
            raise StateError("the machine is running")
        wanted = dict.fromkeys(range(len(self.vm.vcpus)), Action.CONTINUE) if actions is None else actions
        self._all_parked.clear()
        self._hold(False)
        for index, action in wanted.items():
            vcpu = self.vm.vcpus[index]
            self._actions[index] = action
            vcpu.take_signals()
            self._apply(vcpu)
        for index in wanted:
            self._may_go[index].set()

    def _apply(self, vcpu: Vcpu) -> None:
        """KVM_SET_GUEST_DEBUG for what is set now."""
        control = DebugControl.NONE
        if self._patched:
            control |= DebugControl.USE_SW_BP
        if any(self._slots):
            control |= DebugControl.USE_HW_BP
        if self._actions[vcpu.index] is Action.STEP:
            control |= _STEP
        vcpu.set_guest_debug(control and control | DebugControl.ENABLE, self._debug_registers())

    def _debug_registers(self) -> list[int]:
        registers = [0] * 8
        for number, slot in enumerate(self._slots):
            if slot is not None:
                registers[number] = slot.address
                registers[7] |= 2 << 2 * number | (slot.kind | _LENGTH_CODES[slot.length] << 2) << 16 + 4 * number
        return registers

    def detach(self) -> None:
        """Take every breakpoint away and let the machine run on by itself."""
        for gpa in list(self._patched):
            self._restore(gpa)
        self._points.clear()
        self._slots = [None] * _SLOTS
        self.vm.debugger = None
        self._hold(False)
        for index, vcpu in enumerate(self.vm.vcpus):
            vcpu.take_signals()
            if index in self._parked:
                vcpu.set_guest_debug(DebugControl.NONE)
            self._may_go[index].set()

    # ---- memory and breakpoints ----------------------------------------------------------------------------------

    def _translate(self, vcpu: Vcpu, gva: int) -> int | None:
        return vcpu.arch.walk_mmu.translate_debug(gva)

    def _pieces(self, vcpu: Vcpu, gva: int, length: int) -> Iterable[tuple[int | None, int]]:
        while length > 0:
            near = min(length, PAGE - gva % PAGE)
            yield self._translate(vcpu, gva), near
            gva += near
            length -= near

    def read(self, vcpu: Vcpu, gva: int, length: int) -> bytes | None:
        """Guest memory by linear address, as far as it is there; None when nothing is."""
        out = bytearray()
        for gpa, near in self._pieces(vcpu, gva, length):
            if gpa is None:
                break
            try:
                piece = bytearray(self.vm.memory.read(gpa, near))
            except NoMemory:
                break
            for at, original in self._patched.items():
                if gpa <= at < gpa + near:
                    piece[at - gpa] = original[0]
            out += piece
        return bytes(out) if out or not length else None

    def write(self, vcpu: Vcpu, gva: int, data: bytes) -> bool:
        """Store ``data``; False, and nothing stored, where there is no memory."""
        pieces = list(self._pieces(vcpu, gva, len(data)))
        if any(gpa is None or not self.vm.memory.is_ram(gpa) for gpa, _ in pieces):
            return False
        done = 0
        for gpa, near in pieces:
            assert gpa is not None
            piece = bytearray(data[done : done + near])
            for at in [at for at in self._patched if gpa <= at < gpa + near]:
                self._patched[at] = bytes(piece[at - gpa : at - gpa + 1])
                piece[at - gpa] = _INT3[0]
            try:
                self.vm.memory.load_rom(gpa, bytes(piece))
            except ConfigError:
                return False
            done += near
        return True

    def insert_breakpoint(self, vcpu: Vcpu, gva: int) -> bool:
        """An INT3 at ``gva``; False where there is no memory."""
        gpa = self._points.get(gva, self._translate(vcpu, gva))
        if gpa is None or not self.vm.memory.is_ram(gpa):
            return False
        if gpa not in self._patched:
            self._patched[gpa] = self.vm.memory.read(gpa, 1)
            self.vm.memory.load_rom(gpa, _INT3)
        self._points[gva] = gpa
        return True

    def remove_breakpoint(self, gva: int) -> bool:
        """Whether there was one. The INT3 goes with the last linear address that means it."""
        gpa = self._points.pop(gva, None)
        if gpa is None:
            return False
        if gpa not in self._points.values():
            self._restore(gpa)
        return True

    def _restore(self, gpa: int) -> None:
        original = self._patched.pop(gpa)
        if self.vm.memory.is_ram(gpa):
            self.vm.memory.load_rom(gpa, original)

    def insert_watch(self, kind: Watch, gva: int, length: int) -> bool:
        """A debug register; False when none is free or it cannot watch that."""
        slot = _slot(kind, gva, length)
        if slot in self._slots:
            return True
        if slot.length not in _LENGTH_CODES or gva % slot.length or None not in self._slots:
            return False
        self._slots[self._slots.index(None)] = slot
        return True

    def remove_watch(self, kind: Watch, gva: int, length: int) -> bool:
        """Whether there was one."""
        slot = _slot(kind, gva, length)
        if slot not in self._slots:
            return False
        self._slots[self._slots.index(slot)] = None
        return True
