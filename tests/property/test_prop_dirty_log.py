"""The dirty log against a plain model: which pages of a slot a random program stored to between two takings."""

import struct

import pytest
from core_machine import Machine
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.engine.unicorn import budget
from aiovm.exits import Hlt
from aiovm.memory import SlotFlags

pytestmark = pytest.mark.skipif(not budget.NATIVE, reason="the C hook is not built")

LOGGED, ALIAS, PAGES = 0x600000, 0x400000, 16
#: Opcode before the address, immediate behind it, and how many bytes are stored.
ACCESSES = {
    "mov al, [m]": ("8a", "", 0),
    "mov [m], al": ("88", "", 1),
    "mov [m], rax": ("4889", "", 8),
    "add dword [m], 0": ("83", "00", 4),
}
TAKE = bytes.fromhex("e610")  # out 0x10, al
FLUSH = bytes.fromhex("0f20d9 0f22d9")  # mov rcx, cr3; mov cr3, rcx

access = st.tuples(
    st.sampled_from(sorted(ACCESSES)),
    st.integers(0, PAGES - 1),
    st.sampled_from([0, 8, 0xFF0, 0xFFC, 0xFFE]),
    st.sampled_from([LOGGED, ALIAS]),
)


@given(st.lists(st.one_of(access, st.sampled_from([TAKE, FLUSH])), max_size=50), st.sampled_from([3, 50, 10_000]))
@settings(max_examples=150)
def test_a_log_has_what_was_stored_since_the_last_one_and_no_more(steps, slice_ns):
    program, wanted = b"", [set()]
    for step in steps:
        if isinstance(step, bytes):
            program += step
            if step is TAKE:
                wanted.append(set())
            continue
        name, page, offset, base = step
        opcode, immediate, size = ACCESSES[name]
        modrm = b"\x04\x25" + struct.pack("<I", base + page * 0x1000 + offset)
        program += bytes.fromhex(opcode) + modrm + bytes.fromhex(immediate)
        if size:
            wanted[-1] |= {page, page + (offset + size - 1 >> 12)} - {PAGES}
    machine = Machine(program + b"\xf4", native=True)
    machine.memory.write_u(0x3000 + 8 * (ALIAS >> 21), 8, LOGGED | 0x87)
    machine.memory.set_region(1, LOGGED, PAGES * 0x1000, flags=SlotFlags.LOG_DIRTY)
    machine.memory.set_region(2, LOGGED + PAGES * 0x1000, 0x1000)
    taken = []

    def take(*_):
        log = int.from_bytes(machine.memory.take_dirty_log(1), "little")
        taken.append({page for page in range(PAGES) if log >> page & 1})

    machine.port.then["out"] = take
    while machine.run(machine.cells[0] + slice_ns) != Hlt(False):
        pass
    take()
    machine.engine.close()
    assert taken == wanted
