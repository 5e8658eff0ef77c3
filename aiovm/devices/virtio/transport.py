"""virtio over memory-mapped registers, version 2 (Virtio 1.2, 4.2), and what every virtio device shares.

======  ==============================  ======  ==============================
0x000   MagicValue "virt"               0x050   QueueNotify (w)
0x004   Version 2                       0x060   InterruptStatus
0x008   DeviceID                        0x064   InterruptACK (w)
0x00C   VendorID                        0x070   Status
0x010   DeviceFeatures                  0x080   QueueDesc, low and high (w)
0x014   DeviceFeaturesSel (w)           0x090   QueueDriver (w)
0x020   DriverFeatures (w)              0x0A0   QueueDevice (w)
0x024   DriverFeaturesSel (w)           0x0B0   SHMLen, SHMBase: all ones
0x030   QueueSel (w)                    0x0FC   ConfigGeneration
0x034   QueueSizeMax                    0x100   the device's configuration
0x038   QueueSize (w)
0x044   QueueReady
======  ==============================  ======  ==============================

Rules: registers are accessed in aligned words of 32 bits; any other access reads 0 and is dropped. FEATURES_OK stays
only when the driver took VERSION_1 and nothing that was not offered. Before DRIVER_OK no ring is touched. A ring that
breaks the rules sets DEVICE_NEEDS_RESET with a configuration interrupt; the device then touches no ring until it is
reset, and ``fault`` says why. The line is high while InterruptStatus is not zero.

Not modelled: the legacy interface (version 1), shared memory regions, ring reset, notification data.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aiovm.bits import mask
from aiovm.devices.virtio.queue import BadRing, Chain, Queue, QueueState
from aiovm.memory import NoMemory

if TYPE_CHECKING:
    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["Reg", "Status", "TransportState", "VirtioDevice"]

_MAGIC: Final = int.from_bytes(b"virt", "little")
_VENDOR: Final = int.from_bytes(b"aiov", "little")
_CONFIG: Final = 0x100

_INDIRECT_DESC: Final = 1 << 28
_EVENT_IDX: Final = 1 << 29
_VERSION_1: Final = 1 << 32
_RING_FEATURES: Final = _INDIRECT_DESC | _EVENT_IDX | _VERSION_1

_USED_BUFFER: Final = 1
_CONFIG_CHANGE: Final = 2


class Reg(enum.IntEnum):
    """Offsets of the control registers (table 4.1)."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC


