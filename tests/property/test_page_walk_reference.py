"""The walker against a slow one written from the manual's tables (SDM vol. 3A, 4.3 to 4.7), on random tables."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.memory import GuestMemory
from aiovm.page_walk import PageFault, PagingRegs, Translation, kernel_page, walk

PAGES = 16  # tables and data live in the first 16 pages; page 15 is a hole
SIZE = 15 * 4096


def bit(value, n):
    return value >> n & 1


def bits(value, high, low):
    return value >> low & (1 << (high - low + 1)) - 1


def reference(read, r, gva, write, user, fetch, implicit):
    """(gpa, list of (address, size, new value)) or the fault's error code."""
    nx = bit(r.efer, 11) and bit(r.cr4, 5)
    smep, smap, wp = bit(r.cr4, 20), bit(r.cr4, 21), bit(r.cr0, 16)

    def fault(present, reserved=0, key=0):
        instruction = fetch and (nx or smep)
        return present | write << 1 | user << 2 | reserved << 3 | (1 if instruction else 0) << 4 | key << 5

    if bit(r.efer, 10):
        kinds, size, address = ["PML4E", "PDPTE", "PDE", "PTE"], 8, bits(r.cr3, 51, 12) << 12
    elif bit(r.cr4, 5):
        kinds, size, address = ["PAE PDPTE", "PAE PDE", "PAE PTE"], 8, bits(r.cr3, 31, 5) << 5
    else:
        kinds, size, address = ["PDE32", "PTE32"], 4, bits(r.cr3, 31, 12) << 12
    low_bit = {"PML4E": 39, "PDPTE": 30, "PAE PDPTE": 30, "PDE": 21, "PAE PDE": 21, "PDE32": 22}
    width = {"PAE PDPTE": 2, "PDE32": 10, "PTE32": 10}
    writable, user_ok, execute_off, seen = True, True, False, []
    for kind in kinds:
        shift = low_bit.get(kind, 12)
        at = address + size * bits(gva, shift + width.get(kind, 9) - 1, shift)
        entry = read(at, size)
        if entry is None or not bit(entry, 0):
            return fault(0)
        large = bit(entry, 7) and (kind in {"PDPTE", "PDE", "PAE PDE"} or (kind == "PDE32" and bit(r.cr4, 4)))
        reserved = []
        if kind == "PAE PDPTE":
            reserved = [(63, r.maxphyaddr), (8, 5), (2, 1)]
        elif size == 8:
            reserved = [(62 if kind.startswith("PAE") else 51, r.maxphyaddr)]
            if not bit(r.efer, 11):
                reserved.append((63, 63))
        if kind == "PML4E" or (kind == "PDPTE" and not r.gbpages):
            reserved.append((7, 7))
        if large:
            reserved += {"PDPTE": [(29, 13)], "PDE": [(20, 13)], "PAE PDE": [(20, 13)]}.get(
                kind, [(21, 17) if r.pse36 else (21, 13)] if kind == "PDE32" else []
            )
        if any(bits(entry, high, low) for high, low in reserved):
            return fault(1, reserved=1)
        if kind != "PAE PDPTE":
            writable &= bool(bit(entry, 1))
            user_ok &= bool(bit(entry, 2))
            if size == 8 and bit(entry, 63):
                execute_off = True
            seen.append((at, entry))
        if large or kind in {"PTE", "PAE PTE", "PTE32"}:
            break
        address = bits(entry, 51 if size == 8 else 31, 12) << 12
    key_off = 0
    if user_ok and not fetch and bit(r.cr4, 22) and bit(r.efer, 10):
        key = bits(entry, 62, 59)
        if bit(r.pkru, 2 * key) or (bit(r.pkru, 2 * key + 1) and write and (user or wp)):
            key_off = 1
    if user:
        bad = not user_ok or (write and not writable) or (fetch and nx and execute_off)
    else:
        bad = (
            (write and not writable and wp)
            or (fetch and nx and execute_off)
            or (fetch and smep and user_ok)
            or (not fetch and smap and user_ok and (implicit or not bit(r.rflags, 18)))
        )
    if bad or key_off:
        return fault(1, key=key_off)
    gpa = (entry & ((1 << 52) - 1) & ~((1 << shift) - 1)) | bits(gva, shift - 1, 0)
    if kind == "PDE32" and r.pse36:
        gpa = gpa & 0xFFFF_FFFF | bits(entry, 16, 13) << 32
    updates = []
    for at, old in seen:
        new = old | 1 << 5
        if write and at == seen[-1][0]:
            new |= 1 << 6
        updates.append((at, size, new))
    return gpa, updates


