"""Linux KVM's vCPU as a citizen of asyncio.

    from aiovm import Host, Vm, run

:class:`Host` is physical CPUs under a policy, :class:`Vm` one machine on it; :func:`run` runs a coroutine in virtual
time, :func:`run_wall` on the wall clock.
"""

from __future__ import annotations

from aiovm import guests
from aiovm.clock import VirtualClock, WallClock
from aiovm.costs import Costs
from aiovm.errors import (
    AiovmError,
    CommandFailed,
    ConfigError,
    DeadlockError,
    EngineError,
    GuestError,
    GuestPanic,
    HostError,
    InternalError,
    LivelockError,
    StallError,
    StateError,
    TimeoutExpired,
    TripleFault,
    UnhandledExit,
)
from aiovm.loop import Host, VirtualLoop, run, run_wall
from aiovm.trace import HashSink, JsonLinesSink, Kind, ListSink, Record, Tracer
from aiovm.vcpu import MpState, Vcpu, VcpuStat
from aiovm.vm import Outcome, Vm

__all__ = [
    "AiovmError",
    "CommandFailed",
    "ConfigError",
    "Costs",
    "DeadlockError",
    "EngineError",
    "GuestError",
    "GuestPanic",
    "HashSink",
    "Host",
    "HostError",
    "InternalError",
    "JsonLinesSink",
    "Kind",
    "ListSink",
    "LivelockError",
    "MpState",
    "Outcome",
    "Record",
    "StallError",
    "StateError",
    "TimeoutExpired",
    "Tracer",
    "TripleFault",
    "UnhandledExit",
    "Vcpu",
    "VcpuStat",
    "VirtualClock",
    "VirtualLoop",
    "Vm",
    "WallClock",
    "guests",
    "run",
    "run_wall",
]
