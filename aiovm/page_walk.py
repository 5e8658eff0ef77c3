"""Walking page tables in software, in every paging mode (SDM vol. 3A, chapter 4; ``arch/x86/kvm/mmu/paging_tmpl.h``).

Rules, from ``arch/x86/kvm/mmu/paging_tmpl.h`` of Linux 6.16:

* Four modes: no paging, 32-bit (4M pages with CR4.PSE, PSE-36), PAE, 4-level. Outside long mode a linear address
  has 32 bits; canonical form is the caller's check.
* At each level: not present comes before reserved bits; permissions gather on the way down and are judged once, at
  the leaf. A table page that no memory backs reads as not present.
* The error code takes W and U from the request, and I/D only where NX or SMEP exists.
* Accessed and Dirty are set from the top to the leaf, by compare and exchange: an entry that changed meanwhile
  restarts the walk; a read-only table keeps its bits. Nothing is written by a walk that faults, nor by a debugger's.
* PDPTEs are cached registers: :func:`load_pdptrs` fills them and is the place of their #GP. A walk without them
  (``PagingRegs.pdptrs`` is None) reads the entry from memory, as AMD's and QEMU's processors do.

Modelled: WP, NX, SMEP, SMAP (6.16: EFLAGS.AC does not cover implicit accesses), protection keys, nested paging with
ordinary x86 tables (AMD's). Not modelled: EPT's entry format, 5-level paging, SGX and shadow-stack error codes, memory
types.
"""

from __future__ import annotations

import enum
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from aiovm.memory import NoMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.base import CpuState
    from aiovm.memory import GuestMemory

__all__ = [
    "Access",
    "PageFault",
    "PagingRegs",
    "Translate",
    "Translation",
    "is_canonical",
    "kernel_page",
    "load_pdptrs",
    "translate_debug",
    "walk",
]


class Access(enum.IntEnum):
    """What an access is; values combine with ``|`` and are the error code's bits (SDM vol. 3A, 4.7)."""

    READ = 0
    WRITE = 1 << 1
    USER = 1 << 2
    FETCH = 1 << 4
    #: A supervisor access that the instruction did not ask for (descriptor tables, TSS; SDM vol. 3A, 4.6.1).
    IMPLICIT = 1 << 48


_WRITE: Final = 1 << 1
_USER: Final = 1 << 2
_RSVD: Final = 1 << 3
_FETCH: Final = 1 << 4
_PK: Final = 1 << 5
_IMPLICIT: Final = 1 << 48

_PRESENT: Final = 1
_ACCESSED: Final = 1 << 5
_DIRTY: Final = 1 << 6
_PS: Final = 1 << 7
_NX: Final = 1 << 63
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000

_CR0_WP: Final = 1 << 16
_CR0_PG: Final = 1 << 31
_CR4_PSE: Final = 1 << 4
_CR4_PAE: Final = 1 << 5
_CR4_SMEP: Final = 1 << 20
_CR4_SMAP: Final = 1 << 21
_CR4_PKE: Final = 1 << 22
_EFER_LMA: Final = 1 << 10
_EFER_NXE: Final = 1 << 11
_RFLAGS_AC: Final = 1 << 18

_M32: Final = 0xFFFF_FFFF
_M64: Final = 0xFFFF_FFFF_FFFF_FFFF

#: Reserved where PS is set, by the level's shift: 29:13 of a 1G page, 20:13 of a 2M page, PS itself in a PML4E.
_LEAF_RESERVED: Final = {39: _PS, 30: 0x3FFF_E000, 21: 0x001F_E000}
_LEAF_RESERVED_NO_1G: Final = _LEAF_RESERVED | {30: _PS}
_RESERVED_4LEVEL: Final = tuple((1 << 52) - (1 << width) for width in range(53))
_NO_WORDS: Final = memoryview(b"").cast("Q")


class PagingRegs(NamedTuple):
    """What a translation depends on. ``cpl`` is for the helpers that choose U; a walk takes U from its request."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    rflags: int = 2
    cpl: int = 0
    pdptrs: tuple[int, int, int, int] | None = None
    #: CPUID: physical address width, 1G pages, PSE-36.
    maxphyaddr: int = 40
    gbpages: bool = True
    pse36: bool = True
    pkru: int = 0

    @classmethod
    def of(cls, cpu: CpuState, pdptrs: tuple[int, int, int, int] | None = None) -> PagingRegs:
        """The registers of ``cpu``."""
        cr4 = cpu.cr4
        pkru = cpu.pkru if cr4 & _CR4_PKE else 0
        return cls(cpu.cr0, cpu.cr3, cr4, cpu.efer, cpu.rflags, cpu.cpl, pdptrs, pkru=pkru)

    def data_access(self, *, write: bool = False) -> int:
        """The access bits of an instruction's own load or store: U when CPL is 3."""
        return (_USER if self.cpl == 3 else 0) | (_WRITE if write else 0)


