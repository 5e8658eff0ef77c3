"""The virtio entropy device (Virtio 1.2, 5.4).

Rules: each buffer is filled at once, up to 4096 bytes of it; a device may give less than it was asked for (5.4.6.2).
Where the bytes come from is the host's business: in virtual time a seeded generator, else the system's.

Modelled: the request queue. Not modelled: leaking detection (later than 1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm.devices.virtio.transport import TransportState, VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["RngState", "VirtioRng"]

_MOST: Final = 4096


@dataclass(slots=True)
class RngState:
    """Nothing but the transport's."""

    transport: TransportState


class VirtioRng(VirtioDevice):
    """``random_bytes(n)`` gives n random bytes."""

    def __init__(self, memory: GuestMemory, irq: IrqLine, random_bytes: Callable[[int], bytes]) -> None:
        super().__init__(memory, irq, device_id=4, queues=(64,))
        self._random_bytes = random_bytes

    def save(self) -> RngState:
        """A copy of the state."""
        return RngState(self._save_transport())

    def restore(self, state: RngState) -> None:
        """Take over a copy of ``state``."""
        self._restore_transport(state.transport)

    def reset(self) -> None:
        """The power-on state."""
        self._reset_transport()

    def _notified(self, queue: int) -> None:
        while (chain := self._pop(queue, 0)) is not None:
            self._push(queue, chain, self._random_bytes(min(chain.room, _MOST)))
