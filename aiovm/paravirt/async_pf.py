"""Asynchronous page faults: the host is fetching a page, so the guest may run something else meanwhile.

Two messages in a 64-byte aligned area {u32 flags, u32 token}, and two ways to send them:

* *page not present*: flags = 1 and a #PF with the token in CR2. The guest puts the running task to sleep on the token.
* *page ready*: the token is stored, then the interrupt of MSR 0x4B564D06. The guest wakes the task, clears the word and
  writes 1 to MSR 0x4B564D07; until then the next one waits. Token ~0 wakes everybody.

Rules (``arch/x86/kvm/x86.c``, ``virt/kvm/async_pf.c`` of Linux 6.16):

* MSR 0x4B564D02: bit 0 enable, bit 1 also at CPL 0, bit 2 as a VM exit for a nested host, bit 3 ready by interrupt,
  bits 5:4 reserved, 63:6 the address. Enabled means bits 0 *and* 3.
* A token is a counter, shifted by 12, over the vCPU's id, and never has a counter part of 0. At most 64 are under way.
* A fault that cannot be announced (kernel mode, no paging, mechanism off), or one on a page that is already under way,
  halts the vCPU artificially (APF_HALT) until a completion or any wake-up.
* Switching off, a change of CR0.PG and a reset drop everything under way. Switching on wakes everybody.

Whether a page is there is the embedding program's affair; it calls :meth:`AsyncPf.start` when one is not and
:meth:`AsyncPf.done` when it has come.

Modelled: all of it. Not modelled: the older form, in which ready was a #PF too; a nested host's share.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from aiovm.bits import mask
from aiovm.memory import GuestPtr

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["ApfAction", "ApfAnswer", "ApfReady", "ApfWork", "AsyncPf", "AsyncPfFlag", "AsyncPfState"]

_PER_VCPU = 64
_RESERVED = 0x30
_FLAGS, _TOKEN, _LENGTH = 0, 4, 8
_NOT_PRESENT = 1
_EVERYBODY = mask(32)
_NO_GFN = -1


class AsyncPfFlag(enum.IntFlag):
    """MSR 0x4B564D02, low bits."""

    ENABLED = 1
    SEND_ALWAYS = 2
    DELIVERY_AS_PF_VMEXIT = 4
    DELIVERY_AS_INT = 8


class ApfAction(enum.Enum):
    """What becomes of a fault on a page that is not there yet."""

    #: The host must fetch the page in place.
    WAIT = 0
    #: Inject #PF with error code 0 and the token in CR2.
    INJECT = 1
    #: Make APF_HALT.
    HALT = 2


class ApfAnswer(NamedTuple):
    """``token`` is CR2 for INJECT."""

    action: ApfAction
    token: int = 0


class ApfReady(NamedTuple):
    """``vector``: a fixed interrupt to deliver, or -1. ``woke``: the vCPU is RUNNABLE and no longer halted."""

    vector: int
    woke: bool


class ApfWork(NamedTuple):
    """One page under way, or a wake-up of everybody (``gfn`` -1)."""

    gfn: int
    token: int
    notpresent_injected: bool


@dataclass(slots=True)
class AsyncPfState:
    """``queued`` are under way, ``done`` have come and are not yet reported. ``id`` is the next token's counter."""

    msr_en_val: int = 0
    msr_int_val: int = 0
    id: int = 0
    halted: bool = False
    pageready_pending: bool = False
    queued: tuple[ApfWork, ...] = ()
    done: tuple[ApfWork, ...] = ()


