"""Locks of model guests whose waiters halt, with the state machines of the lock guests (guests/pvlocks.c).

PV ticket: Linux 4.4 (``arch/x86/kernel/kvm.c``). PV queued: ``kernel/locking/qspinlock_paravirt.h`` of 6.16, with lock
stealing and, where ``wait_early``, a look each 256 turns at whether the predecessor runs. The look at
``vcpu_is_preempted`` is the caller's function, as the record lies in the paravirtual steal time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aiovm.engine.model.cell import Cell
from aiovm.engine.model.locks import Lock, Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.model.context import ModelContext, Program

__all__ = ["PvQueued", "PvTicket"]

#: SPIN_THRESHOLD, turns before a waiter halts (``arch/x86/include/asm/spinlock.h``).
SPIN_THRESHOLD = 1 << 15

#: The predecessor is looked at each so many turns (PV_PREV_CHECK_MASK).
_PREVIOUS_CHECK = 256

_RUNNING, _HALTED, _HASHED = range(3)
_FREE, _LOCKED, _SLOW = 0, 1, 3


class PvTicket(Lock):
    """A ticket lock whose waiters halt after ``spin`` turns and are kicked by the owner before them."""

    name = "pvticket"

    def __init__(self, spin: int = SPIN_THRESHOLD, line_ns: int = 0) -> None:
        self.spin = spin
        self.head = Cell(0, line_ns)
        self.next = 0
        #: The CPU that halts for a ticket.
        self._waiting: dict[int, int] = {}

    def lock(self, cpu: ModelContext) -> Program:
        mine = self.next
        self.next = mine + 1
        while self.head.value != mine:
            if (yield cpu.spin(self.head, mine, self.spin)):
                return
            self._waiting[mine] = cpu.index
            yield cpu.halt()
            self._waiting.pop(mine, None)

    def unlock(self, cpu: ModelContext) -> Program:
        head = self.head.value + 1
        self.head.store(head)
        cpu.lock_state = 0
        sleeper = self._waiting.get(head)
        if sleeper is not None:
            yield cpu.kick(sleeper)


class PvQueued(Lock):
    """Linux's paravirtual qspinlock. ``preempted(cpu)``: ``vcpu_is_preempted``, or None where the guest lacks it."""

    name = "pvqspinlock"

    def __init__(
        self,
        spin: int = SPIN_THRESHOLD,
        *,
        steal: bool = True,
        wait_early: bool = True,
        preempted: Callable[[int], bool] | None = None,
    ) -> None:
        self.spin = spin
        self.steal = steal
        self.wait_early = wait_early
        self.preempted = preempted
        self.locked = Cell()
        #: The head of the queue claims the lock: nobody may steal.
        self.pending = False
        #: 1 as long as a stealer has nothing to do but wait: the lock is held, a queue exists, its head claims nothing.
        self.gate = Cell()
        self.queue: deque[Node] = deque()
        #: Whom the unlocker of a SLOW lock kicks.
        self._hashed: Node | None = None

    def lock(self, cpu: ModelContext) -> Program:
        if not self.locked.value and not self.queue:
            self._set(_LOCKED)
            return
        if self.steal:
            while self.gate.value:
                yield cpu.spin(self.gate, 0)
            if not self.locked.value and not self.pending:
                self._set(_LOCKED)
                return
        node = Node(cpu.index)
        before = self.queue[-1] if self.queue else None
        self.queue.append(node)
        self._move_gate()
        if before is not None:
            yield from self._wait_node(cpu, node, before)
        yield from self._wait_head(cpu, node)
        self.queue.popleft()
        self._move_gate()
        if self.queue:
            self._hand_on(self.queue[0])

    def _set(self, value: int) -> None:
        self.locked.store(value)
        self._move_gate()

    def _claim(self, pending: bool) -> None:
        self.pending = pending
        self._move_gate()

    def _move_gate(self) -> None:
        gate = int(self.locked.value != _FREE and not self.pending and bool(self.queue))
        if gate != self.gate.value:
            self.gate.store(gate)

    def _wait_node(self, cpu: ModelContext, node: Node, before: Node) -> Program:
        """Until the predecessor makes this node the head."""
        while not node.locked.value:
            turns = self.spin
            while turns > 0:
                chunk = min(turns, _PREVIOUS_CHECK) if self.wait_early else turns
                if (yield cpu.spin(node.locked, 1, chunk)):
                    return
                turns -= chunk
                if self.wait_early and self._is_off(before):
                    break
            node.state = _HALTED
            yield cpu.halt()
            if node.state == _HALTED:
                node.state = _RUNNING

    def _is_off(self, before: Node) -> bool:
        return before.state != _RUNNING or (self.preempted is not None and self.preempted(before.cpu))

    def _wait_head(self, cpu: ModelContext, node: Node) -> Program:
        """Until the head of the queue has the lock."""
        while True:
            node.state = _RUNNING
            self._claim(True)
            if self.locked.value:
                yield cpu.spin(self.locked, _FREE, self.spin)
            if not self.locked.value:
                self._set(_LOCKED)
                self._claim(False)
                return
            self._claim(False)
            self._hashed = node
            self._set(_SLOW)
            node.state = _HASHED
            yield cpu.halt()

    def _hand_on(self, node: Node) -> None:
        """The head has the lock: the next node becomes the head, and one that sleeps is left to the unlocker."""
        node.locked.store(1)
        if node.state == _HALTED:
            node.state = _HASHED
            self._hashed = node
            self._set(_SLOW)

    def unlock(self, cpu: ModelContext) -> Program:
        if self.locked.value == _LOCKED:
            self._set(_FREE)
            return
        node, self._hashed = self._hashed, None
        self._set(_FREE)
        cpu.lock_state = 0
        if node is not None:
            yield cpu.kick(node.cpu)
