"""Decoding the few instructions that are intercepted: how long they are, and what they name (SDM vol. 2A, chapter 2).

The core says where an intercepted instruction stands, not what it looked like: prefixes make it longer, ModRM names a
register or memory. Everything else is executed by the core and never comes here.

Modelled: legacy prefixes, REX, opcodes of one and two bytes and of the map 0F 38, ModRM, SIB, displacements, 8-bit
immediates of intercepted instructions. Not modelled: VEX, the map 0F 3A, other immediates (no intercepted instruction
has one; of others the memory operand is asked alone, and the length is short by the immediate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiovm.engine.base import Reg, Seg
from aiovm.page_walk import is_canonical

if TYPE_CHECKING:
    from aiovm.engine.base import CpuState

__all__ = ["Instruction", "decode", "effective_address", "leaves_the_stack"]

_SEGMENT_PREFIXES: Final = {0x26: Seg.ES, 0x2E: Seg.CS, 0x36: Seg.SS, 0x3E: Seg.DS, 0x64: Seg.FS, 0x65: Seg.GS}
#: Opcodes with ModRM (SDM vol. 2D, tables A-2 and A-3), of which MOV CR and DR name registers alone.
_WITH_MODRM: Final = frozenset(
    {opcode for opcode in range(0x40) if not opcode & 4}
    | {0x63, 0x69, 0x6B, *range(0x80, 0x90), 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4), *range(0xD8, 0xE0)}
    | {0xF6, 0xF7, 0xFE, 0xFF}
    | set(range(0x0F00, 0x0F04)) | {0x0F0D} | set(range(0x0F10, 0x0F24)) | set(range(0x0F28, 0x0F30))
    | set(range(0x0F40, 0x0F80)) - {0x0F77} | set(range(0x0F90, 0x0FA0)) | {0x0FA3, 0x0FA4, 0x0FA5}
    | set(range(0x0FAB, 0x0FC8)) | set(range(0x0FD0, 0x0FFF))
)  # fmt: skip
_MAP_0F38: Final = 0x0F38
_REGISTERS_ALONE: Final = range(0x0F20, 0x0F24)
#: Opcodes with an 8-bit immediate (IN, OUT, INT n).
_WITH_IMM8: Final = frozenset({0xE4, 0xE5, 0xE6, 0xE7, 0xCD})
#: 16-bit addressing: (base, index) by ModRM.rm (SDM vol. 2A, table 2-1).
_PAIRS16: Final = (
    (Reg.RBX, Reg.RSI), (Reg.RBX, Reg.RDI), (Reg.RBP, Reg.RSI), (Reg.RBP, Reg.RDI),
    (Reg.RSI, None), (Reg.RDI, None), (Reg.RBP, None), (Reg.RBX, None),
)  # fmt: skip
_M64: Final = (1 << 64) - 1


class Instruction(NamedTuple):
    """One decoded instruction. Sizes are in bytes; ``opcode`` of the two-byte map is 0x0Fxx, behind 0F 38 0x0F38xx."""

    length: int
    opcode: int
    operand_size: int
    address_size: int
    #: The segment prefix, as far as 64-bit mode keeps it (FS and GS).
    segment: Seg | None = None
    rep: bool = False
    lock: bool = False
    modrm: int = 0
    #: ModRM.reg and ModRM.rm with REX.R and REX.B.
    reg: int = 0
    rm: int = 0
    immediate: int = 0
    base: int | None = None
    index_register: int | None = None
    scale: int = 0
    displacement: int = 0

    @property
    def is_register(self) -> bool:
        """ModRM names a register, not memory."""
        return self.modrm >> 6 == 3


def decode(code: bytes, mode: int) -> Instruction | None:
    """The instruction at the start of ``code`` in ``mode`` (16, 32 or 64 bits); None when it is cut off."""
    operand_size = 2 if mode == 16 else 4
    address_size = mode // 8
    segment: Seg | None = None
    rep = lock = False
    rex = 0
    try:
        at = 0
        while True:
            byte = code[at]
            if byte == 0x66:
                operand_size = 4 if mode == 16 else 2
            elif byte == 0x67:
                address_size = 4 if mode != 32 else 2
            elif byte in (0xF2, 0xF3):
                rep = True
            elif byte == 0xF0:
                lock = True
            elif byte in _SEGMENT_PREFIXES:
                if mode != 64 or byte >= 0x64:
                    segment = _SEGMENT_PREFIXES[byte]
            elif mode == 64 and byte & 0xF0 == 0x40:
                rex = byte
                at += 1
                continue
            else:
                break
            rex = 0  # a REX that is not the last prefix is ignored
            at += 1
        if rex & 8:
            operand_size = 8
        at += 1
        opcode = byte
        if byte == 0x0F:
            opcode = 0x0F00 | code[at]
            at += 1
            if opcode == _MAP_0F38:
                opcode = _MAP_0F38 << 8 | code[at]
                at += 1
        if opcode in _WITH_IMM8:
            immediate = code[at]
            return Instruction(at + 1, opcode, operand_size, address_size, segment, rep, lock, immediate=immediate)
        if opcode not in _WITH_MODRM and opcode >> 8 != _MAP_0F38:
            return Instruction(at, opcode, operand_size, address_size, segment, rep, lock)
        modrm = code[at]
        at += 1
        reg = modrm >> 3 & 7 | (rex & 4) << 1
        rm = modrm & 7 | (rex & 1) << 3
        base: int | None = None
        index: int | None = None
        scale = displacement = 0
        # MOV to and from CR and DR name registers whatever ModRM.mod says (SDM vol. 2B, MOV).
        if opcode in _REGISTERS_ALONE:
            modrm |= 0xC0
        elif modrm < 0xC0:
            if address_size == 2:
                at, base, index, displacement = _memory16(code, at, modrm)
            else:
                at, base, index, scale, displacement = _memory(code, at, modrm, rex)
                if base is None and index is None and mode == 64 and modrm & 0xC7 == 5:
                    base = -1  # RIP-relative
        return Instruction(
            at, opcode, operand_size, address_size, segment, rep, lock, modrm, reg, rm, 0, base, index, scale,
            displacement,
        )  # fmt: skip
    except IndexError:
        return None


def _signed(code: bytes, at: int, size: int) -> int:
    if at + size > len(code):
        raise IndexError
    return int.from_bytes(code[at : at + size], "little", signed=True)


def _memory16(code: bytes, at: int, modrm: int) -> tuple[int, int | None, int | None, int]:
    mode = modrm >> 6
    base: int | None
    base, index = _PAIRS16[modrm & 7]
    if mode == 0 and modrm & 7 == 6:
        return at + 2, None, None, _signed(code, at, 2)
    if mode == 0:
        return at, base, index, 0
    return at + mode, base, index, _signed(code, at, mode)


def _memory(code: bytes, at: int, modrm: int, rex: int) -> tuple[int, int | None, int | None, int, int]:
    mode, rm = modrm >> 6, modrm & 7
    base: int | None = rm | (rex & 1) << 3
    index: int | None = None
    scale = 0
    if rm == 4:
        sib = code[at]
        at += 1
        base = sib & 7 | (rex & 1) << 3
        index = sib >> 3 & 7 | (rex & 2) << 2
        scale = sib >> 6
        if index == 4:
            index = None
        if sib & 7 == 5 and mode == 0:
            return at + 4, None, index, scale, _signed(code, at, 4)
    elif rm == 5 and mode == 0:
        return at + 4, None, None, 0, _signed(code, at, 4)
    if mode == 0:
        return at, base, index, scale, 0
    size = 1 if mode == 1 else 4
    return at + size, base, index, scale, _signed(code, at, size)


def effective_address(cpu: CpuState, insn: Instruction) -> int:
    """The linear address of ``insn``'s memory operand."""
    address = insn.displacement
    if insn.base == -1:
        address += cpu.rip + insn.length
    elif insn.base is not None:
        address += cpu.gpr[insn.base]
    if insn.index_register is not None:
        address += cpu.gpr[insn.index_register] << insn.scale
    address &= (1 << 8 * insn.address_size) - 1
    segment = insn.segment
    if segment is None:
        segment = Seg.SS if insn.base in (Reg.RSP, Reg.RBP) else Seg.DS
    if cpu.long_mode:
        return address + (cpu.segment(segment).base if segment in (Seg.FS, Seg.GS) else 0) & _M64
    return address + cpu.segment(segment).base & 0xFFFF_FFFF


