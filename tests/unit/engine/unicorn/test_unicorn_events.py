"""Exceptions, software interrupts, IRET and system calls."""

import pytest
from core_machine import CODE, DATA, MMIO, NOWHERE, STACK, code, start64

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.events import EventKind
from aiovm.exits import BUDGET, GuestException, Hlt, Interrupted
from aiovm.interrupt_return import interrupt_return

# ---- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "cpl", "error"),
    [
        ("a1 0000004000000000", 0, 0),  # mov eax, [0x40000000]
        ("a3 0000004000000000", 0, 2),  # mov [0x40000000], eax
        ("a1 0000004000000000", 3, 4),
        ("a3 0000004000000000", 3, 6),
    ],
)
def test_a_page_fault_brings_address_and_error_code(make, instruction, cpl, error):
    m = make(instruction)
    start64(m.context, CODE, cpl=cpl)
    m.state.cr2 = 0x5555
    assert m.run() == GuestException(14, error, NOWHERE)
    assert m.state.rip == CODE
    assert m.state.cr2 == 0x5555  # storing CR2 is the port's business
    assert m.state.cpl == cpl


def test_a_page_fault_at_a_fetch(make):
    m = make("b800000040 ffe0")  # mov eax, 0x40000000; jmp rax
    assert m.run() == GuestException(14, 0x10, NOWHERE)
    assert m.state.rip == NOWHERE


def test_reserved_bits_in_a_page_table_entry(make):
    m = make("a1 0000200000000000")  # mov eax, [0x200000]
    m.memory.write_u(0x3008, 8, 1 << 45 | 0x87)
    assert m.run() == GuestException(14, 9, 0x20_0000)


def test_a_page_that_is_paged_in_is_read_after_all(make):
    m = make("a1 0000004000000000 f4")
    m.memory.write_u(DATA, 4, 0xBEEF)
    m.memory.write_u(0x4000, 8, DATA & ~0x1F_FFFF | 0x87)

    def page_in(*_):
        m.memory.write_u(0x2008, 8, 0x4007)
        m.state.gpr[3] += 1

    m.port.then["exception"] = page_in
    assert m.run() == Hlt(False)
    assert m.gpr[3] == 1
    assert m.gpr[0] == m.memory.read_u(0, 4)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("0f0b", GuestException(6)),  # ud2
        ("f7f1", GuestException(0)),  # div ecx, 0
        ("b834120000 8ed8", GuestException(13, 0x1234)),  # mov eax, 0x1234; mov ds, ax
        ("48b80000000000000080 8b00", GuestException(13, 0)),  # mov rax, 1 << 63; mov eax, [rax]
        ("0faa", GuestException(6)),  # rsm
        ("0f33", GuestException(13, 0)),  # rdpmc
        ("fb 0f01c8", GuestException(6)),  # sti; monitor
    ],
)
def test_exceptions(make, instruction, expected):
    m = make(instruction)
    exit_ = m.run()
    assert exit_ == expected


def test_user_mode_may_not(make):
    for instruction in ("f4", "0f20c0", "0f30", "fa", "0f01f8", "0f33"):  # hlt; mov rax, cr0; wrmsr; cli; swapgs; rdpmc
        m = make(instruction)
        start64(m.context, CODE, cpl=3)
        assert m.run() == GuestException(13, 0)
        assert m.state.rip == CODE


def test_successive_page_faults_are_not_double_faults(make):
    m = make("a1 0000004000000000")
    for _ in range(5):
        assert m.run() == GuestException(14, 0, NOWHERE)


def test_code_outside_memory_is_no_instruction(make):
    m = make("b800000030 ffe0")  # mov eax, MMIO; jmp rax
    assert m.run() == GuestException(6, None, 0)
    assert m.state.rip == MMIO
    m.state.rip = CODE + 5
    m.gpr[0] = CODE + 5
    assert m.run(m.cells[0] + 100) is BUDGET  # and the engine is as good as new


@pytest.mark.parametrize(
    ("instruction", "vector", "length", "kind"),
    [
        ("cd80", 0x80, 2, EventKind.SOFT_INT),
        ("cc", 3, 1, EventKind.SOFT_EXC),
        ("cd03", 3, 2, EventKind.SOFT_INT),
        ("cd0e", 14, 2, EventKind.SOFT_INT),
        ("66cd80", 0x80, 3, EventKind.SOFT_INT),
        ("f1", 1, 1, EventKind.ICEBP),
    ],
)
def test_software_interrupts(make, instruction, vector, length, kind):
    m = make("90", instruction)
    assert m.run() == GuestException(vector)
    assert m.seen("int") == [(0x10001, vector, length, kind)]


