"""Locks of model guests that only spin, with the state machines of the lock guests (guests/spinlocks.c).

A step between two yields is one atomic step, so the windows in which a real lock's two stores lie apart do not exist
here: a node's link to its predecessor is there as soon as the tail is exchanged.

Every lock has ``lock(cpu)`` and ``unlock(cpu)``, generators to be used with ``yield from``. Modelled from the guests'
sources: test-and-set, test-and-test-and-set, ticket, MCS, qspinlock (Linux 6.16). The preemptable ticket lock is
Ouyang and Lange's (VEE 2013).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aiovm.engine.model.cell import Cell

if TYPE_CHECKING:
    from aiovm.engine.model.context import ModelContext, Program

__all__ = ["Lock", "Mcs", "Node", "PreemptableTicket", "Queued", "TestAndSet", "Ticket"]


class Lock:
    """A lock of any kind."""

    name = ""

    def lock(self, cpu: ModelContext) -> Program:
        """Take it."""
        raise NotImplementedError

    def unlock(self, cpu: ModelContext) -> Program:
        """Give it back; ``cpu`` is its owner."""
        raise NotImplementedError


class TestAndSet(Lock):
    """One word; whoever sees it 0 first has it. Test-and-test-and-set differs by cache traffic only, which costs
    nothing in this timing model."""

    name = "tas"

    def __init__(self, line_ns: int = 0) -> None:
        self.word = Cell(0, line_ns)

    def lock(self, cpu: ModelContext) -> Program:
        while self.word.value:
            yield cpu.spin(self.word, 0)
        self.word.store(1)

    def unlock(self, cpu: ModelContext) -> Program:
        self.word.store(0)
        yield from ()


class Ticket(Lock):
    """First in, first out, all spinning on one word (Linux up to 4.1)."""

    name = "ticket"

    def __init__(self, line_ns: int = 0) -> None:
        self.head = Cell(0, line_ns)
        self.next = 0

    def lock(self, cpu: ModelContext) -> Program:
        mine = self.next
        self.next = mine + 1
        while self.head.value != mine:
            yield cpu.spin(self.head, mine)

    def unlock(self, cpu: ModelContext) -> Program:
        self.head.store(self.head.value + 1)
        yield from ()


class PreemptableTicket(Lock):
    """A ticket lock whose order is given up when it does not move (Ouyang and Lange, VEE 2013).

    Who is *n* places from the head waits *n* time-outs; when its ticket has come, or the time-out has passed, it may
    take the lock as soon as it is free. ``timeout_turns``: the paper's time-out unit, in turns of the spin loop.
    """

    name = "pticket"

    def __init__(self, timeout_turns: int = 32) -> None:
        self.word = Cell()
        self.head = Cell()
        self.next = 0
        self.timeout_turns = timeout_turns

    def lock(self, cpu: ModelContext) -> Program:
        mine = self.next
        self.next = mine + 1
        ahead = mine - self.head.value
        while ahead > 0:
            moved = yield cpu.spin(self.head, mine, self.timeout_turns * ahead)
            if moved:
                break
            if mine - self.head.value >= ahead:
                break  # nobody moved in all that time
            ahead = mine - self.head.value
        while self.word.value:
            yield cpu.spin(self.word, 0)
        self.word.store(1)
        if mine > self.head.value:
            self.head.store(mine)

    def unlock(self, cpu: ModelContext) -> Program:
        self.word.store(0)
        self.head.store(self.head.value + 1)
        yield from ()


class Node:
    """A waiter in a queue."""

    __slots__ = ("cpu", "locked", "next", "state")

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.next: Node | None = None
        self.locked = Cell()
        #: Of the PV queued lock: running, halted, hashed.
        self.state = 0


class Mcs(Lock):
    """A queue in which each waiter spins on its own word (Mellor-Crummey and Scott, 1991)."""

    name = "mcs"

    def __init__(self) -> None:
        self._queue: deque[Node] = deque()

    def lock(self, cpu: ModelContext) -> Program:
        node = Node(cpu.index)
        self._queue.append(node)
        if len(self._queue) > 1:
            while not node.locked.value:
                yield cpu.spin(node.locked, 1)

    def unlock(self, cpu: ModelContext) -> Program:
        self._queue.popleft()
        if self._queue:
            self._queue[0].locked.store(1)
        yield from ()


class Queued(Lock):
    """Linux's qspinlock: the owner has ``locked``, the first waiter ``pending``, the others an MCS queue."""

    name = "qspinlock"

    def __init__(self) -> None:
        self.locked = Cell()
        self.pending = Cell()
        self.queue: deque[Node] = deque()

    def lock(self, cpu: ModelContext) -> Program:
        if not (self.locked.value or self.pending.value or self.queue):
            self.locked.store(1)
            return
        if not (self.pending.value or self.queue):
            # First waiter: pending and locked change hands in one step.
            self.pending.store(1)
            while self.locked.value:
                yield cpu.spin(self.locked, 0)
            self.locked.store(1)
            self.pending.store(0)
            return
        node = Node(cpu.index)
        self.queue.append(node)
        if len(self.queue) > 1:
            while not node.locked.value:
                yield cpu.spin(node.locked, 1)
        while self.locked.value or self.pending.value:
            yield cpu.spin(self.pending if self.pending.value else self.locked, 0)
        self.locked.store(1)
        self.queue.popleft()
        if self.queue:
            self.queue[0].locked.store(1)

    def unlock(self, cpu: ModelContext) -> Program:
        self.locked.store(0)
        yield from ()
