"""The core follows the memory map: wholly or not at all, at the cost of what changes."""

import time
from pathlib import Path

import pytest
from core_machine import CODE, DATA, ENGINES, IDS, MMIO, Machine, code, every_engine

from aiovm.engine.unicorn import lib
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
