"""What GDB is told of this CPU, and its registers in that order.

The target description names GDB's own features for x86-64 or i386 (general registers, x87, SSE, segment bases) and one
more with the control registers, which GDB shows beside the others. One table makes the description, reads and writes,
so that they cannot disagree.

Source: the GDB manual, appendix G ("Target Descriptions", "i386 Features"). GDB reads the description once, when it
connects, and neither side can tell then what the guest's symbols are for: who debugs says so (:data:`DESCRIPTIONS`).
FIOFF and its likes, which x87 instructions leave behind, read as the core keeps them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from aiovm.kvm_structs import KvmFpu
    from aiovm.vcpu import Vcpu

__all__ = ["DESCRIPTIONS", "Description", "Register"]


class Register(NamedTuple):
    """One register: its name, bits, GDB's type, feature and (for the FPU's) group."""

    name: str
    bits: int
    type: str
    feature: str
    group: str = ""


_CORE, _SSE, _SEGMENTS, _SYSTEM = (
    "org.gnu.gdb.i386.core",
    "org.gnu.gdb.i386.sse",
    "org.gnu.gdb.i386.segments",
    "org.aiovm.system",
)
_GPRS: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
#: i386's, in GDB's order; each is the low half of its namesake.
_GPRS_32: Final = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_WIDE: Final = {name: "r" + name[1:] for name in (*_GPRS_32, "eip")}
_POINTERS: Final = ("rbp", "rsp", "ebp", "esp")
_SELECTORS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_X87: Final = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_BASES: Final = ("fs_base", "gs_base")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")


def _table(bits: int) -> tuple[Register, ...]:
    long = bits == 64
    return (
        *(
            Register(name, bits, "data_ptr" if name in _POINTERS else f"int{bits}", _CORE)
            for name in (_GPRS if long else _GPRS_32)
        ),
        Register("rip" if long else "eip", bits, "code_ptr", _CORE),
        Register("eflags", 32, "x86_eflags", _CORE),
        *(Register(name, 32, "int32", _CORE) for name in _SELECTORS),
        *(Register(f"st{n}", 80, "i387_ext", _CORE) for n in range(8)),
        *(Register(name, 32, "int", _CORE, "float") for name in _X87),
        *(Register(f"xmm{n}", 128, "vec128", _SSE) for n in range(16 if long else 8)),
        Register("mxcsr", 32, "int", _SSE, "vector"),
        *(Register(name, bits, "int", _SEGMENTS if long else _SYSTEM) for name in _BASES),
        *(Register(name, bits, "int", _SYSTEM, "system") for name in _CONTROL),
    )


_FLAGS: Final = (
    (0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"), (14, "NT"),
    (16, "RF"), (17, "VM"), (18, "AC"), (21, "ID"),
)  # fmt: skip


def _target_xml(architecture: str, registers: tuple[Register, ...]) -> str:
    types = {
        _CORE: '<flags id="x86_eflags" size="4">'
        + "".join(f'<field name="{name}" start="{bit}" end="{bit}"/>' for bit, name in _FLAGS)
        + "</flags>",
        _SSE: '<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>'
        '<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>'
        '<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>'
        '<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>'
        '<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>'
        '<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>'
        '<field name="uint128" type="uint128"/></union>',
    }
    out = ['<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">']
    out.append(f"<architecture>{architecture}</architecture>")
    number = 0
    for feature in dict.fromkeys(register.feature for register in registers):
        out.append(f'<feature name="{feature}">{types.get(feature, "")}')
        for register in registers:
            if register.feature == feature:
                group = f' group="{register.group}"' if register.group else ""
                out.append(
                    f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.type}" '
                    f'regnum="{number}"{group}/>'
                )
                number += 1
        out.append("</feature>")
    out.append("</target>")
    return "".join(out)


class Description:
    """A CPU as GDB is told of it: ``registers`` in their order, and ``xml``, the same for GDB."""

    def __init__(self, bits: int) -> None:
        self.registers: Final = _table(bits)
        self.xml: Final = _target_xml("i386:x86-64" if bits == 64 else "i386", self.registers)

    def read(self, vcpu: Vcpu) -> list[bytes]:
        """Every register's bytes, little-endian, in the description's order."""
        values = _values(vcpu)
        return [
            (values[_WIDE.get(name, name)] & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
            for name, bits, *_ in self.registers
        ]

    def write(self, vcpu: Vcpu, number: int, data: bytes) -> bool:
        """Store one register; False when it does not exist, does not take the value, or has another size.

        What is stored to a register of 32 bits clears the half above, as an instruction does.
        """
        if not 0 <= number < len(self.registers) or len(data) * 8 != self.registers[number].bits:
            return False
        name = self.registers[number].name
        try:
            return _store(vcpu, _WIDE.get(name, name), data)
        except ConfigError:
            return False


#: By the bits of the guest's code.
DESCRIPTIONS: Final = {bits: Description(bits) for bits in (64, 32)}


def _values(vcpu: Vcpu) -> dict[str, int]:
    regs, sregs, fpu = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_fpu()
    x87 = (fpu.fcw, fpu.fsw, _full_tags(fpu.ftwx), 0, fpu.last_ip, 0, fpu.last_dp, fpu.last_opcode)
    return {
        **{name: getattr(regs, name) for name in (*_GPRS, "rip")},
        "eflags": regs.rflags,
        **{name: getattr(sregs, name).selector for name in _SELECTORS},
        **{f"st{n}": int.from_bytes(value, "little") for n, value in enumerate(fpu.fpr)},
        **dict(zip(_X87, x87, strict=True)),
        **{f"xmm{n}": int.from_bytes(value, "little") for n, value in enumerate(fpu.xmm)},
        "mxcsr": fpu.mxcsr,
        "fs_base": sregs.fs.base,
        "gs_base": sregs.gs.base,
        **{name: getattr(sregs, name) for name in _CONTROL},
    }


def _store(vcpu: Vcpu, name: str, data: bytes) -> bool:
    value = int.from_bytes(data, "little")
    if name in _GPRS or name == "rip":
        vcpu.set_regs(replace(vcpu.get_regs(), **{name: value}))
    elif name == "eflags":
        vcpu.set_regs(replace(vcpu.get_regs(), rflags=value))
    elif name in _CONTROL:
        control: dict[str, Any] = {name: value}
        vcpu.set_sregs(replace(vcpu.get_sregs(), **control))
    elif name in _BASES:
        sregs = vcpu.get_sregs()
        segment = replace(getattr(sregs, name[:2]), base=value)
        vcpu.set_sregs(replace(sregs, **{name[:2]: segment}))
    elif name in _SELECTORS:
        return False  # a selector alone says nothing: the hidden part would not follow
    else:
        vcpu.set_fpu(_with_fpu(vcpu.get_fpu(), name, value, data))
    return True


def _with_fpu(fpu: KvmFpu, name: str, value: int, data: bytes) -> KvmFpu:
    if name.startswith("xmm"):
        index = int(name[3:])
        return replace(fpu, xmm=(*fpu.xmm[:index], data, *fpu.xmm[index + 1 :]))
    if name.startswith("st"):
        index = int(name[2:])
        return replace(fpu, fpr=(*fpu.fpr[:index], data + bytes(6), *fpu.fpr[index + 1 :]))
    if name == "ftag":
        return replace(fpu, ftwx=sum(1 << n for n in range(8) if value >> 2 * n & 3 != 3))
    fields = {"fctrl": "fcw", "fstat": "fsw", "fioff": "last_ip", "fooff": "last_dp", "fop": "last_opcode"}
    if name == "mxcsr":
        return replace(fpu, mxcsr=value)
    changed: dict[str, Any] = {fields[name]: value} if name in fields else {}
    return replace(fpu, **changed)


def _full_tags(abridged: int) -> int:
    """FSTENV's two bits a register from FXSAVE's one: in use, or empty."""
    return sum((0 if abridged >> n & 1 else 3) << 2 * n for n in range(8))
