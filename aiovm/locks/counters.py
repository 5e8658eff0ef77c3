"""The vCPUs' counters that tell how a lock got on with the host, added up over a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.vcpu import Vcpu

__all__ = ["read_counters"]


def read_counters(vcpus: Sequence[Vcpu]) -> dict[str, int]:
    """PLE exits, directed yields tried and won, PV kicks, halts: since the machine began."""
    stats = [v.stat for v in vcpus]
    return {
        "ple_exits": sum(s.pause_exits for s in stats),
        "yields_tried": sum(s.directed_yield_attempted for s in stats),
        "yields_won": sum(s.directed_yield_successful for s in stats),
        "kicks": sum(s.kicks for s in stats),
        "halts": sum(s.halt_exits for s in stats),
    }
