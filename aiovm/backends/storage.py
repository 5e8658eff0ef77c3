"""What a disk is made of: plain synchronous storage, used by one thread at a time.

:class:`FileStorage` is an image file. :class:`Overlay` keeps what the guest writes in a sparse temporary file and
leaves what is below untouched; it remembers by sector which of both is valid, so a write never copies.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Protocol

from aiovm.devices.virtio.block import SECTOR
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FileStorage", "Overlay", "Storage"]


class Storage(Protocol):
    """A number of sectors. Ranges are inside it. What fails raises ``OSError``."""

    @property
    def sectors(self) -> int: ...
    @property
    def read_only(self) -> bool: ...

    def read(self, sector: int, length: int) -> bytes: ...
    def write(self, sector: int, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class FileStorage:
    """An image file. A last piece that is no whole sector is filled up with zeros, and left out of a writable disk."""

    def __init__(self, path: str | Path, *, read_only: bool = True) -> None:
        self.read_only = read_only
        try:
            self._file = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"disk image {str(path)!r}: {error.strerror}") from error
        size = os.lseek(self._file, 0, os.SEEK_END)
        self.sectors = -(-size // SECTOR) if read_only else size // SECTOR

    def read(self, sector: int, length: int) -> bytes:
        """``length`` bytes from ``sector`` on."""
        return _read(self._file, sector * SECTOR, length)

    def write(self, sector: int, data: bytes) -> None:
        """Store whole sectors."""
        _write(self._file, sector * SECTOR, data)

    def flush(self) -> None:
        """What was written is on the disk afterwards."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Overlay:
    """Copy on write above ``base``."""

    read_only = False

    def __init__(self, base: Storage) -> None:
        self._base = base
        self.sectors = base.sectors
        self._file = tempfile.TemporaryFile(prefix="aiovm-overlay-")  # noqa: SIM115 - closed by close()
        # A byte a sector, so that runs are found by bytearray.find.
        self._written = bytearray(base.sectors)

    def read(self, sector: int, length: int) -> bytes:
        """``length`` bytes from ``sector`` on, from wherever they are valid."""
        parts = []
        end = sector + length // SECTOR
        while sector < end:
            here = self._written[sector]
            stop = self._written.find(1 - here, sector, end)
            count = (end if stop < 0 else stop) - sector
            if here:
                parts.append(_read(self._file.fileno(), sector * SECTOR, count * SECTOR))
            else:
                parts.append(self._base.read(sector, count * SECTOR))
            sector += count
        return b"".join(parts)

    def write(self, sector: int, data: bytes) -> None:
        """Store whole sectors in the overlay."""
        _write(self._file.fileno(), sector * SECTOR, data)
        count = len(data) // SECTOR
        self._written[sector : sector + count] = b"\x01" * count

    def save(self) -> list[tuple[int, bytes]]:
        """The runs of written sectors."""
        runs = []
        sector = self._written.find(1)
        while sector >= 0:
            end = self._written.find(0, sector)
            end = len(self._written) if end < 0 else end
            runs.append((sector, _read(self._file.fileno(), sector * SECTOR, (end - sector) * SECTOR)))
            sector = self._written.find(1, end)
        return runs

    def restore(self, runs: list[tuple[int, bytes]]) -> None:
        """Hold these, and nothing else."""
        self._written[:] = bytes(len(self._written))
        for sector, data in runs:
            self.write(sector, data)

    def flush(self) -> None:
        """Nothing: the overlay does not outlive the program."""

    def close(self) -> None:
        """Forget what was written."""
        self._file.close()
        self._base.close()


def _read(file: int, offset: int, length: int) -> bytes:
    """What lies beyond the file's end reads as zeros."""
    parts = []
    while length:
        part = os.pread(file, length, offset)
        if not part:
            parts.append(bytes(length))
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _write(file: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        offset += done
        view = view[done:]
