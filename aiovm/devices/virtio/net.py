"""The virtio network card with one pair of queues (Virtio 1.2, 5.1).

Rules: a frame that the guest sends goes to ``transmit(frame)``; False means "not now", the frame waits in the ring and
:meth:`VirtioNet.drain` tries again. :meth:`VirtioNet.receive` puts a frame into a buffer of the guest and answers False
when it has offered none; ``on_room`` is called whenever it has offered more.

Modelled: MAC, MTU, link status. Not modelled: the control queue, offloads (every frame is whole and has its checksums),
merged buffers, several queues. A frame outside 14 to MTU + 18 bytes is dropped, as a switch would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.virtio.transport import TransportState, VirtioDevice
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.devices.virtio.queue import Chain
    from aiovm.irq import IrqLine
    from aiovm.memory import GuestMemory

__all__ = ["NetState", "VirtioNet"]

_F_MTU: Final = 1 << 3
_F_MAC: Final = 1 << 5
_F_STATUS: Final = 1 << 16

_RECEIVE: Final = 0
_TRANSMIT: Final = 1

_HEADER_BYTES: Final = 12
#: No flags, no segmentation, one buffer (virtio_net_hdr, 5.1.6).
_PLAIN_HEADER: Final = bytes(10) + b"\x01\x00"
_ETHERNET: Final = 14
_VLAN_TAG: Final = 4
#: A driver that batches more than this into one buffer was offered no way to.
_LONGEST: Final = 0x1_0000 + _HEADER_BYTES


@dataclass(slots=True)
class NetState:
    """``sending``: the buffer whose frame nobody has taken yet."""

    transport: TransportState
    link_up: bool = True
    sending: Chain | None = None


class VirtioNet(VirtioDevice):
    """One card. ``mac``: six bytes, the address that the guest uses."""

    def __init__(
        self,
        memory: GuestMemory,
        irq: IrqLine,
        transmit: Callable[[bytes], bool],
        *,
        mac: bytes,
        mtu: int = 1500,
        on_room: Callable[[], None] | None = None,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise ConfigError(f"{mac.hex(':')} is no address of one card")
        if not 68 <= mtu <= 0xFFFF:
            raise ConfigError(f"MTU {mtu:#x} is not in 0x44 to 0xffff")
        super().__init__(memory, irq, device_id=1, queues=(256, 256), features=_F_MTU | _F_MAC | _F_STATUS)
        self._transmit = transmit
        self._on_room = on_room
        self._mac = mac
        self._mtu = mtu
        self._s = NetState(self._t)

    # ---- host side ---------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Give the guest a frame; False when it has no buffer for one now."""
        chain = self._pop(_RECEIVE, 0)
        if chain is None:
            return False
        self._push(_RECEIVE, chain, _PLAIN_HEADER + frame)
        return True

    def drain(self) -> None:
        """Offer the frames that wait to ``transmit`` again."""
        s = self._s
        while True:
            if s.sending is None:
                s.sending = self._pop(_TRANSMIT, _LONGEST)
                if s.sending is None:
                    return
            frame = s.sending.data[_HEADER_BYTES:]
            if _ETHERNET <= len(frame) <= self._mtu + _ETHERNET + _VLAN_TAG and not self._transmit(frame):
                return
            chain, s.sending = s.sending, None
            self._push(_TRANSMIT, chain)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out."""
        self._s.link_up = up
        self._config_changed()

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> NetState:
        """A copy of the state."""
        return replace(self._s, transport=self._save_transport())

    def restore(self, state: NetState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)
        self._restore_transport(state.transport)

    def reset(self) -> None:
        """The power-on state; the cable stays as it is."""
        self._reset_transport()
        self._s = NetState(self._t, self._s.link_up)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _notified(self, queue: int) -> None:
        if queue == _TRANSMIT:
            self.drain()
        elif self._on_room is not None:
            self._on_room()

    def _config(self) -> bytes:
        # MAC, status, pairs of queues, MTU.
        return self._mac + bytes((self._s.link_up, 0, 1, 0)) + self._mtu.to_bytes(2, "little")