class AsyncPf:
    """One vCPU's asynchronous page faults."""

    __slots__ = ("_area", "_memory", "_s", "_vcpu_id")

    def __init__(self, memory: GuestMemory, vcpu_id: int) -> None:
        self._memory = memory
        self._vcpu_id = vcpu_id
        self._s = AsyncPfState()
        self._area: GuestPtr | None = None

    # ---- MSRs --------------------------------------------------------------------------------------------------

    def read_en(self) -> int:
        """MSR 0x4B564D02."""
        return self._s.msr_en_val

    def write_en(self, value: int) -> bool:
        """Whether the store is allowed; APF_READY is due when :attr:`completions` says so."""
        if value & _RESERVED:
            return False
        area = self._point(value)
        if area is None:
            self._s.msr_en_val = value
            self._area = None
            self.cancel()
            return True
        if not area.valid:
            return False
        self._s.msr_en_val = value
        self._area = area
        if not self._s.done:
            self._s.done = (ApfWork(_NO_GFN, _EVERYBODY, False),)
        return True

    def read_int(self) -> int:
        """MSR 0x4B564D06: the vector."""
        return self._s.msr_int_val

    def write_int(self, value: int) -> bool:
        """Whether the store is allowed."""
        if value >> 8:
            return False
        self._s.msr_int_val = value
        return True

    def write_ack(self, value: int) -> None:
        """MSR 0x4B564D07, which reads 0: the guest has seen the token; APF_READY is due."""
        if value & 1:
            self._s.pageready_pending = False

    # ---- faults and completions ----------------------------------------------------------------------------------

    @property
    def completions(self) -> bool:
        """Whether something waits to be reported by APF_READY."""
        return bool(self._s.done)

    def start(self, gfn: int, *, can_halt: bool, cpl: int, paging: bool) -> ApfAnswer:
        """The guest touched ``gfn``, which is not there yet.

        ``can_halt``: interrupts are allowed and no event waits to be injected again, so the vCPU may sleep.
        """
        s = self._s
        if not can_halt:
            return ApfAnswer(ApfAction.WAIT)
        if any(work.gfn == gfn for work in (*s.queued, *s.done)):
            return ApfAnswer(ApfAction.HALT)
        if len(s.queued) + len(s.done) >= _PER_VCPU:
            return ApfAnswer(ApfAction.WAIT)
        token = self._next_token()
        announce = paging and (cpl != 0 or bool(s.msr_en_val & AsyncPfFlag.SEND_ALWAYS))
        injected = announce and self._store(_FLAGS, _NOT_PRESENT)
        s.queued = (*s.queued, ApfWork(gfn, token, injected))
        return ApfAnswer(ApfAction.INJECT, token) if injected else ApfAnswer(ApfAction.HALT)

    def done(self, gfn: int) -> bool:
        """The page has come: APF_READY is due. Whether to kick as well; a dropped page's arrival is no news."""
        s = self._s
        work = next((w for w in s.queued if w.gfn == gfn), None)
        if work is None:
            return False
        s.queued = tuple(w for w in s.queued if w is not work)
        s.done = (*s.done, work)
        return not s.pageready_pending

    def check_completion(self, *, lapic_enabled: bool) -> ApfReady:
        """APF_READY: report what has come, as far as the guest can take it now."""
        s = self._s
        vector, woke = -1, False
        while s.done and self._can_dequeue(lapic_enabled):
            work, *rest = s.done
            s.done = tuple(rest)
            if (work.notpresent_injected or work.gfn == _NO_GFN) and self._store(_TOKEN, work.token):
                s.pageready_pending = True
                vector = s.msr_int_val
            s.halted = False
            woke = True
        return ApfReady(vector, woke)

    # ---- the artificial halt ---------------------------------------------------------------------------------------

    @property
    def halted(self) -> bool:
        """Whether the vCPU must not run, though its ``mp_state`` says RUNNABLE."""
        return self._s.halted

    def halt(self) -> None:
        """APF_HALT."""
        self._s.halted = True

    def wake(self) -> None:
        """Something else ended the vCPU's sleep."""
        self._s.halted = False

    # ---- life ------------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Drop everything under way: CR0.PG changed."""
        self._s.queued = ()
        self._s.done = ()

    def save(self) -> AsyncPfState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: AsyncPfState) -> None:
        """Take over a saved state."""
        self._s = replace(state)
        self._area = self._point(state.msr_en_val)

    def reset(self) -> None:
        """RESET and INIT: off. The counter goes on, so old tokens mean nothing new."""
        self.restore(AsyncPfState(id=self._s.id))

    def _point(self, value: int) -> GuestPtr | None:
        """The area, if ``value`` enables the mechanism."""
        both = AsyncPfFlag.ENABLED | AsyncPfFlag.DELIVERY_AS_INT
        return GuestPtr(self._memory, value & ~mask(6), _LENGTH) if value & both == both else None

    def _next_token(self) -> int:
        s = self._s
        if not s.id << 12 & mask(32):
            s.id = 1
        token = (s.id << 12 | self._vcpu_id) & mask(32)
        s.id = s.id + 1 & mask(32)
        return token

    def _store(self, offset: int, value: int) -> bool:
        return self._area is not None and self._area.write(offset, value.to_bytes(4, "little"))

    def _can_dequeue(self, lapic_enabled: bool) -> bool:
        if self._area is None:
            return True
        token = self._area.read(_TOKEN, 4)
        return lapic_enabled and token is not None and not any(token)
