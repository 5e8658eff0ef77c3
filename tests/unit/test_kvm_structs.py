"""The kernel's structures: their sizes, their bytes, and what does not fit."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiovm.errors import ConfigError
from aiovm.kvm_structs import (
    KvmDebugregs,
    KvmDtable,
    KvmFpu,
    KvmRegs,
    KvmSegment,
    KvmSregs,
    KvmVcpuEvents,
    KvmXcrs,
    KvmXsave,
    MpState,
)

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
BIT = st.integers(0, 1)
SEGMENT = st.builds(KvmSegment, U64, U32, U16, st.integers(0, 15), BIT, st.integers(0, 3), BIT, BIT, BIT, BIT, BIT, BIT)
DTABLE = st.builds(KvmDtable, U64, U16)
QUAD = st.tuples(U64, U64, U64, U64)
BYTES16 = st.binary(min_size=16, max_size=16)
VALUES = {
    KvmRegs: st.builds(KvmRegs, *[U64] * 18),
    KvmSregs: st.builds(KvmSregs, *[SEGMENT] * 8, DTABLE, DTABLE, *[U64] * 7, QUAD),
    KvmFpu: st.builds(
        KvmFpu, st.tuples(*[BYTES16] * 8), U16, U16, U8, U16, U64, U64, st.tuples(*[BYTES16] * 16), U32
    ),
    KvmDebugregs: st.builds(KvmDebugregs, QUAD, U64, U64, U64),
    KvmXcrs: st.builds(KvmXcrs, U64),
    KvmXsave: st.builds(
        KvmXsave, U16, U16, U8, U16, U64, U64, U32, U32, st.tuples(*[BYTES16] * 8), st.tuples(*[BYTES16] * 16),
        U64, U64, st.tuples(*[U64] * 6), U32,
    ),
    KvmVcpuEvents: st.builds(
        KvmVcpuEvents, *[U8] * 4, U32, *[U8] * 7, U32, U32, *[U8] * 5, U8, U64
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "size"),
    [(KvmRegs, 144), (KvmSegment, 24), (KvmDtable, 16), (KvmSregs, 312), (KvmFpu, 416), (KvmDebugregs, 128),
     (KvmXcrs, 392), (KvmXsave, 4096), (KvmVcpuEvents, 64)],
)  # fmt: skip
def test_sizes_are_the_kernels(kind, size):
    assert kind.size() == size


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_bytes_round_trip(kind):
    @given(VALUES[kind])
    def check(value):
        data = value.pack()
        assert len(data) == kind.size()
        assert kind.unpack(data) == value

    check()


def test_fields_lie_where_the_kernel_has_them():
    regs = KvmRegs(rbx=0x11, rsi=0x22, rip=0x33, rflags=0x46).pack()
    assert struct.unpack_from("<Q", regs, 8)[0] == 0x11
    assert struct.unpack_from("<Q", regs, 32)[0] == 0x22
    assert struct.unpack_from("<QQ", regs, 128) == (0x33, 0x46)
    segment = KvmSegment(base=0x10, limit=0xFFFF, selector=0x18, type=11, present=1, dpl=3, l=1, unusable=1).pack()
    assert segment == struct.pack("<QIH10B", 0x10, 0xFFFF, 0x18, 11, 1, 3, 0, 0, 1, 0, 0, 1, 0)
    events = KvmVcpuEvents(exception_nr=14, interrupt_shadow=1, nmi_masked=1, sipi_vector=9, smi_smm=1).pack()
    assert (events[1], events[11], events[14], events[16], events[24]) == (14, 1, 1, 9, 1)
    fpu = KvmFpu(fcw=0x27F, mxcsr=0x1FA0).pack()
    assert struct.unpack_from("<H", fpu, 128)[0] == 0x27F
    assert struct.unpack_from("<I", fpu, 408)[0] == 0x1FA0
    assert struct.unpack_from("<Q", KvmDebugregs(dr7=0x455).pack(), 40)[0] == 0x455
    assert struct.unpack_from("<IIIIQ", KvmXcrs(7).pack()) == (1, 0, 0, 0, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KvmRegs(rax=1 << 64),
        lambda: KvmRegs(rip=-1),
        lambda: KvmRegs(rcx="7"),
        lambda: KvmSegment(type=16),
        lambda: KvmSegment(dpl=4),
        lambda: KvmSegment(l=2),
        lambda: KvmSegment(selector=0x1_0000),
        lambda: KvmFpu(xmm=(bytes(16),) * 15),
        lambda: KvmFpu(fpr=(bytes(10),) * 8),
        lambda: KvmDebugregs(db=(0, 0, 0)),
        lambda: KvmXcrs(1 << 64),
        lambda: KvmXcrs.unpack(struct.pack("<II", 17, 0).ljust(392, b"\0")),
        lambda: KvmXcrs.unpack(bytes(392)),
        lambda: KvmRegs.unpack(bytes(143)),
    ],
)
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_mp_states_are_numbered_as_the_kernels():
    assert [state.value for state in MpState] == [0, 1, 2, 3, 4]
