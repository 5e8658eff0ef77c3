"""The x87 and SSE registers inside the core, as ``struct kvm_fpu``.

The core keeps the stack by physical register with its top beside it, the tags as bytes (1 is empty), and the rounding
and exception modes decoded from FCW and MXCSR; so those two are stored through the public API, which decodes them.

Offsets: QEMU 5.0.1's ``CPUX86State``, of the pinned build; ``tests/unit/test_vcpu_state.py`` compares them with what
guest code stores by FXSAVE.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aiovm.engine.unicorn import lib
from aiovm.errors import ConfigError
from aiovm.kvm_structs import KvmFpu

if TYPE_CHECKING:
    from aiovm.engine.unicorn.context import UnicornContext

__all__ = ["read_fpu", "write_fpu"]

#: fpstt, fpus (without the top), fpuc, fptags; the registers; fpop, fpip, fpdp; mxcsr; XMM registers, 64 bytes apart.
_HEAD: Final = struct.Struct("<IHH8s")
_HEAD_AT, _STACK, _POINTERS_AT, _MXCSR, _XMM, _XMM_STRIDE = 0x25C, 0x270, 0x2F0, 0x330, 0x338, 64
_POINTERS: Final = struct.Struct("<H6xQQ")
_TOP: Final = 0x3800


def read_fpu(context: UnicornContext) -> KvmFpu:
    """KVM_GET_FPU."""
    data = context.state.q.cast("B")
    top, status, control, tags = _HEAD.unpack_from(data, _HEAD_AT)
    opcode, ip, dp = _POINTERS.unpack_from(data, _POINTERS_AT)
    return KvmFpu(
        fpr=tuple(bytes(data[at : at + 10]) + bytes(6) for at in (_STACK + 16 * (top + i & 7) for i in range(8))),
        fcw=control,
        fsw=status & ~_TOP | top << 11,
        ftwx=sum(1 << i for i in range(8) if not tags[i]),
        last_opcode=opcode,
        last_ip=ip,
        last_dp=dp,
        xmm=tuple(bytes(data[at : at + 16]) for at in range(_XMM, _XMM + 16 * _XMM_STRIDE, _XMM_STRIDE)),
        mxcsr=int.from_bytes(data[_MXCSR : _MXCSR + 4], "little"),
    )


def write_fpu(context: UnicornContext, fpu: KvmFpu) -> None:
    """KVM_SET_FPU."""
    if fpu.mxcsr >> 16:
        raise ConfigError(f"KvmFpu.mxcsr: {fpu.mxcsr:#x} has reserved bits (EINVAL)")
    engine = context.engine
    engine.load(context)
    data = context.state.q.cast("B")
    top = fpu.fsw >> 11 & 7
    tags = bytes(not fpu.ftwx >> i & 1 for i in range(8))
    _HEAD.pack_into(data, _HEAD_AT, top, fpu.fsw & ~_TOP, fpu.fcw, tags)
    for index, value in enumerate(fpu.fpr):
        at = _STACK + 16 * (top + index & 7)
        data[at : at + 10] = value[:10]
    _POINTERS.pack_into(data, _POINTERS_AT, fpu.last_opcode, fpu.last_ip, fpu.last_dp)
    for index, value in enumerate(fpu.xmm):
        data[_XMM + _XMM_STRIDE * index : _XMM + _XMM_STRIDE * index + 16] = value
    engine.core.sync_out()
    engine.core.write_register(lib.x86.UC_X86_REG_FPCW, fpu.fcw)
    engine.core.write_register(lib.x86.UC_X86_REG_MXCSR, fpu.mxcsr)
    engine.core.sync_in()