class Translation(NamedTuple):
    """Where a linear address leads, and the size of the page that says so."""

    gpa: int
    page_size: int


class PageFault(NamedTuple):
    """#PF: error code and CR2. ``nested``: the fault is the outer tables', at guest physical ``address``."""

    error_code: int
    address: int
    nested: bool = False


#: Where an outer context puts a guest physical address: (gpa, access, set Accessed and Dirty).
Translate: TypeAlias = "Callable[[int, int, bool], int | PageFault]"


def is_canonical(address: int) -> bool:
    """Whether bits 63:47 are all equal (48-bit linear addresses)."""
    return not 0x8000_0000_0000 <= address < 0xFFFF_8000_0000_0000


def walk(
    memory: GuestMemory,
    regs: PagingRegs,
    gva: int,
    access: int = 0,
    *,
    set_ad: bool = True,
    translate: Translate | None = None,
) -> Translation | PageFault:
    """Translate ``gva`` for ``access`` (bits of :class:`Access`); ``set_ad``: set Accessed and Dirty.

    ``translate(gpa, access, set_ad)``: where nested tables put a table's address, and the result; None: where it says.
    """
    if regs.efer & _EFER_LMA:
        return _walk64(memory, regs, gva, access, set_ad, translate, regs.cr3 & _ADDRESS, 39)
    gva &= _M32
    if not regs.cr0 & _CR0_PG:
        real = gva if translate is None else translate(gva, access, set_ad)
        return real if isinstance(real, PageFault) else Translation(real, 4096)
    if not regs.cr4 & _CR4_PAE:
        return _walk32(memory, regs, gva, access, set_ad, translate)
    pdpte = _pdpte(memory, regs, gva, set_ad, translate)
    if isinstance(pdpte, PageFault):
        return pdpte
    if not pdpte & _PRESENT:
        return _fault(regs, gva, access, 0)
    if regs.pdptrs is None and pdpte & _pdpte_reserved(regs.maxphyaddr):
        return _fault(regs, gva, access, _PRESENT | _RSVD)
    return _walk64(memory, regs, gva, access, set_ad, translate, pdpte & _ADDRESS, 21)


def translate_debug(memory: GuestMemory, regs: PagingRegs, gva: int, translate: Translate | None = None) -> int | None:
    """Where ``gva`` leads, for a debugger: no permission applies, nothing is written; None when not mapped."""
    unguarded = regs._replace(cr4=regs.cr4 & ~(_CR4_SMAP | _CR4_PKE))
    found = walk(memory, unguarded, gva, set_ad=False, translate=translate)
    return None if isinstance(found, PageFault) else found.gpa


def kernel_page(memory: GuestMemory, regs: PagingRegs, gva: int, access: int) -> int:
    """The straight path of 4-level paging: a supervisor's data on a 4K or 2M page, nothing left to judge or to set.

    -1 says only that the full walk must decide. ``engine/unicorn/_delivery.c`` walks it too.
    """
    slot = memory.map.find(regs.cr3 & _ADDRESS)
    if slot is None:
        return -1
    base, size, words = slot.base, slot.size, slot.words
    # P and A, for a write also W; no reserved bit; PS clear in the tables (bit 7 of a PTE is PAT), D in a written PTE.
    wanted = _PRESENT | _ACCESSED | access & _WRITE
    looked = wanted | _PS | _RESERVED_4LEVEL[regs.maxphyaddr]
    if not regs.efer & _EFER_NXE:
        looked |= _NX
    at = (regs.cr3 & _ADDRESS) - base
    entry: int = words[at >> 3 | gva >> 39 & 0x1FF]
    if entry & looked != wanted:
        return -1
    allow = entry
    at = (entry & _ADDRESS) - base
    if not 0 <= at < size:
        return -1
    entry = words[at >> 3 | gva >> 30 & 0x1FF]
    if entry & looked != wanted:
        return -1
    allow &= entry
    at = (entry & _ADDRESS) - base
    if not 0 <= at < size:
        return -1
    entry = words[at >> 3 | gva >> 21 & 0x1FF]
    if entry & _PS:
        wanted |= _PS | (_DIRTY if access & _WRITE else 0)
        if entry & (looked | wanted | _LEAF_RESERVED[21]) != wanted:
            return -1
        if allow & entry & _USER and (regs.cr4 & _CR4_SMAP or _key_rights(regs, entry)):
            return -1
        return entry & _ADDRESS & -0x20_0000 | gva & 0x1F_FFFF
    if entry & looked != wanted:
        return -1
    allow &= entry
    at = (entry & _ADDRESS) - base
    if not 0 <= at < size:
        return -1
    entry = words[at >> 3 | gva >> 12 & 0x1FF]
    if access & _WRITE:
        wanted |= _DIRTY
        looked |= _DIRTY
    if entry & (looked & ~_PS) != wanted:
        return -1
    if allow & entry & _USER and (regs.cr4 & _CR4_SMAP or _key_rights(regs, entry)):
        return -1
    return entry & _ADDRESS | gva & 0xFFF


