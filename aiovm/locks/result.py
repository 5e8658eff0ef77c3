"""What a lock comparison found, as values that go to a table, a picture or a file.

The JSON names and their order are those of the fields, and part of the command's interface: a field is never
renamed. The same inputs and seed give the same bytes.
"""

from __future__ import annotations

import msgspec

from aiovm.results import to_json

__all__ = ["LockReport", "LockRow"]


class LockRow(msgspec.Struct, frozen=True, kw_only=True):
    """One lock on one number of vCPUs and physical CPUs."""

    #: The lock's name, as ``--locks`` takes it.
    lock: str
    vcpus: int
    pcpus: int
    #: Critical sections a second, all vCPUs together.
    throughput_ops_per_s: float
    #: Throughput per physical CPU, relative to the same guest with a physical CPU for each vCPU.
    efficiency: float
    #: The part of the physical CPUs' time that went by in waiting for the lock, 0 to 1.
    spin_share: float
    wait_p50_ns: int
    wait_p99_ns: int
    wait_max_ns: int
    #: Jain's index over the vCPUs' critical sections.
    fairness: float
    #: Times a vCPU was preempted while it held the lock.
    lhp: int
    #: Times a vCPU was preempted while it waited for the lock.
    lwp: int
    ple_exits: int
    #: Directed yields tried, and those that had a candidate and reached it.
    yields_tried: int
    yields_won: int
    #: Halted vCPUs kicked by a hypercall.
    kicks: int
    halts: int


class LockReport(msgspec.Struct, frozen=True, kw_only=True):
    """All rows of one command, and the hash of everything that happened in it."""

    rows: list[LockRow]
    trace_hash: str

    def to_json(self) -> bytes:
        """The report as JSON, two spaces an indent, with a newline at the end."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> LockReport:
        """The report that :meth:`to_json` wrote; :class:`msgspec.ValidationError` for anything else."""
        return msgspec.json.decode(data, type=cls)