def test_into(make):
    m = make("ce f4")  # into, in 32-bit code
    m.context.reset(init=False)
    m.state.cr0 = 0x11
    for which, flags in ((Seg.CS, 0xCF_9B00), (Seg.DS, 0xCF_9300), (Seg.SS, 0xCF_9300)):
        m.state.set_segment(which, Segment(8, 0, 0xFFFF_FFFF, flags))
    m.state.rip = CODE
    m.state.rflags = 0x802  # OF
    assert m.run() == GuestException(4)
    assert m.seen("int") == [(0x10000, 4, 1, EventKind.SOFT_EXC)]


# ---- IRET ------------------------------------------------------------------------------------------------------------


def returning(make, *parts, words=None):
    """A machine that intercepts IRET, does it in Python, and has a frame (RIP, CS, RFLAGS, RSP, SS) on its stack."""
    m = make(*parts)
    m.memory.write_u(DATA + 8, 8, 0x00AF_9B00_0000_FFFF)
    m.memory.write_u(DATA + 0x10, 8, 0x00CF_9300_0000_FFFF)
    m.state.gdt = DescriptorTable(DATA, 0x17)
    for at, word in enumerate(words or (CODE + 2, 8, 0x46, STACK + 0x100, 0x10)):
        m.memory.write_u(STACK + 8 * at, 8, word)
    m.state.iret_intercepted = True

    def on_interrupt_return(width):
        m.port.note("iret", width)
        assert interrupt_return(m.state, m.memory, width) is None
        return True

    m.port.on_interrupt_return = on_interrupt_return
    return m


@pytest.mark.parametrize(("code", "stack"), [(0x00AF_9B00, 0x10), (0x00AF_FB00, 0x13)])
def test_an_iret_that_loses_no_base_is_the_cores_where_c_can_tell(make, code, stack):
    level = stack & 3
    m = returning(make, "48cf 90 0fa2 f4", words=(CODE + 2, 8 | level, 0x46, STACK + 0x100, stack))  # ...; cpuid
    m.memory.write_u(DATA + 8, 8, code << 32 | 0xFFFF)
    m.memory.write_u(DATA + 0x10, 8, (0x00CF_9300 | level << 13) << 32 | 0xFFFF)
    m.port.leave_on["cpuid"] = Interrupted()
    assert m.run() == Interrupted()
    assert (m.gpr[4], m.state.rflags, m.state.cpl) == (STACK + 0x100, 0x46, level)
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])


def test_an_iret_and_what_follows_are_charged_once(make):
    m = returning(make, "48cf f4")  # iretq; hlt
    assert m.run() == Hlt(False)
    assert (m.state.rip, m.gpr[4], m.state.rflags) == (CODE + 3, STACK + 0x100, 0x46)
    assert m.cells[0] == 600  # three bytes of code: no whole nanosecond
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])
    assert m.state.iret_intercepted


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("48cf", (CODE + 2, 0xB, 0x46, STACK + 0x100, 0x13)),  # to CPL 3, with a GS of CPL 0
        ("48cf", (CODE + 2, 8, 0x46, STACK + 0x100, 0)),  # another stack segment
        ("4048cf", (CODE + 3, 8, 0x46, STACK + 0x100, 0x10)),  # a prefix more
        ("48cf", (CODE + 2, 8, 0x146, STACK + 0x100, 0x10)),  # into a single step
    ],
)
def test_other_irets_are_pythons(make, instruction, words):
    m = returning(make, instruction, "90 f4", words=words)
    m.state.set_segment(Seg.GS, Segment(0x10, 0x1234_0000, 0xFFFF_FFFF, 0xC0_9300))
    for at, entry in ((8, 0x00AF_9B00_0000_FFFF), (0x10, 0x00CF_9300_0000_FFFF)):
        m.memory.write_u(DATA + at, 8, entry | (words[1] & 3) << 45)
    m.run()
    assert m.state.cpl == words[1] & 3
    assert m.state.selector(Seg.SS) == words[4]
    if words[2] == 0x46:
        assert m.seen("iret") == [(CODE, 8)]
    else:  # whosever it is
        assert m.seen("exception") == [(CODE + 3, 1, None, 0)]


def test_an_interrupt_that_waits_is_taken_behind_the_iret_that_sets_if(make):
    m = returning(make, "48cf 90 f4", words=(CODE + 2, 8, 0x246, STACK + 0x100, 0x10))
    m.context.request_irq_window(True)
    assert m.run() == Hlt(True)
    assert m.seen("iret") == ([] if m.engine.native and m.engine.pointers else [(CODE, 8)])
    if m.engine.pointers:
        assert m.seen("window") == [(CODE + 2, 0x200, False)]


@pytest.mark.parametrize("at", [MMIO, MMIO + 0xFF0])
def test_nobody_looks_at_a_device_for_an_iret(make, at):
    m = returning(make, "48cf f4")
    m.gpr[4] = at
    m.port.on_interrupt_return = lambda width: m.engine.leave(GuestException(13, 0)) or False
    assert m.run() == GuestException(13, 0)
    assert m.seen("read") == []
    assert m.cells[0] == 0


