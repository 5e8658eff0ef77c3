"""Every exception that aiovm raises, and whose fault it is.

::

    AiovmError
    ├── HostError                       the embedding program did something wrong
    │   ├── ConfigError (ValueError)        a bad image, size, overlap or option: raised while building
    │   └── StateError (RuntimeError)       the call is not allowed now; names the state and the call
    ├── GuestError                      the guest ended itself; carries vCPU, RIP and the last exits
    │   ├── TripleFault
    │   ├── GuestPanic                      its kernel panicked
    │   └── UnhandledExit
    ├── StallError                      the run cannot go on
    │   ├── DeadlockError                   everything waits, and nothing can wake it
    │   └── LivelockError                   turns pass, time does not
    ├── TimeoutExpired                  a time limit passed
    ├── CommandFailed                   a command in the guest's shell failed
    ├── EngineError                     the CPU engine failed; the cause is chained
    └── InternalError                   our own invariant broke: please report it

Guest nonsense never raises by itself: it becomes an architectural answer (a fault, all ones, ignored) and
a trace record. ``GuestError`` is for the moment when the architecture says that the machine stops.
"""

from __future__ import annotations

__all__ = [
    "AiovmError",
    "CommandFailed",
    "ConfigError",
    "DeadlockError",
    "EngineError",
    "GuestError",
    "GuestPanic",
    "HostError",
    "InternalError",
    "LivelockError",
    "StallError",
    "StateError",
    "TimeoutExpired",
    "TripleFault",
    "UnhandledExit",
]


class AiovmError(Exception):
    """The root of the tree."""


class HostError(AiovmError):
    """The embedding program made a mistake."""


class ConfigError(HostError, ValueError):
    """A value given while building is wrong: the message names it, numbers in hex."""


class StateError(HostError, RuntimeError):
    """The call is not allowed in this state."""


class GuestError(AiovmError):
    """The guest ended itself.

    ``vcpu`` is the vCPU's index, ``rip`` where it stood, ``history`` its last exits, oldest first.
    """

    def __init__(self, message: str, *, vcpu: int, rip: int, history: tuple[str, ...] = ()) -> None:
        text = f"{message} (vCPU {vcpu}, RIP {rip:#x})"
        if history:
            text += "; last exits: " + ", ".join(history)
        super().__init__(text)
        self.vcpu = vcpu
        self.rip = rip
        self.history = history


class TripleFault(GuestError):
    """A fault while delivering a double fault: the machine shuts down (SDM vol. 3A, 6.15)."""


class GuestPanic(GuestError):
    """The guest's kernel panicked; ``lines`` is what it printed from there on."""

    def __init__(self, message: str, *, lines: tuple[str, ...], vcpu: int, rip: int) -> None:
        super().__init__(f"the guest's kernel panicked: {message}", vcpu=vcpu, rip=rip)
        self.lines = lines

    def __str__(self) -> str:
        return "\n  ".join((super().__str__(), *self.lines))


class UnhandledExit(GuestError):
    """The vCPU left for a reason that nobody answers."""


class StallError(AiovmError):
    """The run cannot go on; the message names every vCPU's state."""


class DeadlockError(StallError):
    """Everything waits: no timer is armed, no input can come."""


class LivelockError(StallError):
    """Turns pass, time does not."""


class TimeoutExpired(AiovmError):
    """A time limit passed before the guest was done, or said what was waited for."""


class CommandFailed(AiovmError):
    """A command in the guest's shell ended with a status other than 0."""


class EngineError(AiovmError):
    """The CPU engine failed."""


class InternalError(AiovmError):
    """An invariant of aiovm broke: please report it."""
