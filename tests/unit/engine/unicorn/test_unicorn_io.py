"""Ports, strings and device memory: widths, permissions, and leaving right behind an access."""

import pytest
from core_machine import CODE, DATA, MMIO, code, start64

from aiovm.exits import GuestException, Hlt, SystemEvent
from aiovm.memory import SlotFlags

# ---- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "size", "value"),
    [("ee", 1, 0x44), ("66ef", 2, 0x3344), ("ef", 4, 0x1122_3344)],
    ids=["out dx, al", "out dx, ax", "out dx, eax"],
)
def test_out(make, instruction, size, value):
    m = make("baf8030000 b844332211", instruction, "f4")  # mov edx, 0x3f8; mov eax, 0x11223344; out
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0x3F8, size, value)]
    assert m.state.rip == 0x1000B + len(instruction) // 2


@pytest.mark.parametrize(
    ("instruction", "size", "rax"),
    [("ec", 1, 0x9999_9999_1122_33D4), ("66ed", 2, 0x9999_9999_1122_C3D4), ("ed", 4, 0xA1B2_C3D4)],
    ids=["in al, dx", "in ax, dx", "in eax, dx"],
)
def test_in_merges_as_the_width_says(make, instruction, size, rax):
    m = make("ba60000000", instruction, "f4")  # mov edx, 0x60; in
    m.gpr[0] = 0x9999_9999_1122_3344
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("in")] == [(0x60, size)]
    assert m.gpr[0] == rax


def test_immediate_ports(make):
    m = make("b021 e680 e471 f4")  # mov al, 0x21; out 0x80, al; in al, 0x71; hlt
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0x80, 1, 0x21)]
    assert [e[1:] for e in m.seen("in")] == [(0x71, 1)]


def test_string_output_is_one_access_a_time(make):
    m = make("bae9000000 be00000300 b903000000 f36e f4")  # mov edx, 0xe9; mov esi, 0x30000; mov ecx, 3; rep outsb; hlt
    m.memory.write(DATA, b"abc")
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("out")] == [(0xE9, 1, 0x61), (0xE9, 1, 0x62), (0xE9, 1, 0x63)]


def test_string_input(make):
    m = make("ba60000000 bf00000300 b902000000 f36d f4")  # mov edx, 0x60; mov edi, 0x30000; mov ecx, 2; rep insd; hlt
    assert m.run() == Hlt(False)
    assert m.memory.read(DATA, 8) == bytes.fromhex("d4c3b2a1 d4c3b2a1")


@pytest.mark.parametrize(("instruction", "kind"), [("ee", "out"), ("ec", "in")])
def test_a_port_access_that_leaves_stops_exactly_behind_it(make, instruction, kind):
    m = make("baf4000000", instruction, "ffc1 ffc1 f4")  # mov edx, 0xf4; out/in; inc ecx; inc ecx; hlt
    m.state.set_dr(0, 0x1234)
    m.state.set_dr(6, 0xFFFF_0FF0)
    m.state.set_dr(7, 0x400)
    m.port.leave_on[kind] = SystemEvent("debug-exit", 3)
    assert m.run() == SystemEvent("debug-exit", 3)
    assert m.state.rip == 0x10006
    assert m.gpr[1] == 0
    assert m.gpr[0] & 0xFF == (0xD4 if kind == "in" else 0)
    assert [m.state.get_dr(n) for n in (0, 6, 7)] == [0x1234, 0xFFFF_0FF0, 0x400]
    assert m.cells[0] == 11 * 64 // 256 + 600
    assert m.seen("exception") == []
    assert m.run() == Hlt(False)
    assert m.gpr[1] == 2


@pytest.mark.parametrize("instruction", ["ee", "ec", "66ef", "ed"])
def test_ports_of_a_program_without_permission(make, instruction):
    m = make("baf8030000", instruction, "ffc1")  # mov edx, 0x3f8; out/in; inc ecx
    start64(m.context, CODE, cpl=3)
    m.gpr[0] = 0x1122_3344_5566_7788
    assert m.run() == GuestException(13, 0, 0)
    assert m.state.rip == 0x10005
    assert (m.gpr[0], m.gpr[1]) == (0x1122_3344_5566_7788, 0)
    assert m.seen("in") == m.seen("out") == []
    assert [m.state.get_dr(n) for n in (0, 7)] == [0, 0x400]


def test_ports_of_a_program_with_permission(make):
    m = make("baf8030000 ee ffc1 cc")
    start64(m.context, CODE, cpl=3)
    m.port.permitted = (0x3F8,)
    assert m.run() == GuestException(3)
    assert [e[1:] for e in m.seen("permission")] == [(0x3F8, 1)]
    assert len(m.seen("out")) == 1
    assert m.gpr[1] == 1


