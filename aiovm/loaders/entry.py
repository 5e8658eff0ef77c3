"""The CPU at a guest's first instruction, as a value, and the three ways to begin.

* *Real mode*: segments of 64 KiB, interrupts through the table at 0, as firmware leaves a boot sector.
* *Protected mode*: flat 4 GiB segments, no paging.
* *Long mode*: 64-bit, the first 4 GiB mapped to themselves with 2 MiB pages. Pages that hold no code are marked
  no-execute: the engine is slow at stores to pages that may be executed. The first 2 MiB stay executable, because
  SIPI trampolines switch modes there.

In all three interrupts are off, and but for real mode the IDT is empty: a fault before the guest has set its own is
a triple fault. The GDT and the page tables lie in low memory (:mod:`aiovm.loaders.ram`), so that a guest may reload
its segments; every register not named is 0.

Source: SDM vol. 3A, 3.4.5 (descriptors), 4.5 (4-level paging). Not modelled: the A20 gate, which is always open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiovm.engine.base import DescriptorTable, Reg, Seg, Segment
from aiovm.loaders.ram import HIGH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiovm.engine.base import CpuState
    from aiovm.loaders.ram import Ram

__all__ = ["EntryState", "apply", "identity_tables", "long_mode", "protected_mode", "real_mode", "stack"]

_CODE16 = 0x00_9B00  # present, code, readable, accessed
_DATA16 = 0x00_9300  # present, data, writable, accessed
_CODE32 = 0xC0_9B00  # and G, D
_DATA32 = 0xC0_9300
_CODE64 = 0xA0_9B00  # and G, L
_TSS_BUSY = 0x8B00
_LDT = 0x8200
_FLAT = 0xFFFF_FFFF
_DATA_SEGMENTS = (Seg.SS, Seg.DS, Seg.ES, Seg.FS, Seg.GS)

_CR0_REAL = 0x10  # ET
_CR0_PROTECTED = 0x11  # and PE
_CR0_LONG = 0x8001_0033  # PG, WP, NE, ET, MP, PE
_CR4_PAE = 0x20
_CR4_SSE = 0x600  # OSFXSR, OSXMMEXCPT: compilers use SSE in 64-bit code
_EFER_LONG = 0xD00  # NXE, LMA, LME

_PAGE_2M = 1 << 21
_TABLE = 0x23  # present, writable, accessed
_LARGE = 0xE3  # and dirty, page size
_NX = 1 << 63

_STACK = 0x4000


@dataclass(frozen=True, slots=True)
class EntryState:
    """What :func:`apply` writes; the fields of :class:`~aiovm.engine.base.CpuState`."""

    rip: int
    cr0: int
    segments: Mapping[Seg, Segment]
    gdt: DescriptorTable
    idt: DescriptorTable
    gpr: Mapping[Reg, int] = field(default_factory=dict)
    rflags: int = 2
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


def apply(entry: EntryState, cpu: CpuState) -> None:
    """Put a vCPU that was reset into the entry state."""
    for reg in Reg:
        cpu.gpr[reg] = entry.gpr.get(reg, 0)
    cpu.efer = entry.efer
    cpu.cr4 = entry.cr4
    cpu.cr3 = entry.cr3
    cpu.cr2 = 0
    cpu.cr0 = entry.cr0
    cpu.gdt = entry.gdt
    cpu.idt = entry.idt
    for which in Seg:
        cpu.set_segment(which, entry.segments[which])
    cpu.rflags = entry.rflags
    cpu.rip = entry.rip
    cpu.interrupt_shadow = False


def real_mode(address: int, *, gpr: Mapping[Reg, int]) -> EntryState:
    """Begin at ``address`` below 1 MiB, as 0000:address where that reaches, with data segments at 0."""
    base = 0 if address < 0x10000 else address & ~0xF
    data = Segment(0, 0, 0xFFFF, _DATA16)
    segments = dict.fromkeys(_DATA_SEGMENTS, data)
    segments[Seg.CS] = Segment(base >> 4, base, 0xFFFF, _CODE16)
    return EntryState(
        rip=address - base,
        cr0=_CR0_REAL,
        segments=_with_system(segments, 0xFFFF),
        gdt=DescriptorTable(0, 0xFFFF),
        idt=DescriptorTable(0, 0x3FF),
        gpr=gpr,
    )


def protected_mode(
    ram: Ram, rip: int, *, gpr: Mapping[Reg, int], code_selector: int = 0x08, data_selector: int = 0x10
) -> EntryState:
    """Begin in 32-bit code."""
    segments, gdt = _flat_segments(
        ram, Segment(code_selector, 0, _FLAT, _CODE32), Segment(data_selector, 0, _FLAT, _DATA32)
    )
    return EntryState(rip=rip, cr0=_CR0_PROTECTED, segments=segments, gdt=gdt, idt=DescriptorTable(0, 0), gpr=gpr)


def long_mode(
    ram: Ram,
    rip: int,
    *,
    gpr: Mapping[Reg, int],
    executable: Iterable[tuple[int, int]],
    code_selector: int = 0x08,
    data_selector: int = 0x10,
) -> EntryState:
    """Begin in 64-bit code; ``executable``: the ranges ``(low, high)`` that hold code."""
    segments, gdt = _flat_segments(
        ram, Segment(code_selector, 0, _FLAT, _CODE64), Segment(data_selector, 0, _FLAT, _DATA32)
    )
    tables = ram.place(6 * 4096, "page tables", align=4096)
    ram.write(tables, identity_tables(tables, executable))
    return EntryState(
        rip=rip,
        cr0=_CR0_LONG,
        segments=segments,
        gdt=gdt,
        idt=DescriptorTable(0, 0),
        gpr=gpr,
        cr3=tables,
        cr4=_CR4_PAE | _CR4_SSE,
        efer=_EFER_LONG,
    )


def stack(ram: Ram) -> int:
    """Room for a first stack at the end of RAM; the address of its upper end."""
    return ram.place(_STACK, "stack", align=4096, windows=HIGH, top=True) + _STACK


def identity_tables(base: int, executable: Iterable[tuple[int, int]]) -> bytes:
    """Six pages of tables, to lie at ``base``, that map 4 GiB to themselves."""
    with_code = {0}
    for low, high in executable:
        with_code.update(range(low // _PAGE_2M, -(-high // _PAGE_2M)))
    words = [0] * (2 * 512)
    words[0] = base + 0x1000 | _TABLE
    words[512:516] = [base + 0x2000 + 0x1000 * i | _TABLE for i in range(4)]
    words += [n * _PAGE_2M | _LARGE | (0 if n in with_code else _NX) for n in range(4 * 512)]
    return struct.pack(f"<{len(words)}Q", *words)


def _flat_segments(ram: Ram, code: Segment, data: Segment) -> tuple[dict[Seg, Segment], DescriptorTable]:
    """Segments, with a GDT in memory that holds the same."""
    words = [0] * (max(code.selector, data.selector) // 8 + 1)
    for segment in (code, data):
        words[segment.selector // 8] = 0xFFFF | (segment.flags | 0xF_0000) << 32  # base 0, limit 4 GiB
    table = struct.pack(f"<{len(words)}Q", *words)
    base = ram.place(len(table), "GDT")
    ram.write(base, table)
    segments = dict.fromkeys(_DATA_SEGMENTS, data) | {Seg.CS: code}
    return _with_system(segments, 0x67), DescriptorTable(base, len(table) - 1)


def _with_system(segments: dict[Seg, Segment], tss_limit: int) -> dict[Seg, Segment]:
    return segments | {Seg.TR: Segment(0, 0, tss_limit, _TSS_BUSY), Seg.LDTR: Segment(0, 0, 0xFFFF, _LDT)}
