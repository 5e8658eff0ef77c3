"""Gang scheduling: a machine's vCPUs run at the same time or not at all (Ousterhout's matrix, ICDCS 1982).

A row of the matrix is one slot of time, a column a physical CPU. Machines are placed in order of their creation into
the first row with room; one with more vCPUs than there are CPUs takes several rows. The rows take turns. A row in
which nobody wants to run is skipped.

*Strict*: a CPU whose column is empty or asleep in this row idles. *Relaxed*: it runs whoever else waits for it, until
somebody of the row wants it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.policy.base import Policy, Requeue
from aiovm.policy.thread import ThreadState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.policy.base import PolicyHost
    from aiovm.policy.thread import Pcpu, Thread

__all__ = ["Gang", "RelaxedGang"]


class Gang(Policy):
    """Strict gang scheduling; ``slice_ns`` is the slot."""

    name = "gang"
    conserving = False
    #: Whether empty columns are filled with others.
    fills = False

    def __init__(self, *, slice_ns: int = 6_000_000, jitter: int = 100) -> None:
        super().__init__(slice_ns=slice_ns, jitter=jitter)
        self._host: PolicyHost
        self._threads: list[Thread] = []
        self._rows: list[list[Thread | None]] = []
        self._place: dict[int, tuple[int, int]] = {}
        #: Of machines that have no place yet.
        self._new: list[Thread] = []
        self._active = 0
        self._slot_end = 0
        self._armed = False

    def start(self, host: PolicyHost) -> None:
        self._host = host

    def added(self, thread: Thread) -> None:
        self._threads.append(thread)
        self._new.append(thread)

    def gone(self, thread: Thread) -> None:
        self._lay_out()
        self._threads.remove(thread)
        row, column = self._place.pop(thread.number)
        self._rows[row][column] = None  # somebody new may have it; nobody moves

    def save(self) -> dict[str, list[int]]:
        return {"slot": [self._active, self._slot_end, int(self._armed)]}

    def restore(self, state: dict[str, list[int]], threads: Sequence[Thread]) -> None:
        self._active, self._slot_end, armed = state["slot"]
        self._lay_out()
        if armed and not self._armed:
            self._host.call_at(self._slot_end, self._slot_over)
        self._armed = bool(armed)

    # ---- the matrix --------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        width = len(self.pcpus)
        groups: dict[int, list[Thread]] = {}
        for thread in self._new:
            groups.setdefault(thread.group, []).append(thread)
        self._new = []
        for members in groups.values():
            for first in range(0, len(members), width):
                self._place_gang(members[first : first + width], width)

    def _place_gang(self, gang: list[Thread], width: int) -> None:
        for row in self._rows:
            if row.count(None) >= len(gang):
                break
        else:
            row = [None] * width
            self._rows.append(row)
        number = self._rows.index(row)
        columns = (i for i, thread in enumerate(row) if thread is None)
        for thread, column in zip(gang, list(columns), strict=False):
            row[column] = thread
            self._place[thread.number] = number, column

    def _row_of(self, thread: Thread) -> int:
        if self._new:
            self._lay_out()
        return self._place[thread.number][0]

    def _alive(self, row: int) -> bool:
        return any(t is not None and t.state is not ThreadState.BLOCKED for t in self._rows[row])

    # ---- questions ---------------------------------------------------------------------------------------------

    def select_pcpu(self, thread: Thread, now: int) -> Pcpu:
        self._row_of(thread)
        return self.pcpus[self._place[thread.number][1]]

    def slice_of(self, thread: Thread, pcpu: Pcpu) -> int:
        return self.slice_ns

    def may_preempt(self, current: Thread, now: int) -> int:
        """The slot's end preempts, not the slice's; fillers take turns."""
        return max(self._slot_end - now, 1) if self._row_of(current) == self._active else 0

    def wakeup_preempts(self, thread: Thread, current: Thread, now: int) -> bool:
        return self._row_of(thread) == self._active != self._row_of(current)

    def pick(self, pcpu: Pcpu, now: int) -> Thread | None:
        if self._rows and not self._alive(self._active):
            self._rotate(now, pcpu)
        for at, thread in enumerate(pcpu.queue):
            if self._row_of(thread) == self._active:
                return pcpu.queue.pop(at)
        return pcpu.queue.pop(0) if self.fills and pcpu.queue else None

    # ---- news --------------------------------------------------------------------------------------------------

    def enqueue(self, thread: Thread, pcpu: Pcpu, why: Requeue, now: int) -> None:
        super().enqueue(thread, pcpu, why, now)
        if not self._armed and self._row_of(thread) != self._active:
            self._arm(now)

    def _arm(self, now: int) -> None:
        self._armed = True
        self._slot_end = now + super().slice_of(self._threads[0], self.pcpus[0])
        self._host.call_at(self._slot_end, self._slot_over)

    def _slot_over(self) -> None:
        self._armed = False
        self._rotate(self._slot_end)

    def _rotate(self, now: int, asking: Pcpu | None = None) -> None:
        """The next row's turn; the slot's clock runs while another row waits. ``asking`` is being filled anyway."""
        count = len(self._rows)
        waiting = [r for r in ((self._active + step) % count for step in range(1, count + 1)) if self._alive(r)]
        if not waiting:
            return
        if waiting[0] != self._active:
            self._active = waiting[0]
            for pcpu in self.pcpus:
                if pcpu is not asking and (pcpu.current is None or self._row_of(pcpu.current) != self._active):
                    self._host.reschedule(pcpu)
        if len(waiting) > 1 and not self._armed:
            self._arm(now)


class RelaxedGang(Gang):
    """Gang scheduling that lends idle CPUs to other machines."""

    name = "relaxed-gang"
    fills = True
