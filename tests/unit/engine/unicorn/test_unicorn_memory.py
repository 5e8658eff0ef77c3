"""The core follows the memory map: wholly or not at all, at the cost of what changes."""

import time
from pathlib import Path

import pytest
from core_machine import CODE, DATA, ENGINES, IDS, MMIO, Machine, code, every_engine

from aiovm.engine.unicorn import budget, lib
from aiovm.errors import ConfigError
from aiovm.exits import Hlt
from aiovm.memory import SlotFlags

NO_MEMORY = 1  # UC_ERR_NOMEM
HIGH = 0x600000

#: mov [0x30000], al; mov ebx, MMIO; mov [rbx], al; mov al, [0x600000]; hlt
PROGRAM = code("a2 0000030000000000 bb00000030 8803 a0 0000600000000000 f4")


def failing(monkeypatch, name, at):
    """Have the core refuse the call number ``at`` from now on, and no other."""
    calls = []
    real = getattr(lib, name)

    def refuse(*arguments):
        calls.append(name)
        return NO_MEMORY if len(calls) == at else real(*arguments)

    monkeypatch.setattr(lib, name, refuse)
    return calls


@every_engine
@pytest.mark.parametrize(
    ("name", "at", "flags"),
    [
        ("uc_mem_unmap", 1, 0),
        ("uc_mem_map_ptr", 1, 0),
        ("uc_mmio_map", 1, 0),
        ("uc_mmio_map", 2, 0),
        ("uc_mem_protect", 1, SlotFlags.READONLY),
    ],
)
def test_a_slot_that_the_host_cannot_map_changes_nothing(native, pointers, monkeypatch, name, at, flags):
    m = Machine(PROGRAM, native=native, pointers=pointers)
    before = m.memory.map
    with monkeypatch.context() as patch:
        calls = failing(patch, name, at)
        with pytest.raises(ConfigError, match="ENOMEM"):
            m.memory.set_region(1, HIGH, 0x1000, flags=SlotFlags(flags))
        assert len(calls) >= at
    assert m.memory.map == before
    m.gpr[0] = 5
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 1) == 5
    assert [event[1:] for event in m.seen("write")] == [(MMIO, 1, 5)]
    assert [event[1:] for event in m.seen("read")] == [(HIGH, 1)]  # nobody is there still
    m.memory.set_region(1, HIGH, 0x1000, flags=SlotFlags(flags))
    m.memory.load_rom(HIGH, b"\x77")
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert m.gpr[0] & 0xFF == 0x77
    m.engine.close()


@every_engine
def test_a_claim_that_the_host_cannot_map_changes_nothing(native, pointers, monkeypatch):
    m = Machine(PROGRAM, native=native, pointers=pointers)
    with monkeypatch.context() as patch:
        failing(patch, "uc_mmio_map", 2)
        with pytest.raises(ConfigError, match="ENOMEM"):
            m.engine.claim(HIGH, 8)
    assert m.run() == Hlt(False)
    assert [event[1:] for event in m.seen("read")] == [(HIGH, 1)]
    m.memory.set_region(1, 0x800000, 0x1000)  # the claim is not made up for later
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert len(m.seen("read")) == 2
    m.engine.close()


