"""The C hook's delivery is Python's: the same registers, the same bytes of memory, or nothing at all."""

import pytest
from fake_cpu import (
    CODE0,
    CODE64,
    CODE64_3,
    ENTRIES,
    GDT,
    IDT,
    LDT_SEL,
    TSS,
    descriptor,
    gate64,
    long_mode,
    new_memory,
    put_entry,
    put_gate,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.clock import new_cells
from aiovm.costs import Costs
from aiovm.delivery import deliver
from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.engine.unicorn.budget import NATIVE
from aiovm.engine.unicorn.engine import UnicornEngine
from aiovm.engine.unicorn.proof import layout_holds
from aiovm.events import EventKind
from aiovm.memory import SlotFlags

pytestmark = pytest.mark.skipif(not NATIVE or not layout_holds(), reason="there is the Python twin only")

VECTOR = 14
PTES = 0x1_3000
CONFORMING64 = 0x68  # of the GDT, which fake_cpu leaves empty there
OTHER_SLOT = 0x10_0000


class Machine:
    """A core whose memory and registers are those of a fake CPU."""

    def __init__(self):
        self.memory = new_memory()
        self.engine = UnicornEngine(self.memory, new_cells(), costs=Costs(), native=True, pointers=True)
        self.context = self.engine.create_context(0, port=None)
        self.engine.budget.forget_code()

    def load(self, cpu, content):
        """The registers of ``cpu``, and memory as ``content``."""
        for slot, data in zip(self.memory.map.slots, content, strict=True):
            slot.bytes_[:] = data
        self.context.reset(init=False)
        state = self.context.state
        state.cr0, state.cr3, state.cr4, state.efer, state.cr2 = cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, cpu.cr2
        state.pkru = cpu.pkru
        state.gdt, state.idt = cpu.gdt, cpu.idt
        for which, value in cpu.segments.items():
            state.set_segment(which, value)
        for register in range(16):
            state.gpr[register] = cpu.gpr[register]
        state.rip, state.rflags, state.cpl = cpu.rip, cpu.rflags, cpu.cpl
        state.interrupt_shadow = cpu.interrupt_shadow

    @property
    def content(self):
        return [bytes(slot.bytes_) for slot in self.memory.map.slots]

    @property
    def registers(self):
        """Every byte of the core's, and what the state remembers to do before the core runs."""
        self.engine.unload()
        return bytes(self.context.buffer), self.context.state.flags_changed

    def both(self, cpu, event):
        """Deliver in C and in Python; whether C did it. Compares."""
        kind = event[1]
        before = self.content
        self.load(cpu, before)
        untouched = self.registers
        delivered = self.context.deliver(*event)
        in_c = self.registers, self.content
        if not delivered:
            assert in_c == (untouched, before)
        self.load(cpu, before)
        outcome = deliver(self.context.state, self.memory, event[0], kind, *event[2:])
        if delivered:
            assert outcome is None
            assert (self.registers, self.content) == in_c
        return delivered


@pytest.fixture(scope="module")
def shared():
    machine = Machine()
    yield machine
    machine.engine.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.engine.close()


def fault(error_code=2):
    return VECTOR, EventKind.EXCEPTION, error_code, None


def prepare(memory, cpl=0, *, gate=None):
    """A kernel with a handler of :data:`VECTOR` at 0x6000, and stacks in its TSS."""
    cpu = long_mode(memory, cpl)
    put_entry(memory, CONFORMING64, descriptor(0, 0xFFFFF, 0x9F, 0xA))
    put_gate(memory, VECTOR, gate64(CODE64, 0x6000) if gate is None else gate, 16)
    memory.write_u(TSS + 4, 8, 0xB008)  # RSP0
    memory.write_u(TSS + 28 + 8 * 3, 8, 0xC000)  # IST3
    return cpu


# ---- the straight path is taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        (14, EventKind.EXCEPTION, 0xFFFF_FFFF, None),
        (14, EventKind.EXCEPTION, None, None),
        (14, EventKind.EXTERNAL, None, None),
        (14, EventKind.NMI, None, None),
        (14, EventKind.SOFT_INT, None, 0x1234_5678_9ABC),
        (14, EventKind.ICEBP, None, 0xFFFF_FFFF_FFFF_FFFF),
        (14, EventKind.SOFT_EXC, None, 0x102),
    ],
    ids=lambda event: event[1].name,
)
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("ist", [0, 3])
@pytest.mark.parametrize("type_", [0xE, 0xF], ids=["interrupt", "trap"])
def test_what_happens_all_the_time(shared, event, cpl, ist, type_):
    shared.memory.write(0, new_memory().read(0, 0x4_0000))
    cpu = prepare(shared.memory, cpl, gate=gate64(CODE64, 0xFFFF_8000_0000_6000, type_, ist=ist, dpl=3))
    cpu.rflags = 0x3_6AD7 & ~0x2_0000 | 0x25_0000  # every flag but VM
    cpu.interrupt_shadow = True
    assert shared.both(cpu, event)


