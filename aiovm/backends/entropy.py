"""Random bytes for the guest: in virtual time from a generator seeded by the host's seed, else from the system."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiovm.backends.base import from_tree, to_tree
from aiovm.devices.virtio.rng import RngState, VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.backends.base import BackedMachine
    from aiovm.irq import IrqLine

__all__ = ["Entropy", "EntropyState"]


@dataclass(frozen=True, slots=True)
class EntropyState:
    """``generator``: the words of the seeded one."""

    device: RngState
    generator: list[int] | None


class Entropy:
    """``random_bytes(n)``: another source."""

    def __init__(self, random_bytes: Callable[[int], bytes] | None = None) -> None:
        self._random_bytes = random_bytes
        self._seeded: random.Random | None
        self._device: VirtioRng

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioRng:
        """Make the device."""
        source = self._random_bytes
        self._seeded = None
        if source is None:
            # A generator of its own: the host's is for the scheduler, whose choices must not hang on the guest's.
            seeded = random.Random(f"entropy {machine.host.seed}")
            self._seeded = seeded if machine.clock.is_virtual else None
            source = (self._seeded or random.SystemRandom()).randbytes
        self._device = VirtioRng(machine.memory, irq, source)
        return self._device

    def save(self) -> object:
        """The device and, in virtual time, how far the generator is."""
        words = None if self._seeded is None else list(self._seeded.getstate()[1])
        return to_tree(EntropyState(self._device.save(), words))

    def restore(self, state: object) -> None:
        """Take over a saved state; a source of the system's or the program's goes on by itself."""
        saved = from_tree(state, EntropyState)
        if self._seeded is not None and saved.generator is not None:
            self._seeded.setstate((self._seeded.VERSION, tuple(saved.generator), None))
        self._device.restore(saved.device)

    async def aclose(self) -> None:
        """Nothing to let go of."""
