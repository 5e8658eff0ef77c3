"""What KVM's ``KVM_GET_*`` and ``KVM_SET_*`` calls carry: frozen values with KVM's field names.

Each is as large as the kernel's structure and has its layout: ``pack()`` gives those bytes, ``unpack()`` reads them,
so that a state saved from a real KVM can be looked at or loaded. A value that does not fit its field is refused when
the structure is made.

Source: ``arch/x86/include/uapi/asm/kvm.h`` of Linux 6.16. Not here: what has a Python value of its own (MSR lists are
dictionaries, ``kvm_clock_data`` is :class:`aiovm.kvmclock.ClockData`, ``kvm_lapic_state`` is a page of 1 KiB).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, fields
from typing import ClassVar, Self

from aiovm.errors import ConfigError

__all__ = [
    "EventsFlag",
    "KvmDebugregs",
    "KvmDtable",
    "KvmFpu",
    "KvmRegs",
    "KvmSegment",
    "KvmSregs",
    "KvmVcpuEvents",
    "KvmXcrs",
    "KvmXsave",
    "MpState",
]


class MpState(enum.IntEnum):
    """``KVM_MP_STATE_*`` (``include/uapi/linux/kvm.h``)."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


class EventsFlag(enum.IntFlag):
    """``KVM_VCPUEVENT_VALID_*``: which parts of a :class:`KvmVcpuEvents` count when it is set."""

    NONE = 0
    NMI_PENDING = 1
    SIPI_VECTOR = 2
    SHADOW = 4
    SMM = 8
    PAYLOAD = 16
    TRIPLE_FAULT = 32


class _Struct:
    """A C structure. ``_shape`` has an entry a field, padding (``"3x"``) between: a code of :mod:`struct`, a code and
    a count for an array, or another structure."""

    __slots__ = ()
    _shape: ClassVar[tuple[str | tuple[str, int] | type[_Struct], ...]]

    def __post_init__(self) -> None:
        self.pack()

    def pack(self) -> bytes:
        """The kernel's bytes."""
        parts = []
        names = iter(fields(self))  # type: ignore[arg-type]
        for code in self._shape:
            if isinstance(code, str) and code.endswith("x"):
                parts.append(bytes(int(code[:-1])))
                continue
            name = next(names).name
            value = getattr(self, name)
            try:
                parts.append(_pack(code, value))
            except (struct.error, TypeError, AttributeError) as error:
                raise ConfigError(f"{type(self).__name__}.{name}: {_words(value)} does not fit ({error})") from None
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The values in the kernel's bytes."""
        if len(data) != cls.size():
            raise ConfigError(f"{cls.__name__} is {cls.size()} bytes, not {len(data)}")
        at = 0
        values = []
        for code in cls._shape:
            length = _size(code)
            if not isinstance(code, str) or not code.endswith("x"):
                values.append(_unpack(code, data[at : at + length]))
            at += length
        return cls(*values)

    @classmethod
    def size(cls) -> int:
        """Bytes."""
        return sum(_size(code) for code in cls._shape)


_Code = str | tuple[str, int] | type[_Struct]


def _size(code: _Code) -> int:
    if isinstance(code, str):
        return struct.calcsize("<" + code)
    return struct.calcsize("<" + code[0]) * code[1] if isinstance(code, tuple) else code.size()


def _pack(code: _Code, value: object) -> bytes:
    if isinstance(code, str):
        if isinstance(value, bytes) and len(value) != _size(code):
            raise struct.error(f"{_size(code)} bytes are wanted")
        return struct.pack("<" + code, value)
    if isinstance(code, tuple):
        if not isinstance(value, tuple) or len(value) != code[1]:
            raise struct.error(f"a tuple of {code[1]} is wanted")
        return b"".join(_pack(code[0], item) for item in value)
    if not isinstance(value, code):
        raise struct.error(f"a {code.__name__} is wanted")
    return value.pack()


def _unpack(code: _Code, data: bytes) -> object:
    if isinstance(code, str):
        return struct.unpack("<" + code, data)[0]
    if isinstance(code, tuple):
        size = len(data) // code[1]
        return tuple(_unpack(code[0], data[at : at + size]) for at in range(0, len(data), size))
    return code.unpack(data)


