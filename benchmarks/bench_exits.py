"""What an exit costs, by kind, beside QEMU TCG's cost of the same guest code, and as a multiple of a bare exit.

A bare exit is a CPUID that is answered by a constant: what the engine itself costs. It is measured anew beside each
kind, as machines are shared and their speed changes. Each figure is the difference of a run with many rounds and a run
with one, so that start-up cancels; CPU time where nobody sleeps, else time.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from benchmarks.common import aiovm_seconds, qemu_seconds, show

_ROUNDS = 200_000
_TURNS = 5
#: By then the guest is in its loop (virtual time, ns).
_IN_THE_LOOP = 5_000_000


class _Kind(NamedTuple):
    """``loop``: the bench guest's word; ``peer``: how many times the rounds QEMU does, 0: it has no such thing."""

    name: str
    loop: str
    rounds: int = _ROUNDS
    peer: int = 100
    vcpus: int = 1


_BARE = _Kind("bare exit", "cpuid")
KINDS = (
    _Kind("CPUID", "cpuid"),
    _Kind("RDMSR", "msr"),
    _Kind("WRMSR", "wrmsr"),
    _Kind("OUT", "port"),
    _Kind("IN", "in"),
    _Kind("APIC read", "mmio"),
    _Kind("APIC write", "store"),
    _Kind("hypercall", "hypercall", peer=0),
    _Kind("RDTSC (in C)", "rdtsc"),
    _Kind("PAUSE (in C)", "pause"),
    _Kind("page fault and IRET", "fault", rounds=20_000, peer=100),
    _Kind("timer armed, slept for, ended", "timer", rounds=5_000, peer=10),
    _Kind("IPI to a running vCPU", "ipi", rounds=5_000, peer=0, vcpus=2),
    _Kind("IPI to a halted vCPU", "wake", rounds=5_000, peer=4, vcpus=2),
)


def main() -> None:
    """Measure and print."""
    rows = []
    for kind in KINDS:
        bare, ours = _ours(kind)
        peer = _peers(kind)
        theirs = ("-", "-") if peer is None else (f"{peer * 1e9:,.0f}", f"{ours / peer:.1f}")
        figures = f"{1 / ours / 1000:,.0f}k", f"{ours * 1e9:,.0f}", f"{bare * 1e9:,.0f}", f"{ours / bare:.1f}"
        rows.append([kind.name, *figures, *theirs])
    show("Exits", ("exit", "a second", "aiovm ns", "bare ns", "bare exits", "QEMU ns", "aiovm/QEMU"), rows)


def _ours(kind: _Kind) -> tuple[float, float]:
    """Seconds of a bare exit and of ``kind``, each the least of some, taken in turns: the machine's speed changes."""

    def seconds(of: _Kind, rounds: int, prepare=None) -> float:
        return aiovm_seconds(
            "bench",
            f"loop={of.loop} n={rounds}",
            vcpus=of.vcpus,
            pcpus=of.vcpus,
            ple=False,
            prepare=prepare,
            clock=time.process_time,
        )

    bare: list[float] = []
    ours: list[float] = []
    for _ in range(_TURNS):
        for found, of, prepare in ((bare, _BARE, _leave_bare), (ours, kind, None)):
            start = seconds(of, 1, prepare)
            found.append((seconds(of, of.rounds, prepare) - start) / (of.rounds - 1))
    return min(bare), min(ours)


def _peers(kind: _Kind) -> float | None:
    rounds = kind.rounds * kind.peer
    if not rounds:
        return None
    busy = kind.loop not in ("timer", "wake")
    found = [qemu_seconds(f"loop={kind.loop} n={n}", "-smp", str(kind.vcpus), cpu=busy) for n in (1, rounds)]
    return None if None in found else (found[1] - found[0]) / (rounds - 1)


def _leave_bare(vm) -> None:
    """From the loop on, CPUID exits, and that is all."""
    answer = 0, 0, 0, 0

    def swap():
        vm.vcpus[0].port.on_cpuid = lambda _leaf, _subleaf: answer

    vm.call_at(_IN_THE_LOOP, swap)


if __name__ == "__main__":
    main()
