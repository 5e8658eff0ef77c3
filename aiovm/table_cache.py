"""What event delivery has found in a long-mode guest's tables before, and finds again while they read the same.

Rules:

* Nothing is taken on trust. A find is kept with the words that led to it (paging entries, the gate, the descriptor),
  and holds while each of them reads the same: so it is what a walk would find now, and nobody has to tell of stores.
* Kept is only what leaves nothing to judge and nothing to set: straight walks (:func:`aiovm.page_walk.kernel_page`),
  gates that raise no fault by themselves, code segments of the GDT with Accessed set.
* A :class:`TableSet` belongs to one value of the registers that say where tables are, and to one memory map. Few are
  kept, with few pages: when there are more, or the map changes, they are found anew.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from aiovm.engine.base import Segment
from aiovm.page_walk import PagingRegs, is_canonical, kernel_page
from aiovm.segmentation import read_system, segment_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory
    from aiovm.segmentation import Fault

__all__ = ["Handler", "TableCache", "TableSet"]

T = TypeVar("T")

_M64: Final = 0xFFFF_FFFF_FFFF_FFFF
_TABLE: Final = 0x000F_FFFF_FFFF_F000
_MOST_SETS: Final = 32
_MOST_PAGES: Final = 32
#: Gate: P and the type but for its lowest bit; of an interrupt gate.
_GATE: Final = 0x9E << 40
_GATE_IS: Final = 0x8E << 40
#: Descriptor: P, S, code, Accessed, L and not D.
_CODE: Final = 0x60_9900 << 32
_CODE_IS: Final = 0x20_9900 << 32


class Handler(NamedTuple):
    """Where a gate leads. ``segments``: CS by the RPL that it gets."""

    target: int
    is_trap: bool
    ist: int
    gate_dpl: int
    dpl: int
    conforming: bool
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, gate: int, descriptor: int) -> Handler:
        """What a 16-byte gate and its code segment's descriptor say."""
        selector = gate >> 16 & 0xFFFC
        _, base, limit, flags = segment_of(selector, descriptor)
        return cls(
            gate & 0xFFFF | gate >> 32 & 0xFFFF_FFFF_FFFF_0000,
            bool(gate >> 40 & 1),
            gate >> 32 & 7,
            gate >> 45 & 3,
            descriptor >> 45 & 3,
            bool(descriptor & 1 << 42),
            tuple(Segment(selector | rpl, base, limit, flags) for rpl in range(4)),
        )


class _Find(NamedTuple, Generic[T]):
    """Something found, and by which of the slot's 64-bit words: what ``read`` gives of them."""

    read: Callable[[memoryview], tuple[int, ...]]
    values: tuple[int, ...]
    what: T


class TableSet:
    """The finds with one setting of the registers."""

    __slots__ = ("_base", "_gdt", "_handlers", "_idt", "_memory", "_pages", "_size", "_words", "regs")

    def __init__(self, cpu: CpuState, memory: GuestMemory) -> None:
        self._memory = memory
        #: For accesses that the processor makes by itself: neither CPL nor RFLAGS.AC count.
        self.regs = PagingRegs(cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer)
        self._idt, self._gdt = cpu.idt, cpu.gdt
        slot = memory.map.find(self.regs.cr3 & _TABLE)
        self._base, self._size = (0, 0) if slot is None else (slot.base, slot.size)
        self._words = memoryview(b"").cast("Q") if slot is None else slot.words
        self._pages: dict[int, _Find[int]] = {}
        self._handlers: dict[int, _Find[Handler]] = {}

    def page(self, gva: int, access: int) -> int:
        """As :func:`aiovm.page_walk.kernel_page`."""
        key = gva >> 12 << 2 | access & 2
        found = self._pages.get(key)
        if found is not None:
            read, values, page = found
            if read(self._words) == values:
                return page | gva & 0xFFF
        path: list[int] = []
        gpa = kernel_page(self._memory, self.regs, gva, access, path)
        if gpa >= 0:
            if len(self._pages) >= _MOST_PAGES:
                self._pages.clear()
            self._pages[key] = self._find(path, gpa & -0x1000)
        return gpa

    def handler(self, vector: int) -> Handler | None:
        """``vector``'s gate and code segment; None says only that they must be looked at closely."""
        found = self._handlers.get(vector)
        if found is not None:
            read, values, handler = found
            if read(self._words) == values:
                return handler
        path: list[int] = []
        at = vector * 16
        if at + 15 > self._idt.limit or not self._follow(self._idt.base + at, 2, path):
            return None
        gate = self._words[path[-2]] | self._words[path[-1]] << 64
        selector = gate >> 16 & 0xFFFF
        inside = selector & 0xFFFC and not selector & 4 and selector | 7 <= self._gdt.limit
        if gate & _GATE != _GATE_IS or not inside or not self._follow(self._gdt.base + (selector & 0xFFF8), 1, path):
            return None
        descriptor = self._words[path[-1]]
        handler = Handler.of(gate, descriptor)
        if descriptor & _CODE != _CODE_IS or not is_canonical(handler.target):
            return None
        self._handlers[vector] = self._find(path, handler)
        return handler

    def _follow(self, gva: int, count: int, path: list[int]) -> bool:
        """Whether ``count`` words at ``gva`` are a straight walk away in the tables' slot; the way goes to ``path``."""
        gva &= _M64
        gpa = kernel_page(self._memory, self.regs, gva, 0, path)
        at = gpa - self._base
        if gpa < 0 or gva & 7 or (gva & 0xFFF) + 8 * count > 4096 or not 0 <= at < self._size:
            return False
        path.extend(range(at >> 3, (at >> 3) + count))
        return True

    def read(self, gva: int, length: int) -> int | Fault:
        """As :func:`aiovm.segmentation.read_system`."""
        gva &= _M64
        if (gva & 0xFFF) + length <= 4096:
            gpa = self.page(gva, 0)
            if self._base <= gpa < self._base + self._size:
                return self._memory.read_u(gpa, length)
        return read_system(self._memory, self.regs, gva, length)

    def _find(self, path: list[int], what: T) -> _Find[T]:
        read = itemgetter(*dict.fromkeys(path))  # neighbours share tables
        return _Find(read, read(self._words), what)


class TableCache:
    """One vCPU's table sets."""

    __slots__ = ("_key", "_last", "_map", "_memory", "_sets")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._map = memory.map
        self._sets: dict[tuple[int, ...], TableSet] = {}
        self._key: tuple[int, ...] = ()
        self._last: TableSet | None = None

    def of(self, cpu: CpuState) -> TableSet:
        """The set for the registers of ``cpu``."""
        key = cpu.tables
        if key == self._key and self._memory.map is self._map and self._last is not None:
            return self._last
        sets = self._sets
        if self._memory.map is not self._map:
            self._map = self._memory.map
            sets.clear()
        found = sets.get(key)
        if found is None:
            if len(sets) >= _MOST_SETS:
                sets.clear()
            found = sets[key] = TableSet(cpu, self._memory)
        self._key, self._last = key, found
        return found
