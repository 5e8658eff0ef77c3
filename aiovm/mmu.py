"""Guest memory by linear address, and a vCPU's paging contexts (``arch/x86/kvm/mmu.h``, ``x86.c``).

Rules:

* Reads and writes go page by page; a write touches nothing until every page of it has been translated and found to
  be memory.
* Failure is a value: :class:`~aiovm.page_walk.PageFault`, or :class:`IoNeeded` where a page leads to no memory
  (KVM's ``X86EMUL_IO_NEEDED``).
* A nested guest's table addresses, and the result, pass the outer context as user accesses; table reads ask for write
  too, as they may set Accessed.

Not modelled: EPT, the routing of nested faults to a nested hypervisor (``PageFault.nested`` says whose they are).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.memory import NoMemory
from aiovm.page_walk import Access, PageFault, PagingRegs, Translation, kernel_page, translate_debug, walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.memory import GuestMemory

__all__ = ["IoNeeded", "Mmu", "VcpuMmu", "read_virt", "read_virt_u", "write_virt"]

_WRITE: Final = 1 << 1
_USER: Final = 1 << 2
_FETCH: Final = 1 << 4
_EFER_LMA: Final = 1 << 10
_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF


class IoNeeded(NamedTuple):
    """The page is mapped, but no memory (for a write: no writable memory) stands at ``gpa``."""

    gpa: int


# ---- access by linear address ----------------------------------------------------------------------------------


def read_virt(
    memory: GuestMemory, regs: PagingRegs, gva: int, length: int, access: int = 0
) -> bytes | PageFault | IoNeeded:
    """``length`` bytes at ``gva``, page by page."""
    if (gva & 0xFFF) + length <= 4096:
        gpa = _page(memory, regs, gva, access)
        if isinstance(gpa, PageFault):
            return gpa
        try:
            return memory.read(gpa, length)
        except NoMemory as missing:
            return IoNeeded(missing.gpa)
    pieces = _pieces(memory, regs, gva, length, access)
    if not isinstance(pieces, list):
        return pieces
    try:
        return b"".join(memory.read(gpa, size) for gpa, size in pieces)
    except NoMemory as missing:
        return IoNeeded(missing.gpa)


def read_virt_u(
    memory: GuestMemory, regs: PagingRegs, gva: int, size: int, access: int = 0
) -> int | PageFault | IoNeeded:
    """An unsigned little-endian integer of ``size`` bytes at ``gva``."""
    if regs.efer & _EFER_LMA and not access & (_USER | _FETCH) and (gva & 0xFFF) + size <= 4096:
        gpa = kernel_page(memory, regs, gva, 0)
        slot = memory.map.find(gpa)
        if slot is not None:
            at = gpa - slot.base
            return int.from_bytes(slot.bytes_[at : at + size], "little")
    data = read_virt(memory, regs, gva, size, access)
    return int.from_bytes(data, "little") if isinstance(data, bytes) else data


def write_virt(
    memory: GuestMemory, regs: PagingRegs, gva: int, data: bytes, access: int = Access.WRITE
) -> PageFault | IoNeeded | None:
    """Store ``data`` at ``gva``; nothing is stored when any of its pages cannot take it."""
    access |= _WRITE
    if (gva & 0xFFF) + len(data) <= 4096:
        gpa = _page(memory, regs, gva, access)
        if isinstance(gpa, PageFault):
            return gpa
        try:
            memory.write(gpa, data)
        except NoMemory as missing:
            return IoNeeded(missing.gpa)
        return None
    pieces = _pieces(memory, regs, gva, len(data), access)
    if not isinstance(pieces, list):
        return pieces
    for gpa, _ in pieces:
        slot = memory.map.find(gpa)
        if slot is None or not slot.writable:
            return IoNeeded(gpa)
    done = 0
    for gpa, size in pieces:
        memory.write(gpa, data[done : done + size])
        done += size
    return None


def _page(memory: GuestMemory, regs: PagingRegs, gva: int, access: int) -> int | PageFault:
    """Where ``gva`` leads, by the straight path when it decides."""
    if regs.efer & _EFER_LMA and not access & (_USER | _FETCH):
        gpa = kernel_page(memory, regs, gva, access)
        if gpa >= 0:
            return gpa
    found = walk(memory, regs, gva, access)
    return found if isinstance(found, PageFault) else found.gpa


def _pieces(
    memory: GuestMemory, regs: PagingRegs, gva: int, length: int, access: int
) -> list[tuple[int, int]] | PageFault:
    """The range as (gpa, size), one a page; addresses wrap as linear addresses do."""
    wrap = _M64 if regs.efer & _EFER_LMA else _M32
    pieces: list[tuple[int, int]] = []
    while length:
        gva &= wrap
        size = min(length, 4096 - (gva & 0xFFF))
        found = walk(memory, regs, gva, access)
        if isinstance(found, PageFault):
            return found
        pieces.append((found.gpa, size))
        gva += size
        length -= size
    return pieces


# ---- contexts --------------------------------------------------------------------------------------------------


class Mmu:
    """One paging context (``struct kvm_mmu``): whose registers, and the context that its physical addresses pass."""

    __slots__ = ("_memory", "_outer", "_regs")

    def __init__(self, memory: GuestMemory, regs: Callable[[], PagingRegs], outer: Mmu | None = None) -> None:
        self._memory = memory
        self._regs = regs
        self._outer = outer

    def gva_to_gpa(self, gva: int, access: int = 0, *, set_ad: bool = True) -> Translation | PageFault:
        """Walk this context's tables; every table address and the result go through :meth:`translate_gpa`."""
        translate = None if self._outer is None else self.translate_gpa
        return walk(self._memory, self._regs(), gva, access, set_ad=set_ad, translate=translate)

    def translate_gpa(self, gpa: int, access: int, set_ad: bool = True) -> int | PageFault:
        """``gpa`` itself, or where the outer context maps it: nested walks are always user accesses."""
        if self._outer is None:
            return gpa
        found = self._outer.gva_to_gpa(gpa, access | _USER, set_ad=set_ad)
        return found._replace(nested=True) if isinstance(found, PageFault) else found.gpa

    def translate_debug(self, gva: int) -> int | None:
        """As :func:`aiovm.page_walk.translate_debug`, in this context."""
        translate = None if self._outer is None else self.translate_gpa
        return translate_debug(self._memory, self._regs(), gva, translate)


class VcpuMmu:
    """A vCPU's three contexts (``arch/x86/kvm/mmu/`` of Linux 6.16).

    ``mmu`` handles faults. ``nested_mmu`` walks a nested guest's own tables. ``walk_mmu`` is whichever of the two
    the guest's linear addresses mean now: ``nested_mmu`` while a nested guest runs on nested tables.
    """

    def __init__(self, memory: GuestMemory, regs: Callable[[], PagingRegs]) -> None:
        self._memory = memory
        self._regs = regs
        self.mmu = Mmu(memory, regs)
        self.nested_mmu: Mmu | None = None

    @property
    def walk_mmu(self) -> Mmu:
        """The context of emulated accesses."""
        return self.mmu if self.nested_mmu is None else self.nested_mmu

    def enter_nested(self, tables: Callable[[], PagingRegs]) -> None:
        """A nested guest starts; ``tables``: the registers that describe its hypervisor's nested tables."""
        self.mmu = Mmu(self._memory, tables)
        self.nested_mmu = Mmu(self._memory, self._regs, self.mmu)

    def leave_nested(self) -> None:
        """Back to one level."""
        self.mmu = Mmu(self._memory, self._regs)
        self.nested_mmu = None
