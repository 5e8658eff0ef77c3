"""Balance scheduling: sibling vCPUs never queue for the same physical CPU (Sukwong and Kim, EuroSys 2011).

Where two vCPUs of a machine share a run queue, one of them may hold what the other waits for, and they can never run
side by side. This policy is the fair one with another answer to "where does a waking thread go": the least loaded CPU
that has none of its siblings; when every CPU has one, the least loaded of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.policy.fair import Fair

if TYPE_CHECKING:
    from aiovm.policy.thread import Pcpu, Thread

__all__ = ["Balance"]


class Balance(Fair):
    """The fair policy, with siblings kept apart."""

    name = "balance"

    def select_pcpu(self, thread: Thread, now: int) -> Pcpu:
        def rank(pcpu: Pcpu) -> tuple[bool, int, bool, int]:
            siblings = any(t.group == thread.group for t in (pcpu.current, *pcpu.queue) if t is not None)
            return siblings, pcpu.load, pcpu.index != thread.pcpu_index, pcpu.index

        return min(self.pcpus, key=rank)