@pytest.mark.parametrize("vector", [0, 3, 4, 8, 18, 32, 255])
def test_every_vector_but_one(shared, vector):
    shared.memory.write(0, new_memory().read(0, 0x4_0000))
    cpu = prepare(shared.memory)
    put_gate(shared.memory, vector, gate64(CODE64, 0x6000), 16)
    assert shared.both(cpu, (vector, EventKind.EXCEPTION, None, None))


def test_out_of_compatibility_mode(machine):
    cpu = prepare(machine.memory, 3)
    cpu.set_segment(Seg.CS, Segment(0x23, 0, 0xFFFF_FFFF, 0xCF_FB00))
    cpu.set_segment(Seg.DS, Segment(0x2B, 0x1000, 0xFFFF_FFFF, 0xCF_F300))
    assert machine.both(cpu, fault())


def test_a_conforming_handler_keeps_the_level(machine):
    assert machine.both(prepare(machine.memory, 3, gate=gate64(CONFORMING64, 0x6000)), fault())
    assert machine.context.state.cpl == 3


def test_a_stack_on_a_large_page(machine):
    cpu = prepare(machine.memory)
    machine.memory.write_u(0x1_2008, 8, 0xE3)  # 2M: 0x200000 leads to 0
    cpu.gpr[4] = 0x20_9000
    assert machine.both(cpu, fault())


def test_a_stack_in_another_slot(machine):
    machine.memory.set_region(1, OTHER_SLOT, 0x1000)
    machine.engine.budget.forget_code()
    cpu = prepare(machine.memory)
    machine.memory.write_u(PTES + 8 * 8, 8, OTHER_SLOT | 0x67)
    assert machine.both(cpu, fault())
    assert machine.memory.read_u(OTHER_SLOT + 0xFF8, 8) == 0x10  # SS


# ---- and left where something is to be judged, or a store is more than a store --------------------------------------


REFUSED = []


def refused(what):
    """``what`` changes memory or the CPU so that the straight path does not decide."""
    REFUSED.append(what)
    return what


@refused
def idt_too_short(memory, cpu):
    cpu.idt = DescriptorTable(IDT, VECTOR * 16 + 14)


@refused
def idt_not_canonical(memory, cpu):
    cpu.idt = DescriptorTable(IDT | 1 << 47, 0xFFF)


@refused
def gate_absent(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64, 0x6000, present=0), 16)


@refused
def task_gate(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64, 0x6000, 5), 16)


@refused
def handler_not_canonical(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64, 0x8000_0000_0000), 16)


@refused
def null_code(memory, cpu):
    put_gate(memory, VECTOR, gate64(3, 0x6000), 16)


@refused
def code_of_the_ldt(memory, cpu):
    cpu.set_segment(Seg.LDTR, Segment(LDT_SEL, GDT, 0xFF, 0x8200))
    put_gate(memory, VECTOR, gate64(CODE64 | 4, 0x6000), 16)


@refused
def code_behind_the_gdt(memory, cpu):
    cpu.gdt = DescriptorTable(GDT, CODE64 + 6)


@refused
def code_of_32_bits(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE0, 0x6000), 16)


@refused
def code_not_accessed(memory, cpu):
    put_entry(memory, CODE64, descriptor(0, 0xFFFFF, 0x9A, 0xA))


@refused
def code_of_users(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64_3, 0x6000), 16)