# Mostly healthy bits, now and then anything: a walk should usually reach its end.
def entry_bits(draw, size):
    flags = draw(st.sampled_from([0x07, 0x27, 0x67, 0x63, 0x65, 0x61, 0x23, 0x03, 0xE7, 0xE3, 0x87, 0x66, 0x1E7]))
    page = draw(st.integers(0, PAGES - 1))
    value = page << 12 | flags
    if draw(st.integers(0, 5)) == 0:
        value |= 1 << draw(st.integers(12, 63 if size == 8 else 31))
    if draw(st.integers(0, 5)) == 0 and size == 8:
        value |= 1 << 63
    if draw(st.booleans()) and flags & 0x80:
        value &= ~0x3FFF_E000
    return value


@st.composite
def cases(draw):
    mode = draw(st.sampled_from(["long", "pae", "two"]))
    cr4 = (0 if mode == "two" else 1 << 5) | (1 << 4 if draw(st.booleans()) else 0)
    for feature in (20, 21, 22):
        if draw(st.integers(0, 2)) == 0:
            cr4 |= 1 << feature
    regs = PagingRegs(
        cr0=0x8000_0001 | draw(st.sampled_from([0, 1 << 16])),
        cr3=draw(st.integers(0, 14)) << 12,
        cr4=cr4,
        efer=(0x500 if mode == "long" else 0) | draw(st.sampled_from([0, 0x800, 0x800])),
        rflags=draw(st.sampled_from([2, 0x4_0002])),
        maxphyaddr=draw(st.sampled_from([36, 40, 46, 52])),
        gbpages=draw(st.booleans()),
        pse36=draw(st.booleans()),
        pkru=draw(st.sampled_from([0, 1, 2, 0x5555_5555, 0xAAAA_AAAA])),
    )
    size = 4 if mode == "two" else 8
    gva = draw(st.integers(0, (1 << (48 if mode == "long" else 32)) - 1))
    entries = []
    for shift in {"long": (39, 30, 21, 12), "pae": (30, 21, 12), "two": (22, 12)}[mode]:
        width = {"two": 10}.get(mode, 2 if mode == "pae" and shift == 30 else 9)
        index = gva >> shift & (1 << width) - 1
        for page in range(15):
            value = entry_bits(draw, size) if draw(st.integers(0, 1)) else 0x67 | draw(st.integers(0, 15)) << 12
            if mode == "pae" and shift == 30 and draw(st.integers(0, 7)):
                value &= ~0x1E6
            entries.append(((page << 12) + size * index, value))
    access = draw(st.sampled_from([0, 2, 4, 6, 0x10, 0x14, 1 << 48, 1 << 48 | 2]))
    return regs, size, gva, entries, access


def _straight(regs, access):
    """Whether :func:`kernel_page` may be asked: long mode, a supervisor's data."""
    return regs.efer & 0x400 and not access & 0x14


@settings(max_examples=300, deadline=None)
@given(cases())
def test_walker_agrees_with_the_manual(case):
    regs, size, gva, entries, access = case
    memory = GuestMemory()
    memory.set_region(0, 0, SIZE)
    for at, value in entries:
        memory.write_u(at, size, value)
    before = memory.read(0, SIZE)

    def read(at, width):
        return int.from_bytes(before[at : at + width], "little") if at < SIZE else None

    wanted = reference(read, regs, gva, access >> 1 & 1, access >> 2 & 1, access >> 4 & 1, access >> 48 & 1)
    if isinstance(wanted, int):
        if _straight(regs, access):
            assert kernel_page(memory, regs, gva, access) == -1
        assert walk(memory, regs, gva, access) == PageFault(wanted, gva)
        assert memory.read(0, SIZE) == before
        return
    gpa, updates = wanted
    first = walk(memory, regs, gva, access, set_ad=False)
    assert isinstance(first, Translation)
    assert first.gpa == gpa
    assert memory.read(0, SIZE) == before

    if len({at for at, _, _ in updates}) == len(updates):  # else an update changes a later level: told in the unit test
        after = bytearray(before)
        for at, width, new in updates:
            after[at : at + width] = new.to_bytes(width, "little")
        assert walk(memory, regs, gva, access) == first
        assert memory.read(0, SIZE) == bytes(after)
        if _straight(regs, access):
            assert kernel_page(memory, regs, gva, access) in (-1, gpa)
        assert walk(memory, regs, gva, access) == first
