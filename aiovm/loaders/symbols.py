"""An ELF image's symbol table: names to addresses, addresses to names. Read when first asked for.

Source: System V ABI, chapter 4 (Symbol Table); read by pyelftools. Modelled: ``.symtab``. Not modelled: dynamic
symbols, versions.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from aiovm.errors import ConfigError

__all__ = ["Symbol", "Symbols"]

_KINDS = ("STT_NOTYPE", "STT_OBJECT", "STT_FUNC")


class Symbol(NamedTuple):
    """``size`` is 0 where the image does not say."""

    address: int
    size: int
    name: str


class Symbols(Mapping[str, Symbol]):
    """Symbols by name; where a name is both local and global, the global one. Empty without an ELF image."""

    def __init__(self, image: bytes = b"", name: str = "") -> None:
        self._image = image
        self._name = name
        self._by_name: dict[str, Symbol] | None = None
        self._by_address: list[Symbol] = []

    def __getitem__(self, name: str) -> Symbol:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())

    def nearest(self, address: int) -> tuple[str, int] | None:
        """The symbol that ``address`` lies in or after, and the offset from it."""
        self._table()
        at = bisect_right(self._by_address, address, key=lambda s: s.address) - 1
        if at < 0:
            return None
        found = self._by_address[at]
        offset = address - found.address
        return None if found.size and offset >= found.size else (found.name, offset)

    def _table(self) -> dict[str, Symbol]:
        if self._by_name is None:
            # The library raises whatever it stumbles over in a damaged image: the boundary is here.
            try:
                self._by_name = self._read() if self._image else {}
            except Exception as error:
                raise ConfigError(f"{self._name}: damaged symbol table: {error!r}") from error
            self._by_address = sorted(self._by_name.values())
            self._image = b""
        return self._by_name

    def _read(self) -> dict[str, Symbol]:
        # Few runs ask for a symbol, and the package takes as long to import as a small guest to run.
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        table = ELFFile(io.BytesIO(self._image)).get_section_by_name(".symtab")
        found: dict[str, Symbol] = {}
        for entry in table.iter_symbols() if isinstance(table, SymbolTableSection) else ():
            if not entry.name or entry["st_shndx"] == "SHN_UNDEF" or entry["st_info"]["type"] not in _KINDS:
                continue
            if entry.name not in found or entry["st_info"]["bind"] != "STB_LOCAL":
                found[entry.name] = Symbol(entry["st_value"], entry["st_size"], entry.name)
        return found
