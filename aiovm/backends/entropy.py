"""Random bytes for the guest: in virtual time from a generator seeded by the host's seed, else from the system."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aiovm.devices.virtio.rng import VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.backends.base import BackedMachine
    from aiovm.irq import IrqLine

__all__ = ["Entropy"]


class Entropy:
    """``random_bytes(n)``: another source."""

    def __init__(self, random_bytes: Callable[[int], bytes] | None = None) -> None:
        self._random_bytes = random_bytes

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioRng:
        """Make the device."""
        source = self._random_bytes
        if source is None:
            # A generator of its own: the host's is for the scheduler, whose choices must not hang on the guest's.
            seeded = random.Random(f"entropy {machine.host.seed}")
            source = (seeded if machine.clock.is_virtual else random.SystemRandom()).randbytes
        return VirtioRng(machine.memory, irq, source)

    async def aclose(self) -> None:
        """Nothing to let go of."""