def _walk64(
    memory: GuestMemory,
    regs: PagingRegs,
    gva: int,
    access: int,
    set_ad: bool,
    translate: Translate | None,
    root: int,
    top: int,
) -> Translation | PageFault:
    """Tables of 64-bit entries, from the one at ``root`` whose index starts at bit ``top``."""
    # SDM vol. 3A, 4.4.2 and 4.5.4: 51:M, in PAE 62:M; bit 63 without NX.
    reserved = _RESERVED_4LEVEL[regs.maxphyaddr] if top == 39 else (1 << 63) - (1 << regs.maxphyaddr)
    if not regs.efer & _EFER_NXE:
        reserved |= _NX
    find = memory.map.find
    large_reserved = _LEAF_RESERVED if regs.gbpages else _LEAF_RESERVED_NO_1G
    low = high = 0
    words = _NO_WORDS
    while True:
        table, shift = root, top
        path: list[tuple[int, int]] = []
        allow = -1  # AND of the entries, NX inverted so that it gathers like the others
        while True:
            at = table | (gva >> shift & 0x1FF) << 3
            if translate is not None:
                real = translate(at, _WRITE if set_ad else 0, set_ad)
                if isinstance(real, PageFault):
                    return real
                at = real
            if not low <= at < high:  # tables mostly share a slot
                slot = find(at)
                if slot is None:
                    return _fault(regs, gva, access, 0)
                low = slot.base
                high = low + slot.size
                words = slot.words
            entry: int = words[at - low >> 3]
            if not entry & 1:
                return _fault(regs, gva, access, 0)
            large = shift > 12 and entry & 0x80
            if entry & reserved or (large and entry & large_reserved[shift]):
                return _fault(regs, gva, access, _PRESENT | _RSVD)
            path.append((at, entry))
            allow &= entry ^ _NX
            if large or shift == 12:
                break
            table = entry & _ADDRESS
            shift -= 9
        code = _denied(regs, allow, entry, access)
        if code:
            return _fault(regs, gva, access, code)
        size = 1 << shift
        gpa = entry & _ADDRESS & -size | gva & size - 1
        if translate is not None:
            real = translate(gpa, access, set_ad)
            if isinstance(real, PageFault):
                return real
            gpa = real
        stale = not allow & _ACCESSED or (access & _WRITE and not entry & _DIRTY)
        if set_ad and stale and not _set_accessed_dirty(memory, path, access, 8):
            continue
        return Translation(gpa, size)


def _walk32(
    memory: GuestMemory,
    regs: PagingRegs,
    gva: int,
    access: int,
    set_ad: bool,
    translate: Translate | None,
) -> Translation | PageFault:
    """Two levels of 32-bit entries (SDM vol. 3A, 4.3)."""
    while True:
        table, shift = regs.cr3 & 0xFFFF_F000, 22
        path: list[tuple[int, int]] = []
        allow = -1
        while True:
            at = table | (gva >> shift & 0x3FF) << 2
            if translate is not None:
                real = translate(at, _WRITE if set_ad else 0, set_ad)
                if isinstance(real, PageFault):
                    return real
                at = real
            try:
                entry = memory.read_u(at, 4)
            except NoMemory:
                return _fault(regs, gva, access, 0)
            if not entry & _PRESENT:
                return _fault(regs, gva, access, 0)
            large = shift == 22 and entry & _PS and regs.cr4 & _CR4_PSE
            if large and entry & (0x003E_0000 if regs.pse36 else 0x003F_E000):
                return _fault(regs, gva, access, _PRESENT | _RSVD)
            path.append((at, entry))
            allow &= entry
            if large or shift == 12:
                break
            table = entry & 0xFFFF_F000
            shift = 12
        code = _denied(regs, allow, 0, access)
        if code:
            return _fault(regs, gva, access, code)
        size = 1 << shift
        gpa = entry & 0xFFFF_F000 & -size | gva & size - 1
        if large and regs.pse36:
            gpa |= (entry >> 13 & 0xF) << 32  # KVM: 36 bits whatever MAXPHYADDR is
        if translate is not None:
            real = translate(gpa, access, set_ad)
            if isinstance(real, PageFault):
                return real
            gpa = real
        stale = not allow & _ACCESSED or (access & _WRITE and not entry & _DIRTY)
        if set_ad and stale and not _set_accessed_dirty(memory, path, access, 4):
            continue
        return Translation(gpa, size)