#: What pushes, pops or returns without a memory operand: PUSH, POP, PUSHF, POPF, RET, CALL; of FS and GS too.
_STACK_OPCODES: Final = frozenset(
    {*range(0x50, 0x60), 0x68, 0x6A, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xE8, 0x0FA0, 0x0FA1, 0x0FA8, 0x0FA9}
)
_LEAVE: Final = 0xC9
#: ModRM.reg of PUSH and of CALL in group 5, and POP.
_GROUP5_STACK: Final = frozenset({2, 3, 6})


def leaves_the_stack(cpu: CpuState, insn: Instruction) -> bool:
    """Whether 64-bit ``insn`` refers to SS by an address that is not canonical: #SS and not #GP (SDM vol. 3A, 6.15)."""
    rsp = cpu.gpr[Reg.RSP]
    if insn.opcode == _LEAVE:
        return not is_canonical(cpu.gpr[Reg.RBP])
    names_memory = (insn.opcode in _WITH_MODRM or insn.opcode >> 8 == _MAP_0F38) and not insn.is_register
    if names_memory and insn.segment is None and insn.base in (Reg.RSP, Reg.RBP):
        return not is_canonical(effective_address(cpu, insn))
    if insn.opcode in _STACK_OPCODES or (insn.opcode == 0xFF and insn.reg & 7 in _GROUP5_STACK) or insn.opcode == 0x8F:
        return not is_canonical(rsp) or not is_canonical(rsp - 1 & _M64)
    return False
