"""How a backend meets its machine.

A device runs inside the guest's slices, on the wall clock in another thread; a backend lives on the event loop. They
meet in one place: :meth:`BackedMachine.call_at`, which calls back on the loop while no slice of the machine runs. A
:class:`Doorbell` is the usual way: whoever has news rings, from either side, and the service routine then looks at both
sides at once, however often it was rung. Data waits where it is until the other side has room, so nothing piles up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

import msgspec

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.clock import Clock, Timer
    from aiovm.devices.virtio.transport import VirtioDevice
    from aiovm.irq import IrqLine
    from aiovm.loop import Host
    from aiovm.memory import GuestMemory

__all__ = ["BackedMachine", "Backend", "Doorbell", "SavedBackend", "from_tree", "to_tree"]

T = TypeVar("T")


class BackedMachine(Protocol):
    """What a backend may ask of a machine."""

    @property
    def host(self) -> Host: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def clock(self) -> Clock: ...

    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` on the loop at ``deadline`` (ns), while no slice of the machine runs; from any thread."""

    def post(self, deadline: int, callback: Callable[[], object]) -> None:
        """The same for what a pause waits for, and what happens at once during one."""


class Backend(Protocol):
    """One device's other half: made by the embedding program, given to the machine."""

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioDevice:
        """Make the device. Once only, on the running loop."""

    async def aclose(self) -> None:
        """Let go of files, tasks and threads; the machine does not run any more."""


@runtime_checkable
class SavedBackend(Protocol):
    """A backend whose half of the machine can be saved, while the machine is at rest."""

    def save(self) -> object:
        """Plain values (:func:`to_tree`)."""

    def restore(self, state: object) -> None:
        """Take over what :meth:`save` gave."""


def to_tree(state: object) -> object:
    """A dataclass as plain values."""
    return cast("object", msgspec.to_builtins(state, builtin_types=(bytes, bytearray)))


def from_tree(tree: object, kind: type[T]) -> T:
    """And back; :class:`ConfigError` when it is no such state."""
    try:
        return msgspec.convert(tree, kind, builtin_types=(bytes, bytearray))
    except msgspec.ValidationError as error:
        raise ConfigError(f"a saved virtio device of another kind: {error}") from error


class Doorbell:
    """``service()`` is called soon after :meth:`ring`, ``latency_ns`` later at the earliest."""

    __slots__ = ("_latency_ns", "_machine", "_rung", "_service")

    def __init__(self, machine: BackedMachine, service: Callable[[], None], *, latency_ns: int = 0) -> None:
        self._machine = machine
        self._service = service
        self._latency_ns = latency_ns
        self._rung = False

    def ring(self) -> None:
        """Ask for service; a bell that was rung already stays so."""
        if not self._rung:
            self._rung = True
            self._machine.post(self._machine.clock.now() + self._latency_ns, self._answer)

    def _answer(self) -> None:
        # Lowered first: what comes during the service rings again.
        self._rung = False
        self._service()
