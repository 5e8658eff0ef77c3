"""A virtio disk whose storage is read and written by a thread of its own, never by the event loop.

On the wall clock an answer comes when the thread has it. In virtual time it comes exactly ``latency_ns`` after the
request, whatever the host's disk does: the run stays repeatable, and a slow thread is waited for.

Requests are carried out one after another in the order in which the guest made them, so a flush covers what it must.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiovm.backends.base import from_tree, to_tree
from aiovm.backends.storage import Overlay
from aiovm.devices.virtio.block import BlockOp, BlockRequest, BlockState, BlockStatus, VirtioBlock
from aiovm.errors import ConfigError, StateError
from aiovm.units import US

if TYPE_CHECKING:
    from concurrent.futures import Future

    from aiovm.backends.base import BackedMachine
    from aiovm.backends.storage import Storage
    from aiovm.irq import IrqLine

__all__ = ["Disk", "DiskState"]

Answer = tuple[BlockStatus, bytes]


@dataclass(frozen=True, slots=True)
class DiskState:
    """``overlay``: (sector, data) of what was written above the base, or None where there is no overlay."""

    device: BlockState
    overlay: list[tuple[int, bytes]] | None


class Disk:
    """``storage`` as a disk with the id ``serial``. ``latency_ns``: ours, a fast SSD's 100 µs in virtual time."""

    def __init__(self, storage: Storage, *, serial: str = "aiovm", latency_ns: int = 100 * US) -> None:
        if latency_ns < 0:
            raise ConfigError(f"a latency of {latency_ns} ns")
        self._storage = storage
        self._serial = serial
        self._latency_ns = latency_ns
        self._device: VirtioBlock | None = None
        self._thread = ThreadPoolExecutor(1, "aiovm-disk")

    def attach(self, machine: BackedMachine, irq: IrqLine) -> VirtioBlock:
        """Make the device."""
        if self._device is not None:
            raise StateError("the disk is attached already")
        self._machine = machine
        self._device = VirtioBlock(
            machine.memory,
            irq,
            self._submit,
            sectors=self._storage.sectors,
            read_only=self._storage.read_only,
            serial=self._serial,
        )
        return self._device

    async def aclose(self) -> None:
        """Finish the request under way, drop the others, close the storage."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._storage.close()

    def save(self) -> object:
        """The device, and what an overlay holds, with the writes that are not answered yet."""
        if self._device is None:
            raise StateError("the disk has no machine yet")
        storage = self._storage
        overlay = self._thread.submit(storage.save).result() if isinstance(storage, Overlay) else None
        return to_tree(DiskState(self._device.save(), overlay))

    def restore(self, state: object) -> None:
        """Take over a saved state. A disk without an overlay must hold what it held then."""
        saved = from_tree(state, DiskState)
        if self._device is None:
            raise StateError("the disk has no machine yet")
        storage = self._storage
        if (saved.overlay is not None) != isinstance(storage, Overlay):
            raise ConfigError("a disk with an overlay is restored on one with an overlay, and only there")
        if isinstance(storage, Overlay) and saved.overlay is not None:
            self._thread.submit(storage.restore, saved.overlay).result()
        self._device.restore(saved.device)

    def _submit(self, request: BlockRequest) -> None:
        machine = self._machine
        future = self._thread.submit(self._carry_out, request)
        if machine.clock.is_virtual:
            machine.post(machine.clock.now() + self._latency_ns, lambda: self._finish(request, future))
        else:
            future.add_done_callback(
                lambda future: machine.call_at(machine.clock.now(), lambda: self._finish(request, future))
            )

    def _finish(self, request: BlockRequest, future: Future[Answer]) -> None:
        if self._device is not None and not future.cancelled():
            self._device.complete(request.token, *future.result())

    def _carry_out(self, request: BlockRequest) -> Answer:
        """In the thread."""
        try:
            match request.op:
                case BlockOp.IN:
                    return BlockStatus.OK, self._storage.read(request.sector, request.length)
                case BlockOp.OUT:
                    self._storage.write(request.sector, request.data)
                case _:
                    self._storage.flush()
        except OSError:
            return BlockStatus.IOERR, b""
        return BlockStatus.OK, b""
