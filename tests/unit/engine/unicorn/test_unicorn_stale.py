"""Code and page tables that change: nothing that was translated before is executed after."""

import ctypes

import pytest
from core_machine import (
    CODE,
    DATA,
    Machine,
    code,
)

from aiovm.engine.unicorn import budget
from aiovm.engine.unicorn import lib as unicorn_lib
from aiovm.exits import BUDGET, Hlt
from aiovm.memory import GuestPtr


@pytest.mark.parametrize("how", ["write", "pointer", "rom", "integer"])
def test_code_that_the_host_changes_is_seen(make, how):
    m = make("b801000000 f4")  # mov eax, 1; hlt
    assert m.run() == Hlt(False)
    for value in (2, 3):
        patch = bytes([value])
        if how == "write":
            m.memory.write(CODE + 1, patch)
        elif how == "pointer":
            assert GuestPtr(m.memory, CODE, 16).write(1, patch)
        elif how == "rom":
            m.memory.load_rom(CODE + 1, patch)
        else:
            m.memory.write_u(CODE + 1, 4, value)
        m.state.rip = CODE
        assert m.run() == Hlt(False)
        assert m.gpr[0] == value


def test_code_that_a_device_stores_in_mid_slice_is_seen_by_the_next_block(make):
    # mov ebx, 0x30000; call rbx; out 0x10, al; call rbx; mov esi, eax; out 0x11, al; hlt
    m = make("bb00000300 ffd3 e610 ffd3 89c6 e611 f4")
    m.memory.write(DATA, code("b801000000 c3"))  # mov eax, 1; ret
    m.port.then["out"] = lambda port, *_: m.memory.write(DATA + 1, b"\x02") if port == 0x10 else None
    slices = [m.run(), m.run()]
    assert slices == [BUDGET, Hlt(False)]  # nobody waits for the first one's end
    assert m.gpr[6] == 2


def test_the_second_page_of_a_block_is_watched_too(make):
    m = make("90" * 0x20, "b801000000 f4", at=0x10FF0)  # the mov lies behind the page's end
    assert m.run() == Hlt(False)
    m.memory.write(0x11011, b"\x07")
    m.state.rip = 0x10FF0
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 7


def test_code_that_the_guest_changes_is_seen(make):
    m = make("b801000000 c6042501000100 09 48ffce 75ee f4")  # mov eax, 1; mov byte [0x10001], 9; dec rsi; jnz; hlt
    m.gpr[6] = 2
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 9


def test_stores_to_data_throw_no_translations_away(make, monkeypatch):
    m = make("ffc0 ebfc")  # inc eax; jmp back
    m.run(100)
    flushes = []
    real = unicorn_lib.uc_ctl_0
    monkeypatch.setattr(unicorn_lib, "uc_ctl_0", lambda uc, what: flushes.append(what) or real(uc, what))
    m.memory.write(DATA, bytes(5_000))
    m.run(200)
    assert unicorn_lib.CTL_TB_FLUSH not in flushes
    m.memory.write(CODE + 0x800, b"\0")
    m.run(300)
    assert flushes.count(unicorn_lib.CTL_TB_FLUSH) == 1


@pytest.mark.parametrize("reload", ["", "0f20d9 0f22d9"], ids=["", "cr3"])  # mov rcx, cr3; mov cr3, rcx
@pytest.mark.parametrize("page", ["0300", "4300"], ids=["same", "alias"])  # 0x30000, and the same page at 0x430000
def test_code_in_a_page_that_was_data_first_is_watched_under_each_of_its_names(make, page, reload):
    m = make(
        f"c60425 0100{page} 05",  # mov byte [page + 1], 5
        "bb00000300 bd00010300 ffd3 ffd5",  # mov ebx, 0x30000; mov ebp, 0x30100; call rbx; call rbp
        reload,
        f"c60425 0100{page} 06 c60425 0101{page} 07",  # mov byte [page + 1], 6; mov byte [page + 0x101], 7
        "ffd3 ffd5 f4",  # call rbx; call rbp; hlt
    )
    m.memory.write_u(0x3010, 8, 0x87)  # 0x400000 is physical 0
    m.memory.write(DATA, code("b001 c3"))  # mov al, 1; ret
    m.memory.write(DATA + 0x100, code("b201 c3"))  # mov dl, 1; ret
    assert m.run() == Hlt(False)
    assert (m.gpr[0] & 0xFF, m.gpr[2] & 0xFF) == (6, 7)


def write_address(machine, address):
    """What the core's TLB holds for stores to a page: the address, with low bits that send them through slow code."""
    tables = (ctypes.c_uint64 * 6).from_address(machine.engine.budget.struct.tlb)
    supervisor = 2
    mask, entries = tables[2 * supervisor], tables[2 * supervisor + 1]
    return ctypes.c_uint64.from_address(entries + (address >> 6 & mask) + 8).value


@pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")
def test_stores_to_executable_pages_without_code_run_free():
    m = Machine(code("c6042500000300 09 c6042510000300 09 c6042500010100 09 f4"), native=True)
    assert m.run() == Hlt(False)  # mov byte [0x30000], 9; mov byte [0x30010], 9; mov byte [0x10100], 9; hlt
    assert write_address(m, DATA) == DATA
    assert write_address(m, CODE) & 0xFFF
    m.engine.close()


@pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")
@pytest.mark.parametrize(("name", "value"), [("CLASS_TLB_FILL", 0x50), ("TLB_CODE", 32)])
def test_a_tlb_that_lies_elsewhere_is_left_alone(monkeypatch, name, value):
    monkeypatch.setattr(budget, name, value)
    m = Machine(code("c6042500000300 09 f4"), native=True)
    assert not m.engine.budget.struct.cpu
    assert m.run() == Hlt(False)
    assert m.memory.read_u(DATA, 1) == 9