def resident():
    """Of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_slot_below_the_last_address_costs_no_table_of_what_lies_before():
    m = Machine(PROGRAM)
    m.memory.set_region(1, HIGH, 0x1000)
    before, began = resident(), time.perf_counter()
    m.memory.set_region(2, (1 << 40) - 0x1000, 0x1000)
    assert m.run() == Hlt(False)
    m.memory.set_region(2, 0, 0)
    assert resident() - before < 32 << 20  # one byte a page is 256 MiB
    if m.engine.pointers:
        assert time.perf_counter() - began < 5  # it was fourteen seconds; now a thousandth
    m.engine.close()


@pytest.mark.parametrize(("native", "pointers"), [e for e in ENGINES if e[1]], ids=[i for i in IDS if "pointers" in i])
def test_a_slot_that_goes_leaves_the_guests_page_tables_alone(native, pointers):
    """Its physical address is no linear one: nothing was accessed there."""
    m = Machine(code("f4"), native=native, pointers=pointers)
    m.memory.set_region(1, HIGH, 0x1000)
    assert m.run() == Hlt(False)
    entry = 0x3000 + 8 * (HIGH >> 21)
    assert m.memory.read_u(entry, 8) == HIGH | 0x87
    m.memory.set_region(1, 0, 0)
    assert m.memory.read_u(entry, 8) == HIGH | 0x87  # no Accessed bit
    m.engine.close()


def test_what_was_translated_from_a_slot_goes_with_it():
    m = Machine(code("bb00006000 ffd3 f4"))  # mov ebx, 0x600000; call rbx; hlt
    for value in (1, 2):
        m.memory.set_region(1, HIGH, 0x1000)
        m.memory.load_rom(HIGH, code(f"b0{value:02x} c3"))  # mov al, value; ret
        m.state.rip = CODE
        assert m.run() == Hlt(False)
        assert m.gpr[0] & 0xFF == value
        m.memory.set_region(1, 0, 0)
    m.engine.close()


# ---- the dirty log -------------------------------------------------------------------------------------------------

LOGGED = 0x600000
#: The page tables of :class:`Machine` map this to itself with 2 MiB pages; 0x400000 is made to lead there as well.
ALIAS = 0x400000

native_log = pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")


def dirty(m, slot=1):
    log = m.memory.take_dirty_log(slot)
    return [page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1]


def logging(program, pages=16):
    m = Machine(code(program), native=True)
    assert m.engine.budget.notes_stores
    m.memory.set_region(1, LOGGED, pages * 0x1000, flags=SlotFlags.LOG_DIRTY)
    m.gpr[3] = LOGGED
    return m


def again(m):
    m.state.rip = CODE
    assert m.run() == Hlt(False)


STORES = {
    "mov": "c60300",  # mov byte [rbx], 0
    "after a load": "8a03 8803",  # mov al, [rbx]; mov [rbx], al
    "add": "800300",  # add byte [rbx], 0
    "lock": "f0800300",  # lock add byte [rbx], 0
    "cmpxchg": "f00fb00b",  # lock cmpxchg [rbx], cl: stores what was there
    "cmpxchg16b": "480fc70b",
    "sse": "660f7f03",  # movdqa [rbx], xmm0
    "stos": "89df 31c0 b901000000 f3aa",  # mov edi, ebx; xor eax, eax; mov ecx, 1; rep stosb
    "push": "488d6308 6a00",  # lea rsp, [rbx + 8]; push 0
    "fxsave": "0fae03 0fae03",
}


@native_log
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_a_store_of_what_was_there_is_logged_each_time(store):
    m = logging(store + "f4")
    m.gpr[0] = m.gpr[1] = m.gpr[2] = 0
    for _ in range(3):
        again(m)
        assert dirty(m) == [0]
        assert dirty(m) == []


@native_log
def test_loads_are_not_logged():
    m = logging("8a03 0a8300100000 f4")  # mov al, [rbx]; or al, [rbx + 0x1000]; hlt
    again(m)
    assert dirty(m) == []


@native_log
def test_a_store_across_pages_is_logged_in_both():
    m = logging("488983fc0f0000 f4")  # mov [rbx + 0xffc], rax
    again(m)
    assert dirty(m) == [0, 1]


@native_log
def test_a_store_under_another_name_is_logged():
    m = logging("c60300 c60424 00 f4")  # mov byte [rbx], 0; mov byte [rsp], 0; hlt
    m.memory.write_u(0x3000 + 8 * (ALIAS >> 21), 8, LOGGED | 0x87)
    m.gpr[4] = ALIAS + 0x2000
    for _ in range(2):
        again(m)
        assert dirty(m) == [0, 2]


@native_log
def test_a_log_taken_in_mid_slice_loses_no_store():
    # mov byte [rbx], 0; out 0x10, al; mov byte [rbx], 0; hlt
    m = logging("c60300 e610 c60300 f4")
    taken = []
    m.port.then["out"] = lambda *_: taken.append(dirty(m))
    again(m)
    assert taken == [[0]]
    assert dirty(m) == [0]


@native_log
def test_a_log_that_begins_in_mid_slice_has_what_is_stored_then():
    m = Machine(code("c60300 e610 c60300 f4"), native=True)
    m.memory.set_region(1, LOGGED, 0x4000)
    m.gpr[3] = LOGGED
    m.port.then["out"] = lambda *_: m.memory.set_region(1, LOGGED, 0x4000, flags=SlotFlags.LOG_DIRTY)
    again(m)
    assert dirty(m) == [0]
    m.memory.set_region(1, LOGGED, 0x4000)
    again(m)  # nobody writes to a log that ended: ASan says


@native_log
def test_accessed_and_dirty_bits_that_the_walk_sets_are_logged():
    m = logging("8a042500007000 f4")  # mov al, [0x700000]
    table = LOGGED + 0x3000
    m.memory.write_u(0x3000 + 8 * 3, 8, table | 7)  # 2 MiB at 0x600000 in pages of 4 KiB; A is not set
    for n in range(512):
        m.memory.write_u(table + 8 * n, 8, LOGGED + (n << 12 & 0xF000) | 7)
    assert dirty(m) == [3]
    again(m)
    assert dirty(m) == [3]  # Accessed, of the last entry
    assert m.memory.read_u(table + 8 * 0x100, 8) & 0x60 == 0x20
    again(m)
    assert dirty(m) == []


@native_log
def test_the_hosts_stores_and_the_guests_are_in_one_log():
    m = logging("c60300 f4")
    m.memory.write(LOGGED + 0x5000, b"\0")
    m.memory.load_rom(LOGGED + 0x6000, b"\0")
    again(m)
    assert dirty(m) == [0, 5, 6]


@native_log
def test_a_store_to_a_logged_page_with_code_is_logged_and_seen():
    # call rbx; mov byte [rbx + 1], 2; call rbx; mov byte [rbx + 1], 2; hlt
    m = logging("ffd3 c6430102 ffd3 c6430102 f4")
    m.memory.write(LOGGED, code("b001 c3"))  # mov al, 1; ret
    dirty(m)
    again(m)
    assert m.gpr[0] & 0xFF == 2
    assert dirty(m) == [0]
    again(m)
    assert dirty(m) == [0]


@native_log
def test_a_read_only_slot_logs_no_stores():
    m = Machine(code("c60300 f4"), native=True)
    m.memory.set_region(1, LOGGED, 0x4000, flags=SlotFlags.LOG_DIRTY | SlotFlags.READONLY)
    m.gpr[3] = LOGGED
    again(m)
    assert [event[1:] for event in m.seen("write")] == [(LOGGED, 1, 0)]
    assert dirty(m) == []


@every_engine
def test_stores_that_change_something_are_in_the_log_of_every_engine(native, pointers):
    m = Machine(code("fe03 f4"), native=native, pointers=pointers)  # inc byte [rbx]
    m.memory.set_region(1, LOGGED, 0x4000, flags=SlotFlags.LOG_DIRTY)
    m.gpr[3] = LOGGED + 0x1000
    for _ in range(2):
        again(m)
        assert dirty(m) == [1]
        assert dirty(m) == []
    m.engine.close()