def test_string_output_that_leaves_goes_on_where_it_was(make):
    m = make("bae9000000 be00000300 b903000000 f36e f4")
    m.memory.write(DATA, b"abc")
    m.port.leave_on["out"] = SystemEvent("x")
    left = []
    while (exit_ := m.run()) == SystemEvent("x"):
        left.append((m.gpr[1], m.gpr[6]))
    assert exit_ == Hlt(False)
    assert left[:2] == [(2, DATA + 1), (1, DATA + 2)]
    assert [e[3] for e in m.seen("out")] == [0x61, 0x62, 0x63]


# ---- MMIO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "rax", "accesses"),
    [
        ("8a042500000030", 0x9999_9999_9999_9911, [(MMIO, 1)]),  # mov al, [MMIO]
        ("668b042500000030", 0x9999_9999_9999_2211, [(MMIO, 2)]),
        ("8b042500000030", 0x4433_2211, [(MMIO, 4)]),
        ("488b042500000030", 0x8877_6655_4433_2211, [(MMIO, 4), (MMIO + 4, 4)]),
        ("0fb6042503000030", 0x44, [(MMIO + 3, 1)]),  # movzx eax, byte [MMIO + 3]
    ],
)
def test_mmio_reads(make, instruction, rax, accesses):
    m = make(instruction, "f4")
    m.gpr[0] = 0x9999_9999_9999_9999
    assert m.run() == Hlt(False)
    assert m.gpr[0] == rax
    assert [e[1:] for e in m.seen("read")] == accesses
    assert m.state.rip == CODE + len(code(instruction)) + 1


@pytest.mark.parametrize(
    ("instruction", "accesses"),
    [
        ("88042500000030", [(MMIO, 1, 0x88)]),
        ("6689042500000030", [(MMIO, 2, 0x7788)]),
        ("89042500000030", [(MMIO, 4, 0x5566_7788)]),
        ("4889042500000030", [(MMIO, 4, 0x5566_7788), (MMIO + 4, 4, 0x1122_3344)]),
    ],
)
def test_mmio_writes(make, instruction, accesses):
    m = make(instruction, "f4")
    m.gpr[0] = 0x1122_3344_5566_7788
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == accesses


def test_mmio_that_leaves_ends_the_slice_at_the_next_block(make):
    m = make("89042500000030 eb00 ffc1 f4")  # mov [MMIO], eax; jmp +0; inc ecx; hlt
    m.port.leave_on["write"] = SystemEvent("reset")
    assert m.run() == SystemEvent("reset")
    assert m.state.rip == 0x10009
    assert m.gpr[1] == 0
    assert m.run() == Hlt(False)
    assert m.gpr[1] == 1


def test_after_an_exit_from_mmio_a_debug_exception_is_the_guests(make):
    m = make("89042500000030 eb00 90 90 f4")
    m.port.leave_on["write"] = SystemEvent("reset")
    assert m.run() == SystemEvent("reset")
    m.state.rflags = 0x102  # TF: single step
    exit_ = m.run()
    assert exit_.vector == 1
    assert m.seen("exception")[0][0] == 0x1000A


def test_a_store_to_read_only_memory_is_mmio(make):
    m = make("c704250000400078563412 8b042500004000 f4")  # mov dword [0x400000], 0x12345678; mov eax, [0x400000]; hlt
    m.memory.set_region(1, 0x40_0000, 0x1000, flags=SlotFlags.READONLY)
    m.memory.load_rom(0x40_0000, b"\x99\0\0\0")
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == [(0x40_0000, 4, 0x1234_5678)]
    assert m.gpr[0] == 0x99
    assert m.memory.read_u(0x40_0000, 4) == 0x99


def test_an_unaligned_store_to_read_only_memory_comes_byte_by_byte(make):
    m = make("66c70425010040003412 f4")  # mov word [0x400001], 0x1234; hlt
    m.memory.set_region(1, 0x40_0000, 0x1000, flags=SlotFlags.READONLY)
    assert m.run() == Hlt(False)
    assert [e[1:] for e in m.seen("write")] == [(0x40_0001, 1, 0x34), (0x40_0002, 1, 0x12)]
    assert m.memory.read(0x40_0000, 4) == bytes(4)


def test_memory_may_come_and_go(make):
    m = make("8b042500004000 f4")  # mov eax, [0x400000]; hlt
    assert m.run() == Hlt(False)
    assert len(m.seen("read")) == 1
    m.memory.set_region(1, 0x40_0000, 0x1000)
    m.memory.write_u(0x40_0000, 4, 0xCAFE)
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert m.gpr[0] == 0xCAFE
    m.memory.set_region(1, 0, 0)
    m.state.rip = CODE
    assert m.run() == Hlt(False)
    assert len(m.seen("read")) == 2