def _words(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else repr(value)


@dataclass(frozen=True, slots=True)
class KvmRegs(_Struct):
    """``struct kvm_regs``, 144 bytes; the order is not the hardware's."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    _shape: ClassVar = ("Q",) * 18

    @property
    def gprs(self) -> tuple[int, ...]:
        """The general registers, in this order."""
        return tuple(getattr(self, field.name) for field in fields(self)[:16])


@dataclass(frozen=True, slots=True)
class KvmSegment(_Struct):
    """``struct kvm_segment``, 24 bytes. ``unusable``: the register holds a null selector."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - KVM's name
    g: int = 0
    avl: int = 0
    unusable: int = 0

    _shape: ClassVar = ("Q", "I", "H", *("B",) * 9, "1x")

    def __post_init__(self) -> None:
        self.pack()
        if self.type > 15 or self.dpl > 3:
            raise ConfigError(f"KvmSegment: type {self.type:#x}, dpl {self.dpl:#x} do not fit 4 and 2 bits")
        if max(self.present, self.db, self.s, self.l, self.g, self.avl, self.unusable) > 1:
            raise ConfigError("KvmSegment: present, db, s, l, g, avl and unusable are 0 or 1")


@dataclass(frozen=True, slots=True)
class KvmDtable(_Struct):
    """``struct kvm_dtable``, 16 bytes: GDTR or IDTR."""

    base: int = 0
    limit: int = 0

    _shape: ClassVar = ("Q", "H", "6x")


@dataclass(frozen=True, slots=True)
class KvmSregs(_Struct):
    """``struct kvm_sregs``, 312 bytes.

    ``interrupt_bitmap``: the vector that was taken from its controller and is not delivered yet, as one bit of 256.
    """

    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)

    _shape: ClassVar = (*(KvmSegment,) * 8, *(KvmDtable,) * 2, *("Q",) * 7, ("Q", 4))

    @property
    def segments(self) -> tuple[KvmSegment, ...]:
        """The segment registers, in this order."""
        return self.cs, self.ds, self.es, self.fs, self.gs, self.ss, self.tr, self.ldt


@dataclass(frozen=True, slots=True)
class KvmFpu(_Struct):
    """``struct kvm_fpu``, 416 bytes. ``fpr``: ST(0) to ST(7), ten bytes each and six more; ``ftwx``: FXSAVE's tags,
    a set bit for each physical register that is in use."""

    fpr: tuple[bytes, ...] = (bytes(16),) * 8
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (bytes(16),) * 16
    mxcsr: int = 0x1F80

    _shape: ClassVar = (("16s", 8), "H", "H", "B", "1x", "H", "Q", "Q", ("16s", 16), "I", "4x")


@dataclass(frozen=True, slots=True)
class KvmXsave(_Struct):
    """``struct kvm_xsave``, 4096 bytes: XSAVE's area in standard form (SDM vol. 1, 13.4). The registers are as in
    :class:`KvmFpu`; a state whose bit ``xstate_bv`` lacks is the initial one."""

    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    mxcsr: int = 0x1F80
    mxcsr_mask: int = 0xFFFF
    fpr: tuple[bytes, ...] = (bytes(16),) * 8
    xmm: tuple[bytes, ...] = (bytes(16),) * 16
    xstate_bv: int = 0
    xcomp_bv: int = 0
    reserved: tuple[int, ...] = (0,) * 6
    pkru: int = 0

    _shape: ClassVar = (
        "H", "H", "B", "1x", "H", "Q", "Q", "I", "I", ("16s", 8), ("16s", 16), "96x", "Q", "Q", ("Q", 6), "2112x",
        "I", "1404x",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KvmDebugregs(_Struct):
    """``struct kvm_debugregs``, 128 bytes."""

    db: tuple[int, ...] = (0, 0, 0, 0)
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    flags: int = 0

    _shape: ClassVar = (("Q", 4), "Q", "Q", "Q", "72x")


@dataclass(frozen=True, slots=True)
class KvmXcrs(_Struct):
    """``struct kvm_xcrs``, 392 bytes, of which one register counts: XCR0."""

    xcr0: int = 1

    _shape: ClassVar = ("Q",)

    def pack(self) -> bytes:
        """The kernel's bytes: one register, XCR0."""
        try:
            return struct.pack("<IIIIQ", 1, 0, 0, 0, self.xcr0).ljust(self.size(), b"\0")
        except struct.error:
            raise ConfigError(f"KvmXcrs.xcr0: {_words(self.xcr0)} does not fit 64 bits") from None

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The values in the kernel's bytes."""
        if len(data) != cls.size():
            raise ConfigError(f"KvmXcrs is {cls.size()} bytes, not {len(data)}")
        count, flags = struct.unpack_from("<II", data)
        if count > 16 or flags:
            raise ConfigError(f"KvmXcrs: {count} registers with flags {flags:#x} (EINVAL)")
        for at in range(8, 8 + 16 * count, 16):
            register, _reserved, value = struct.unpack_from("<IIQ", data, at)
            if register == 0:
                return cls(value)
        raise ConfigError("KvmXcrs: XCR0 is not among them (EINVAL)")

    @classmethod
    def size(cls) -> int:
        """Bytes."""
        return 392


@dataclass(frozen=True, slots=True)
class KvmVcpuEvents(_Struct):
    """``struct kvm_vcpu_events``, 64 bytes; the kernel's nested names are joined by an underscore."""

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0

    _shape: ClassVar = (
        *("B",) * 4, "I", *("B",) * 4, *("B",) * 3, "1x", "I", "I", *("B",) * 4, "B", "26x", "B", "Q",
    )  # fmt: skip
