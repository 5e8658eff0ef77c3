"""Whatever the guest put in its tables, delivery answers with a value, and a fault changes nothing."""

from __future__ import annotations

from fake_cpu import ENTRIES, GDT, IDT, TSS, descriptor, gate64, long_mode, new_memory, protected
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.delivery import SHUTDOWN, deliver, deliver_event
from aiovm.engine.base import DescriptorTable, Seg
from aiovm.events import EventKind
from aiovm.segmentation import Fault

selectors = st.one_of(st.sampled_from([s | rpl for s in ENTRIES for rpl in (0, 3)]), st.integers(0, 0xFFFF))
offsets = st.sampled_from([0x400, 0x1_0000, 0x7FFF_FFFF_FFFF, 0x8000_0000_0000, 0xFFFF_8000_0000_0400])
gates = st.builds(
    gate64,
    selectors,
    offsets,
    st.one_of(st.sampled_from([0xE, 0xF, 5, 6, 7]), st.integers(0, 0x1F)),
    dpl=st.integers(0, 3),
    present=st.sampled_from([1, 1, 1, 0]),
    ist=st.integers(0, 7),
)
entries = st.builds(
    descriptor,
    st.sampled_from([0, 0x5000, 0xFFFF_F000]),
    st.sampled_from([0, 0x67, 0xFFFF, 0xFFFFF]),
    st.integers(0, 0xFF),
    st.integers(0, 0xF),
)
events = st.sampled_from([kind for kind in EventKind if kind is not EventKind.SMI])


@st.composite
def machines(draw):
    memory = new_memory()
    mode = draw(st.sampled_from(["real", "protected", "v86", "long"]))
    cpl = draw(st.sampled_from([0, 3]))
    cpu = long_mode(memory, cpl) if mode == "long" else protected(3 if mode == "v86" else cpl)
    if mode == "real":
        cpu.cr0 = 0x10
    if mode == "v86":
        cpu.rflags |= 0x2_0000 | draw(st.sampled_from([0, 0x3000]))
    width = 16 if mode == "long" else 8
    vector = draw(st.integers(0, 40))
    for index in (vector, 8, 10, 11, 12, 13, 14):
        value = draw(gates) & (1 << 8 * width) - 1
        memory.write(IDT + index * width, value.to_bytes(width, "little"))
    for at in range(0, 0x68, 4):
        memory.write_u(TSS + at, 4, draw(st.one_of(selectors, st.sampled_from([0x9000, 0xFFFF_FFFF, 0x8000_0000]))))
    for _ in range(draw(st.integers(0, 3))):
        memory.write_u(GDT + 8 * draw(st.integers(0, 15)), 8, draw(entries))
    if mode == "long":
        for _ in range(draw(st.integers(0, 3))):
            memory.write_u(0x1_3000 + 8 * draw(st.integers(0, 0x3F)), 8, draw(st.sampled_from([0, 0x100_0067, 0x61])))
    cpu.idt = DescriptorTable(IDT, draw(st.sampled_from([0xFFF, 0x7FF, 0x6F, 0])))
    cpu.gpr[4] = draw(st.sampled_from([0x9000, 0x9004, 2, 0, 0x4_0008, 0xFFFF_FFFF, 0x8000_0000_0008]))
    return memory, cpu, vector


@settings(max_examples=150, deadline=None)
@given(machines(), events, st.one_of(st.none(), st.integers(0, 0xFFFF_FFFF)))
def test_delivery_is_total(machine, kind, error_code):
    memory, cpu, vector = machine
    before = cpu.copy()
    outcome = deliver(cpu, memory, vector, kind=kind, error_code=error_code)
    assert outcome is None or (isinstance(outcome, Fault) and outcome.vector in (10, 11, 12, 13, 14))
    switched = cpu.segment(Seg.TR) != before.segment(Seg.TR)
    if outcome is not None and not switched:
        assert cpu == before
    if not switched:
        again = before.copy()
        last = deliver_event(again, memory, vector, kind=kind, error_code=error_code)
        assert last == SHUTDOWN or 0 <= last < 256
        if outcome is None:
            assert (last, again) == (vector, cpu)
