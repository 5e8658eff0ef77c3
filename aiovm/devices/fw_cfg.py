"""QEMU's firmware configuration device: named blobs for the guest (``docs/specs/fw_cfg.rst``).

=====  ============================================================
0x510  selector, 16 bits; also sets the read position to 0
0x511  data: the item's next byte; 0 after its end
0x514  DMA address, 64 bits big-endian; storing its low half starts
=====  ============================================================

Items: signature (0x0000), feature bits (0x0001), RAM size (0x0003), number of CPUs (0x0005) and of possible CPUs
(0x000F), the directory (0x0019) and the files, from 0x0020 on in the order of their names.

Modelled: select, read and skip, by port and by DMA. Not modelled: writing items (every one is read-only; a DMA write
answers with the error bit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiovm.errors import ConfigError
from aiovm.memory import NoMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiovm.memory import GuestMemory

__all__ = ["FwCfg", "FwCfgState"]

_FILES_FROM: Final = 0x20
_DIRECTORY: Final = 0x19
_NAME_BYTES: Final = 56
_DMA_SIGNATURE: Final = int.from_bytes(b"QEMU CFG", "big")

_DMA_ERROR: Final = 1
_DMA_READ: Final = 2
_DMA_SKIP: Final = 4
_DMA_SELECT: Final = 8
_DMA_WRITE: Final = 16
#: A guest may ask for 4 GiB; it is copied piece by piece, so that the host does not hold it.
_CHUNK: Final = 0x1_0000


@dataclass(slots=True)
class FwCfgState:
    """The item that is read, how far, and the high half of the DMA address."""

    selected: int = 0
    position: int = 0
    dma_high: int = 0


class FwCfg:
    """The device. ``memory``: where DMA goes; None leaves DMA out."""

    LENGTH = 12

    def __init__(
        self, *, cpus: int, ram_bytes: int, files: Mapping[str, bytes] | None = None, memory: GuestMemory | None = None
    ) -> None:
        if not 0 < cpus < 1 << 16:
            raise ConfigError(f"fw_cfg cannot say {cpus} CPUs")
        self._memory = memory
        self._s = FwCfgState()
        self._items = {
            0x00: b"QEMU",
            0x01: (1 if memory is None else 3).to_bytes(4, "little"),
            0x03: ram_bytes.to_bytes(8, "little"),
            0x05: cpus.to_bytes(2, "little"),
            0x0F: cpus.to_bytes(2, "little"),
        }
        named = sorted((files or {}).items())
        directory = [len(named).to_bytes(4, "big")]
        for key, (name, data) in enumerate(named, _FILES_FROM):
            encoded = name.encode("ascii", "replace")
            if len(encoded) >= _NAME_BYTES:
                raise ConfigError(f"fw_cfg name {name!r} is longer than {_NAME_BYTES - 1} bytes")
            self._items[key] = bytes(data)
            head = len(data).to_bytes(4, "big") + key.to_bytes(2, "big") + bytes(2)
            directory.append(head + encoded.ljust(_NAME_BYTES, b"\0"))
        self._items[_DIRECTORY] = b"".join(directory)

    def read(self, offset: int, size: int, now: int) -> int:
        """The next bytes of the item, or the DMA signature."""
        if offset == 1:
            return int.from_bytes(self._take(size), "little")
        if offset >= 4 and self._memory is not None:
            signature = _DMA_SIGNATURE.to_bytes(8, "big")[offset - 4 : offset - 4 + size]
            return int.from_bytes(signature, "little")
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """Select an item, or store the DMA address."""
        if offset == 0 and size == 2:
            self._select(value)
        elif offset in (4, 8) and self._memory is not None:
            word = int.from_bytes((value & (1 << (8 * size)) - 1).to_bytes(size, "little"), "big")
            if size == 8 and offset == 4:
                self._dma(self._memory, word)
            elif size == 4 and offset == 4:
                self._s.dma_high = word
            elif size == 4:
                self._dma(self._memory, self._s.dma_high << 32 | word)

    def save(self) -> FwCfgState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: FwCfgState) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state)

    def reset(self) -> None:
        """The power-on state; the items stay."""
        self.restore(FwCfgState())

    def _select(self, key: int) -> None:
        # Bit 14 once meant "to be written".
        self._s.selected = key & 0xBFFF
        self._s.position = 0

    def _take(self, length: int) -> bytes:
        s = self._s
        data = self._items.get(s.selected, b"")[s.position : s.position + length]
        s.position += length
        return data.ljust(length, b"\0")

    def _dma(self, memory: GuestMemory, gpa: int) -> None:
        self._s.dma_high = 0
        try:
            request = memory.read(gpa, 16)
        except NoMemory:
            return
        control = int.from_bytes(request[:4], "big")
        length = int.from_bytes(request[4:8], "big")
        address = int.from_bytes(request[8:], "big")
        if control & _DMA_SELECT:
            self._select(control >> 16)
        answer = 0
        try:
            if control & _DMA_READ:
                for done in range(0, length, _CHUNK):
                    memory.write(address + done, self._take(min(_CHUNK, length - done)))
            elif control & _DMA_WRITE:
                answer = _DMA_ERROR
            elif control & _DMA_SKIP:
                self._s.position += length
        except NoMemory:
            answer = _DMA_ERROR
        try:
            memory.write(gpa, answer.to_bytes(4, "big"))
        except NoMemory:
            return