def _fault(regs: PagingRegs, gva: int, access: int, code: int) -> PageFault:
    """The fault with the request's bits (SDM vol. 3A, 4.7)."""
    code |= access & (_WRITE | _USER)
    if access & _FETCH and (regs.cr4 & _CR4_SMEP or (regs.efer & _EFER_NXE and regs.cr4 & _CR4_PAE)):
        code |= _FETCH
    return PageFault(code, gva)


def _key_rights(regs: PagingRegs, leaf: int) -> int:
    """What the protection key of a user page's entry takes away: 1 AD, access; 2 WD, writing (SDM vol. 3A, 4.6.2)."""
    return regs.pkru >> (leaf >> 58 & 0x1E) & 3 if regs.cr4 & _CR4_PKE else 0


def _denied(regs: PagingRegs, allow: int, leaf: int, access: int) -> int:
    """0, or P (and PK): what the gathered bits forbid (SDM vol. 3A, 4.6; KVM ``permission_fault``)."""
    user_page = allow & _USER
    fault: int
    if access & _USER:
        fault = not user_page or (access & _WRITE and not allow & _WRITE)
    else:
        fault = access & _WRITE and not allow & _WRITE and regs.cr0 & _CR0_WP
        if user_page and not fault:
            if access & _FETCH:
                fault = regs.cr4 & _CR4_SMEP
            elif regs.cr4 & _CR4_SMAP:
                fault = not regs.rflags & _RFLAGS_AC or access & _IMPLICIT
    if access & _FETCH:
        if not allow & _NX and regs.efer & _EFER_NXE and regs.cr4 & _CR4_PAE:
            fault = True
    elif user_page and regs.efer & _EFER_LMA:
        rights = _key_rights(regs, leaf)
        if rights & 1 or (rights & 2 and access & _WRITE and (access & _USER or regs.cr0 & _CR0_WP)):
            return _PRESENT | _PK
    return _PRESENT if fault else 0


def _set_accessed_dirty(memory: GuestMemory, path: list[tuple[int, int]], access: int, width: int) -> bool:
    """Set A on the whole path and, for a write, D on the leaf. False: an entry changed, walk again."""
    last = len(path) - 1
    for level, (at, entry) in enumerate(path):
        new = entry | _ACCESSED
        if level == last and access & _WRITE:
            new |= _DIRTY
        if new != entry:
            if memory.read_u(at, width) != entry:
                return False
            with suppress(NoMemory):  # a read-only table
                memory.write_u(at, width, new)
    return True


# ---- PDPTEs --------------------------------------------------------------------------------------------------


def _pdpte_reserved(maxphyaddr: int) -> int:
    """63:M, 8:5 and 2:1 (SDM vol. 3A, 4.4.1)."""
    return (1 << 64) - (1 << maxphyaddr) | 0x1E6


def load_pdptrs(memory: GuestMemory, cr3: int, maxphyaddr: int = 40) -> tuple[int, int, int, int] | None:
    """The four PDPTEs at ``cr3``; None: the instruction that loads them gets #GP(0) and the old ones stay."""
    base = cr3 & 0xFFFF_FFE0
    try:
        a, b, c, d = (memory.read_u(base + 8 * index, 8) for index in range(4))
    except NoMemory:
        return None
    reserved = _pdpte_reserved(maxphyaddr)
    if any(entry & _PRESENT and entry & reserved for entry in (a, b, c, d)):
        return None
    return a, b, c, d


def _pdpte(
    memory: GuestMemory,
    regs: PagingRegs,
    gva: int,
    set_ad: bool,
    translate: Translate | None,
) -> int | PageFault:
    """The PDPTE for ``gva``: the cached one, or memory's; 0 where no memory is."""
    if regs.pdptrs is not None:
        return regs.pdptrs[gva >> 30]
    at = (regs.cr3 & 0xFFFF_FFE0) + 8 * (gva >> 30)
    if translate is not None:
        real = translate(at, 0, set_ad)
        if isinstance(real, PageFault):
            return real
        at = real
    try:
        return memory.read_u(at, 8)
    except NoMemory:
        return 0
