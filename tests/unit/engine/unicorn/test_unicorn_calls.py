"""Who stands in the way of a call of the core's own does what the core's function does."""

import ctypes
import random

import pytest
from core_machine import DATA, Machine, code

from aiovm.engine.unicorn import calls, lib
from aiovm.engine.unicorn.budget import NATIVE, _TlbTable
from aiovm.engine.unicorn.layout import CPU_TLB, MMU_MODES
from aiovm.exits import BUDGET, Interrupted

NAME = "tlb_reset_dirty_by_vaddr_x86_64"

pytestmark = pytest.mark.skipif(not NATIVE or not calls.slot(NAME), reason="no C hook, or no slot in this library")


def function_at(address):
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)(address)


def bytes_at(address, size):
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


@pytest.fixture
def core():
    """A core's address, and views of its TLB: the tables of its modes, then all victims with what lies between."""
    machine = Machine(code("c6042500000300 09 f4"), native=True)  # mov byte [0x30000], 9; hlt
    machine.run()
    cpu = machine.engine.budget.struct.cpu
    assert machine.memory.read_u(DATA, 1) == 9
    tables = (_TlbTable * MMU_MODES).from_address(cpu + CPU_TLB)
    views = [bytes_at(table.entries, table.mask + 64) for table in tables]
    kept = [bytes(view) for view in views]
    victims = [bytes_at(cpu + CPU_TLB - 0x800 + 0x2B8 * mode, 8 * 64) for mode in range(MMU_MODES)]
    kept += [bytes(view) for view in victims]
    yield cpu, views, victims
    for view, old in zip(views + victims, kept, strict=True):
        view[:] = old
    machine.engine.close()


@pytest.mark.parametrize("seed", range(6))
def test_new_code_is_looked_for_where_it_can_be(core, seed):
    cpu, tables, victims = core
    chance = random.Random(seed)
    start = chance.choice((0x10000, 0x7FFF_F000, 0xFFFF_FFFF_FFFF_F000, 0xFFFF_8000_0040_0000))
    length = chance.choice((0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF))
    near = [start + 0x1000 * page & (1 << 64) - 1 for page in (-1, 0, 1, 2)]

    def fill():
        for table in tables:
            entries = table.cast("Q")
            for at in range(0, len(entries), 8):  # nothing but what is at home there
                entries[at + 1] = (1 << 64) - 1
            for page in near:
                at = 8 * (page >> 12 & len(table) // 64 - 1)
                entries[at + 1] = page | chance.choice((0, 0, 0x400, 0x200, 0x800, 0x40, 0x100))
        for mode in victims:
            for at in range(1, 64, 8):
                mode.cast("Q")[at] = chance.choice(near) | chance.choice((0, 0, 0x400, 0x800, 0x100))

    state = chance.getstate()
    fill()
    before = [bytes(view) for view in tables + victims]
    function_at(lib.internal(NAME))(cpu, start, length)
    theirs = [bytes(view) for view in tables + victims]
    chance.setstate(state)
    fill()
    ours = ctypes.c_uint64.from_address(calls.slot(NAME)).value
    assert ours != lib.internal(NAME)
    function_at(ours)(cpu, start, length)
    assert [bytes(view) for view in tables + victims] == theirs
    assert (theirs != before) is (length > 0)


@pytest.mark.parametrize("pointers", [True, False])
def test_a_block_looks_once_whether_to_leave(pointers):
    """Also in the first block of a core that is opened when another one has shortened its own."""
    machine = Machine(code("ebfe"), native=True)  # jmp to itself
    assert machine.run(100) == BUDGET
    assert ctypes.c_uint64.from_address(calls.slot("tcg_gen_callN_x86_64")).value != lib.internal(
        "tcg_gen_callN_x86_64"
    )
    assert machine.engine.budget.struct.translation
    other = Machine(code("ebfe"), native=True, pointers=pointers)
    assert other.run(100) == BUDGET
    assert bool(other.engine.budget.struct.leave) is pointers
    other.engine.kick()
    assert other.run(200) == Interrupted()
    for core in (machine, other):
        core.engine.close()


def test_what_is_not_called_through_a_slot_has_none():
    assert calls.slot("no_such_function") == 0
    assert calls.slot("uc_open") == 0  # the program's to call
