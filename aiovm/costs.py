"""What things cost in virtual time: the timing model's only numbers, each with its source (docs/timing-model.md).

All in nanoseconds at the reference CPU, a 2 GHz x86 server core. The guest's own code is charged by the bytes that it
executes: no table of instructions, no cache, no history, so the same code costs the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from aiovm.units import whole

__all__ = ["Costs"]

#: Without these time would stand still: a fault on the way to each handler executes no code.
_POSITIVE: Final = ("code_rate", "inject_ns", "quantum_ns", "tsc_khz")


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model; every field may be overridden."""

    #: 1/256 ns a byte of code executed. 64 = 0.25 ns a byte: about 4 bytes an instruction (SPEC CPU2006 on x86-64)
    #: at one instruction a nanosecond, that is 2 GHz and 0.5 instructions a cycle.
    code_rate: int = 64
    #: A PAUSE: 140 cycles (Intel Optimization Reference Manual, Skylake and later).
    pause_ns: int = 70
    #: An exit answered in the host, round trip: about 1,200 cycles, the order of kvm-unit-tests' vmexit/cpuid.
    exit_ns: int = 600
    #: RDTSC and RDTSCP, which KVM does not intercept: 25 cycles (A. Fog, Instruction tables, Skylake).
    rdtsc_ns: int = 12
    #: From one CPU's ICR write to the other CPU's interrupt: the order of a native IPI, ours.
    ipi_ns: int = 500
    #: A thread switch on a physical CPU, kernel entry to first instruction: the order of lmbench's lat_ctx.
    context_switch_ns: int = 1_500
    #: An attempt to yield to another CPU's thread: two run queues' locks and the task's, each a cache line owned by
    #: another CPU, at the order of 100 ns a transfer (Molka et al., PACT 2009). Ours, from that count.
    yield_ns: int = 500
    #: Delivering an interrupt or exception: microcode and stack frame, ours.
    inject_ns: int = 100
    #: By how much CPUs of one machine may run apart: the interleaving quantum. Ours; see the timing model's page.
    quantum_ns: int = 2_000
    #: The guest's TSC: 2 GHz.
    tsc_khz: int = 2_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            whole(field.name, getattr(self, field.name), 1 if field.name in _POSITIVE else 0)

    def on_the_wall(self) -> Costs:
        """What bounds a slice where time passes by itself: an answer counts for somewhat more than it takes the host,
        as many answers must not make a slice long (docs/design.md). On its way nothing takes extra time."""
        return replace(self, exit_ns=2_000, inject_ns=40_000, ipi_ns=0)
