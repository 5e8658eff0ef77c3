"""What GDB is told of this CPU, and its registers in that order.

The target description names GDB's own features for x86-64 (general registers, x87, SSE, segment bases) and one more
with the control registers, which GDB shows beside the others. One table makes the description, reads and writes, so
that they cannot disagree.

Source: the GDB manual, appendix G ("Target Descriptions", "i386 Features"). Guests in 16 or 32 bits are shown with the
same 64-bit registers. FIOFF and its likes, which x87 instructions leave behind, read as the core keeps them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from aiovm.kvm_structs import KvmFpu
    from aiovm.vcpu import Vcpu

__all__ = ["PC", "REGISTERS", "TARGET_XML", "Register", "read", "write"]


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
_POINTERS: Final = {"rbp": "data_ptr", "rsp": "data_ptr"}
_SELECTORS: Final = ("cs", "ss", "ds", "es", "fs", "gs")
_X87: Final = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")

REGISTERS: Final[tuple[Register, ...]] = (
    *(Register(name, 64, _POINTERS.get(name, "int64"), _CORE) for name in _GPRS),
    Register("rip", 64, "code_ptr", _CORE),
    Register("eflags", 32, "x86_eflags", _CORE),
    *(Register(name, 32, "int32", _CORE) for name in _SELECTORS),
    *(Register(f"st{n}", 80, "i387_ext", _CORE) for n in range(8)),
    *(Register(name, 32, "int", _CORE, "float") for name in _X87),
    *(Register(f"xmm{n}", 128, "vec128", _SSE) for n in range(16)),
    Register("mxcsr", 32, "int", _SSE, "vector"),
    Register("fs_base", 64, "int", _SEGMENTS),
    Register("gs_base", 64, "int", _SEGMENTS),
    *(Register(name, 64, "int", _SYSTEM, "system") for name in _CONTROL),
)
#: RIP's number.
PC: Final = 16

_FLAGS: Final = (
    (0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"), (14, "NT"),
    (16, "RF"), (17, "VM"), (18, "AC"), (21, "ID"),
)  # fmt: skip


def _target_xml() -> str:
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
    out.append("<architecture>i386:x86-64</architecture>")
    number = 0
    for feature in (_CORE, _SSE, _SEGMENTS, _SYSTEM):
        out.append(f'<feature name="{feature}">{types.get(feature, "")}')
        for register in REGISTERS:
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


TARGET_XML: Final = _target_xml()


def read(vcpu: Vcpu) -> list[bytes]:
    """Every register's bytes, little-endian, in the description's order."""
    regs, sregs, fpu = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_fpu()
    x87 = (fpu.fcw, fpu.fsw, _full_tags(fpu.ftwx), 0, fpu.last_ip, 0, fpu.last_dp, fpu.last_opcode)
    return [
        *((getattr(regs, name)).to_bytes(8, "little") for name in _GPRS),
        regs.rip.to_bytes(8, "little"),
        regs.rflags.to_bytes(4, "little"),
        *(getattr(sregs, name).selector.to_bytes(4, "little") for name in _SELECTORS),
        *(value[:10] for value in fpu.fpr),
        *((value & 0xFFFF_FFFF).to_bytes(4, "little") for value in x87),
        *fpu.xmm,
        fpu.mxcsr.to_bytes(4, "little"),
        sregs.fs.base.to_bytes(8, "little"),
        sregs.gs.base.to_bytes(8, "little"),
        *(getattr(sregs, name).to_bytes(8, "little") for name in _CONTROL),
    ]


def write(vcpu: Vcpu, number: int, data: bytes) -> bool:
    """Store one register; False when it does not exist, does not take the value, or has another size."""
    if not 0 <= number < len(REGISTERS) or len(data) * 8 != REGISTERS[number].bits:
        return False
    name = REGISTERS[number].name
    value = int.from_bytes(data, "little")
    try:
        if name in _GPRS or name == "rip":
            vcpu.set_regs(replace(vcpu.get_regs(), **{name: value}))
        elif name == "eflags":
            vcpu.set_regs(replace(vcpu.get_regs(), rflags=value))
        elif name in _CONTROL:
            control: dict[str, Any] = {name: value}
            vcpu.set_sregs(replace(vcpu.get_sregs(), **control))
        elif name in ("fs_base", "gs_base"):
            sregs = vcpu.get_sregs()
            segment = replace(getattr(sregs, name[:2]), base=value)
            vcpu.set_sregs(replace(sregs, **{name[:2]: segment}))
        elif name in _SELECTORS:
            return False  # a selector alone says nothing: the hidden part would not follow
        else:
            vcpu.set_fpu(_with_fpu(vcpu.get_fpu(), name, value, data))
    except ConfigError:
        return False
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