@refused
def task_state_too_short(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64, 0x6000, ist=3), 16)
    cpu.set_segment(Seg.TR, Segment(0x28, TSS, 28 + 8 * 3 + 6, 0x8B00))


@refused
def task_state_over_two_pages(memory, cpu):
    put_gate(memory, VECTOR, gate64(CODE64, 0x6000, ist=3), 16)
    memory.write(0x4FC8 + 28 + 8 * 3, (0xC000).to_bytes(8, "little"))
    cpu.set_segment(Seg.TR, Segment(0x28, 0x4FC8, 0x67, 0x8B00))


@refused
def stack_over_two_pages(memory, cpu):
    cpu.gpr[4] = 0x9010


@refused
def stack_not_canonical(memory, cpu):
    cpu.gpr[4] = 0xFFFF_8000_0000_0000


@refused
def stack_absent(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0)


@refused
def stack_read_only(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0x8065)


@refused
def stack_not_dirty(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0x8027)


@refused
def stack_not_accessed(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0x8047)


@refused
def tables_not_accessed(memory, cpu):
    memory.write_u(0x1_2000, 8, 0x1_3047)


@refused
def stack_with_a_reserved_bit(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0x8067 | 1 << 40)


@refused
def nx_without_nxe(memory, cpu):
    cpu.efer &= ~0x800
    memory.write_u(PTES + 8 * 8, 8, 0x8067 | 1 << 63)


@refused
def users_stack_with_smap(memory, cpu):
    cpu.cr4 |= 1 << 21


def keys(pkru):
    """CR4.PKE, and the stack is a user's page with key 5."""

    def prepare(memory, cpu):
        cpu.cr4 |= 1 << 22
        cpu.pkru = pkru
        memory.write_u(PTES + 8 * 8, 8, 0x8067 | 5 << 59)

    return prepare


@refused
def users_stack_without_access(memory, cpu):
    keys(1 << 10)(memory, cpu)


@refused
def users_stack_without_writing(memory, cpu):
    keys(2 << 10)(memory, cpu)


@refused
def stack_where_nobody_is(memory, cpu):
    memory.write_u(PTES + 8 * 8, 8, 0x1000_0067)


@refused
def virtual_8086(memory, cpu):
    cpu.rflags |= 0x2_0000


@refused
def protected_mode(memory, cpu):
    cpu.efer = 0


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: what.__name__)
def test_what_python_must_decide(machine, what):
    cpu = prepare(machine.memory)
    what(machine.memory, cpu)
    assert not machine.both(cpu, fault())


def test_a_key_that_forbids_nothing(machine):
    cpu = prepare(machine.memory)
    keys(0xFFFF_FFFF & ~(3 << 10 | 3))(machine.memory, cpu)
    assert machine.both(cpu, fault())


def test_a_gate_that_int_may_not_use(machine):
    cpu = prepare(machine.memory, 3)
    assert not machine.both(cpu, (VECTOR, EventKind.SOFT_INT, None, None))
    assert machine.both(cpu, fault())


def test_a_debug_exception(machine):
    cpu = prepare(machine.memory)
    put_gate(machine.memory, 1, gate64(CODE64, 0x6000), 16)
    assert not machine.both(cpu, (1, EventKind.EXCEPTION, None, None))


def test_a_stack_beside_code(machine):
    cpu = prepare(machine.memory)
    machine.engine.budget.code_pages[8] = 1
    assert not machine.both(cpu, fault())
    assert machine.engine._dirty_code  # which Python sees to


@pytest.mark.parametrize("flags", [SlotFlags.LOG_DIRTY, SlotFlags.READONLY], ids=["logged", "read-only"])
def test_a_stack_in_a_slot_that_wants_to_know(machine, flags):
    """A log is told; a store to a read-only slot is Python's."""
    machine.memory.set_region(1, OTHER_SLOT, 0x1000, flags=flags)
    machine.engine.budget.forget_code()
    cpu = prepare(machine.memory)
    machine.memory.write_u(PTES + 8 * 8, 8, OTHER_SLOT | 0x67)
    assert machine.both(cpu, fault()) is (flags is SlotFlags.LOG_DIRTY)
    if flags is SlotFlags.LOG_DIRTY:
        machine.memory.take_dirty_log(1)
        machine.load(cpu, machine.content)
        assert machine.context.deliver(*fault())
        assert machine.memory.take_dirty_log(1)[0] == 1