def test_irets_without_end_take_time(make):
    m = returning(make, "48cf", words=(CODE, 8, 2, STACK, 0x10))  # to itself, with its own frame
    assert m.run(1000) is BUDGET
    assert m.cells[0] == 1000
    assert m.state.rip == CODE
    assert m.state.iret_intercepted


def test_an_iret_is_stepped_over(make):
    m = returning(make, "48cf 90 f4")
    m.context.stepping = True
    m.port.leave_on["stepped"] = Interrupted()
    assert m.run() == Interrupted()
    assert m.state.rip == CODE + 2
    m.context.stepping = False
    assert m.run() == Hlt(False)


# ---- system calls ----------------------------------------------------------------------------------------------------


def system_calls(m):
    m.context.msr_writer(0xC000_0081)(0x0023_0010 << 32)  # STAR: kernel 0x10, user 0x23
    m.context.msr_writer(0xC000_0082)(0x11000)  # LSTAR
    m.context.msr_writer(0xC000_0084)(0x4_7700)  # FMASK: TF, IF, DF, NT, AC, ...
    m.context.msr_writer(0x174)(0x10)
    m.context.msr_writer(0x175)(0x18000)
    m.context.msr_writer(0x176)(0x11000)


def test_syscall_enters_the_kernel(make):
    m = make("0f05")
    m.memory.write(0x11000, code("f4"))
    start64(m.context, CODE, cpl=3)
    system_calls(m)
    m.state.rflags = 0x646  # DF, IF, ZF, PF
    assert m.run() == Hlt(False)
    assert m.state.rip == 0x11001
    assert (m.gpr[1], m.gpr[11]) == (0x10002, 0x646)
    assert m.state.rflags == 0x46
    assert m.state.cpl == 0
    assert m.state.segment(Seg.CS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xA0_9B00)
    assert m.state.segment(Seg.SS) == Segment(0x18, 0, 0xFFFF_FFFF, 0xC0_9300)
    assert m.gpr[4] == STACK


def test_a_segments_flags_are_the_descriptors_and_no_part_of_its_limit(make):
    m = make("8ed8 f4")  # mov ds, eax; hlt
    m.memory.write_u(DATA + 8, 8, 0x00DF_9300_0000_FFFF)
    m.state.gdt = DescriptorTable(DATA, 0xF)
    m.gpr[0] = 8
    assert m.run() == Hlt(False)
    assert m.state.segment(Seg.DS) == Segment(8, 0, 0xFFFF_FFFF, 0xD0_9300)
    assert m.state.selector(Seg.DS) == 8


def test_sysret_returns(make):
    m = make("0f05 cc")  # syscall; int3
    m.memory.write(0x11000, code("480f07"))  # sysretq
    start64(m.context, CODE, cpl=3)
    system_calls(m)
    m.state.rflags = 0x246
    assert m.run() == GuestException(3)
    assert m.state.rip == 0x10002
    assert m.state.cpl == 3
    assert m.state.rflags & 0x200
    assert (m.state.segment(Seg.CS).selector, m.state.segment(Seg.SS).selector) == (0x33, 0x2B)


def test_syscall_is_undefined_when_it_is_turned_off(make):
    m = make("0f05")
    system_calls(m)
    m.state.efer = 0xD00
    assert m.run() == GuestException(6)
    assert m.state.rip == CODE
    assert m.gpr[1] == 0


def test_syscall_is_undefined_outside_64_bit_code(make):
    m = make("0f05")
    system_calls(m)
    m.state.set_segment(Seg.CS, Segment(8, 0, 0xFFFF_FFFF, 0xCF_9B00))
    assert m.run() == GuestException(6)
    assert m.state.rip == CODE


@pytest.mark.parametrize("long", [True, False])
def test_sysenter(make, long):
    m = make("0f34")
    m.memory.write(0x11000, code("f4"))
    if long:
        start64(m.context, CODE, cpl=3)
    else:
        m.context.reset(init=False)
        m.state.cr0 = 0x11
        m.state.set_segment(Seg.CS, Segment(0x1B, 0, 0xFFFF_FFFF, 0xCF_FB00))
        m.state.set_segment(Seg.SS, Segment(0x23, 0, 0xFFFF_FFFF, 0xCF_F300))
        m.state.rip = CODE
    system_calls(m)
    m.state.rflags = 0x202
    assert m.run() == Hlt(False)
    assert (m.state.rip, m.gpr[4], m.state.cpl) == (0x11001, 0x18000, 0)
    assert m.state.segment(Seg.CS) == Segment(0x10, 0, 0xFFFF_FFFF, 0xA0_9B00 if long else 0xC0_9B00)
    assert m.state.segment(Seg.SS).selector == 0x18
    assert m.state.rflags == 2


def test_sysenter_without_a_kernel_segment_faults(make):
    m = make("0f34")
    assert m.run() == GuestException(13, 0)
    assert m.state.rip == CODE
