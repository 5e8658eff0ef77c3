"""An archive of files that Linux unpacks as its first root file system: cpio in the "newc" format.

Rules: the same files give the same bytes (no times, no owners but root, inode numbers in order); directories come by
themselves; the first file of a name stays. A kernel reads a row of archives as one, so one may follow another.

Source: Documentation/driver-api/early-userspace/buffer-format.rst (Linux 6.16). Not modelled: hard links, checksums.
"""

from __future__ import annotations

import gzip
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Archive"]


class Archive:
    """One archive, file by file. ``mode`` is a file's type and permissions, as in ``0o100755``."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._names: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """One file; for a symbolic link ``data`` is where it points to, ``device`` are a device's numbers."""
        parent = name.rpartition("/")[0]
        if parent and parent not in self._names:
            self.add(parent, 0o40755)
        if name not in self._names:
            self._names.add(name)
            self._out.write(self._entry(name, mode, data, device, self._out.tell()))

    def add_tree(self, root: Path, *, without: tuple[str, ...] = ()) -> None:
        """Everything under ``root``, in order of names, except what begins with one of ``without``."""
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if name.startswith(without):
                continue
            if path.is_symlink():
                self.add(name, 0o120777, str(path.readlink()).encode())
            elif path.is_dir():
                self.add(name, 0o40755)
            else:
                self.add(name, 0o100000 | path.stat().st_mode & 0o777, path.read_bytes())

    def packed(self) -> bytes:
        """The whole archive, compressed by gzip."""
        out = self._out.getvalue()
        return gzip.compress(out + self._entry("TRAILER!!!", 0, b"", (0, 0), len(out)), 6, mtime=0)

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int], at: int) -> bytes:
        encoded = name.encode() + b"\0"
        fields = (len(self._names), mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        entry = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        entry += bytes(-(at + len(entry)) % 4)
        return entry + data + bytes(-len(data) % 4)