# ---- whatever the guest has put there -------------------------------------------------------------------------------


def mostly(usual, *others):
    """One of ``usual``, nine times of ten."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(usual) if n else st.one_of(*others))


selectors = mostly([CODE64], st.sampled_from([s | rpl for s in ENTRIES for rpl in (0, 3)]), st.integers(0, 0xFFFF))
gates = st.builds(
    gate64,
    selectors,
    mostly([0x400, 0x1_0000, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0400], st.just(0x8000_0000_0000)),
    mostly([0xE, 0xF], st.sampled_from([5, 0xC])),
    dpl=st.sampled_from([0, 3, 3]),
    present=mostly([1], st.just(0)),
    ist=st.sampled_from([0, 0, 1, 7]),
)
entries = st.builds(
    descriptor,
    st.sampled_from([0, 0x5000, 0xFFFF_F000]),
    st.sampled_from([0, 0x67, 0xFFFF, 0xFFFFF]),
    st.one_of(st.sampled_from([0x9B, 0x9F, 0xFB]), st.integers(0, 0xFF)),
    mostly([0x2, 0xA], st.integers(0, 0xF)),
)
pages = st.one_of(
    st.builds(
        lambda page, bits: page << 12 | bits, st.integers(0, 0x41), st.sampled_from([0x67, 0x63, 0x61, 0x23, 0x43])
    ),
    st.integers(0, (1 << 64) - 1),
)


@st.composite
def events(draw):
    """(memory, CPU, event)."""
    memory = new_memory()
    cpu = prepare(memory, draw(st.sampled_from([0, 3])))
    vector = draw(st.integers(0, 40))
    put_gate(memory, vector, draw(gates), 16)
    for at in draw(st.lists(st.integers(0, 15), max_size=2)):
        put_entry(memory, 8 * at, draw(entries))
    for at in draw(st.lists(st.integers(0, 0x3F), max_size=2)):
        memory.write_u(PTES + 8 * at, 8, draw(pages))
    memory.write_u(
        0x1_2000, 8, draw(mostly([0x1_3067, 0x1_3063, 0xE3, 0xE7], st.sampled_from([0x63, 0x10_00E3, 0x20E3])))
    )
    for at in (TSS + 4, TSS + 36, TSS + 84):
        memory.write_u(
            at, 8, draw(mostly([0x9000, 0xB008, 0xFFFF_8000_0000_C010], st.sampled_from([1 << 47, 3, 1 << 63])))
        )
    cpu.cr4 |= draw(mostly([0, 1 << 20], st.sampled_from([1 << 21, 1 << 22])))
    cpu.efer = draw(st.sampled_from([0xD01, 0xD00, 0x501]))
    cpu.rflags = draw(st.integers(0, 0x3F_FFFF)) & 0x3D_7FD5 | 2
    cpu.rip = draw(st.integers(0, (1 << 64) - 1))
    cpu.interrupt_shadow = draw(st.booleans())
    cpu.idt = DescriptorTable(IDT, draw(mostly([0xFFF, 0x28F], st.just(0xEE))))
    cpu.gdt = DescriptorTable(GDT, draw(mostly([0x7F, 0x57, 0xFFFF], st.just(0x4F))))
    stacks = [0x9000, 0x9004, 0, 0xFFFF_8000_0000_A000, GDT + 0x80, PTES + 0x100]
    cpu.gpr[4] = draw(mostly(stacks, st.sampled_from([2, 0x8000_0000_0008])))
    kind = draw(st.sampled_from([kind for kind in EventKind if kind is not EventKind.SMI]))
    error = draw(st.one_of(st.none(), st.integers(0, 0xFFFF_FFFF)))
    rip = draw(st.one_of(st.none(), st.integers(0, (1 << 64) - 1)))
    return memory, cpu, (vector, kind, error, rip)


@settings(max_examples=400, deadline=None)
@given(drawn=events())
def test_random_tables(shared, drawn):
    memory, cpu, event = drawn
    shared.engine.budget.forget_code()
    shared.memory.write(0, memory.read(0, 0x4_0000))
    shared.both(cpu, event)