class Status(enum.IntFlag):
    """Device status (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


@dataclass(slots=True)
class TransportState:
    """What the transport remembers. ``fault``: why the device needs a reset."""

    status: int = 0
    interrupts: int = 0
    generation: int = 0
    device_features_sel: int = 0
    driver_features_sel: int = 0
    driver_features: int = 0
    queue_sel: int = 0
    queues: list[QueueState] = field(default_factory=list)
    fault: str = ""


class VirtioDevice(ABC):
    """A device of ``device_id`` with queues of the given largest sizes. ``features``: its own, below bit 24."""

    LENGTH = 0x200

    def __init__(
        self, memory: GuestMemory, irq: IrqLine, *, device_id: int, queues: tuple[int, ...], features: int = 0
    ) -> None:
        self._irq = irq
        self._device_id = device_id
        self._features = features | _RING_FEATURES
        self._queues = [Queue(memory, size) for size in queues]
        self._t = self._power_on()

    # ---- what a device adds ------------------------------------------------------------------------------------

    @abstractmethod
    def _notified(self, queue: int) -> None:
        """The driver has offered buffers in ``queue``, or the device has just been started."""

    @abstractmethod
    def reset(self) -> None:
        """The power-on state; also the driver's reset."""

    def _config(self) -> bytes:
        """The configuration space."""
        return b""

    def _write_config(self, offset: int, value: int) -> None:  # noqa: B027 - most devices have nothing to add
        """The driver stores to the configuration space: nothing there is writable."""

    # ---- guest side --------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """A register, or the configuration space."""
        if offset >= _CONFIG:
            offset -= _CONFIG
            return int.from_bytes(self._config()[offset : offset + size], "little")
        if size != 4 or offset & 3:
            return 0
        t = self._t
        match offset:
            case Reg.MAGIC_VALUE:
                return _MAGIC
            case Reg.VERSION:
                return 2
            case Reg.DEVICE_ID:
                return self._device_id
            case Reg.VENDOR_ID:
                return _VENDOR
            case Reg.DEVICE_FEATURES if t.device_features_sel < 2:
                return self._features >> (32 * t.device_features_sel) & mask(32)
            case Reg.QUEUE_SIZE_MAX:
                queue = self._selected()
                return 0 if queue is None else queue.max_size
            case Reg.QUEUE_READY:
                queue = self._selected()
                return 0 if queue is None else int(queue.s.ready)
            case Reg.INTERRUPT_STATUS:
                return t.interrupts
            case Reg.STATUS:
                return t.status
            case Reg.SHM_LEN_LOW | Reg.SHM_LEN_HIGH | Reg.SHM_BASE_LOW | Reg.SHM_BASE_HIGH:
                return mask(32)
            case Reg.CONFIG_GENERATION:
                return t.generation
        return 0

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """A register, or the configuration space."""
        if offset >= _CONFIG:
            self._write_config(offset - _CONFIG, value)
            return
        if size != 4 or offset & 3:
            return
        t = self._t
        match offset:
            case Reg.DEVICE_FEATURES_SEL:
                t.device_features_sel = value
            case Reg.DRIVER_FEATURES_SEL:
                t.driver_features_sel = value
            case Reg.DRIVER_FEATURES if not t.status & Status.FEATURES_OK:
                self._take_features(value)
            case Reg.QUEUE_SEL:
                t.queue_sel = value
            case Reg.QUEUE_READY:
                queue = self._selected()
                if queue is not None:
                    queue.enable(bool(value & 1))
            case Reg.QUEUE_NOTIFY:
                self._notify(value & mask(16))
            case Reg.INTERRUPT_ACK:
                t.interrupts &= ~value
                self._sync_irq()
            case Reg.STATUS:
                self._write_status(value)
            case _:
                queue = self._selected()
                if queue is not None and not queue.s.ready:
                    _configure(queue, offset, value)

    # ---- host side ---------------------------------------------------------------------------------------------

    @property
    def fault(self) -> str:
        """Why the device needs a reset; empty when it does not."""
        return self._t.fault

    # ---- for devices -------------------------------------------------------------------------------------------

    def _accepted(self, feature: int) -> bool:
        """Whether the driver took the feature with this bit number."""
        return bool(self._t.driver_features >> feature & 1)

    def _pop(self, queue: int, limit: int) -> Chain | None:
        """The next chain of ``queue``, of at most ``limit`` readable bytes; None when there is none to be had."""
        if not self._running(queue):
            return None
        try:
            return self._queues[queue].pop(limit)
        except (BadRing, NoMemory) as error:
            self._break(f"queue {queue}: {error}")
            return None

    def _push(self, queue: int, chain: Chain, data: bytes = b"", tail: bytes = b"") -> None:
        """Give ``chain`` back, answered; forgotten when its queue does not run any more."""
        if not self._running(queue):
            return
        try:
            if self._queues[queue].push(chain, data, tail):
                self._interrupt(_USED_BUFFER)
        except (BadRing, NoMemory) as error:
            self._break(f"queue {queue}: {error}")

    def _break(self, fault: str) -> None:
        """The driver did what it must not: nothing goes on before a reset (2.1.2)."""
        t = self._t
        t.status |= Status.DEVICE_NEEDS_RESET
        t.fault = fault
        if t.status & Status.DRIVER_OK:
            self._interrupt(_CONFIG_CHANGE)

    def _config_changed(self) -> None:
        """The configuration space says something new."""
        self._t.generation = (self._t.generation + 1) & mask(32)
        if self._t.status & Status.DRIVER_OK:
            self._interrupt(_CONFIG_CHANGE)

    def _save_transport(self) -> TransportState:
        return replace(self._t, queues=[replace(queue.s) for queue in self._queues])

    def _restore_transport(self, state: TransportState) -> None:
        self._t = replace(state, queues=[])
        for queue, saved in zip(self._queues, state.queues, strict=True):
            queue.s = replace(saved)
        self._negotiated()
        self._sync_irq()

    def _reset_transport(self) -> None:
        self._restore_transport(self._power_on())

    # ---- inside ------------------------------------------------------------------------------------------------

    def _power_on(self) -> TransportState:
        return TransportState(queues=[QueueState(queue.max_size) for queue in self._queues])

    def _selected(self) -> Queue | None:
        at = self._t.queue_sel
        return self._queues[at] if at < len(self._queues) else None

    def _running(self, queue: int) -> bool:
        running = Status.DRIVER_OK | Status.DEVICE_NEEDS_RESET
        return self._t.status & running == Status.DRIVER_OK and self._queues[queue].s.ready

    def _take_features(self, value: int) -> None:
        t = self._t
        if t.driver_features_sel < 2:
            shift = 32 * t.driver_features_sel
            t.driver_features = t.driver_features & ~(mask(32) << shift) | value << shift
        elif value:
            # Bits from 64 on: none is offered, so taking one refuses them all.
            t.driver_features |= 1 << 64

    def _write_status(self, value: int) -> None:
        t = self._t
        if not value & mask(8):
            self.reset()
            return
        before = t.status
        t.status = value & mask(8) & ~Status.DEVICE_NEEDS_RESET | before & Status.DEVICE_NEEDS_RESET
        if t.status & ~before & Status.FEATURES_OK and (
            t.driver_features & ~self._features or not t.driver_features & _VERSION_1
        ):
            t.status &= ~Status.FEATURES_OK
        self._negotiated()
        if t.status & ~before & Status.DRIVER_OK:
            for queue in range(len(self._queues)):
                self._notify(queue)

    def _negotiated(self) -> None:
        features = self._t.driver_features if self._t.status & Status.FEATURES_OK else 0
        for queue in self._queues:
            queue.indirect = bool(features & _INDIRECT_DESC)
            queue.event_index = bool(features & _EVENT_IDX)

    def _notify(self, queue: int) -> None:
        if queue < len(self._queues) and self._running(queue):
            self._notified(queue)

    def _interrupt(self, cause: int) -> None:
        self._t.interrupts |= cause
        self._sync_irq()

    def _sync_irq(self) -> None:
        self._irq.set(bool(self._t.interrupts))


def _configure(queue: Queue, offset: int, value: int) -> None:
    """The registers that may change while a queue is not ready."""
    s = queue.s
    match offset:
        case Reg.QUEUE_SIZE:
            queue.resize(value)
        case Reg.QUEUE_DESC_LOW:
            s.descriptors = s.descriptors & ~mask(32) | value
        case Reg.QUEUE_DESC_HIGH:
            s.descriptors = s.descriptors & mask(32) | value << 32
        case Reg.QUEUE_DRIVER_LOW:
            s.driver = s.driver & ~mask(32) | value
        case Reg.QUEUE_DRIVER_HIGH:
            s.driver = s.driver & mask(32) | value << 32
        case Reg.QUEUE_DEVICE_LOW:
            s.device = s.device & ~mask(32) | value
        case Reg.QUEUE_DEVICE_HIGH:
            s.device = s.device & mask(32) | value << 32
