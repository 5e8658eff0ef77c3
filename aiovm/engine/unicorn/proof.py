"""The self-test at start-up: does this Unicorn keep its state where :mod:`~aiovm.engine.unicorn.layout` says?

Registers are set through the public API and read through the pointers, and back. One disagreement, or another
version, and the engine takes the public path.
"""

from __future__ import annotations

import ctypes
import functools

from aiovm.engine.unicorn import lib
from aiovm.engine.unicorn.layout import (
    CONTEXT_PAYLOAD,
    CPU_ENV,
    CPU_ICOUNT_DECR,
    CPU_TO_ENV,
    ENV_END,
    FEATURES,
    UC_CPU,
    Env,
)

__all__ = ["layout_holds"]

_x86 = lib.x86
_PROBES = (
    (_x86.UC_X86_REG_RAX, Env.REGS),
    (_x86.UC_X86_REG_RBX, Env.REGS + 24),
    (_x86.UC_X86_REG_R15, Env.REGS + 120),
    (_x86.UC_X86_REG_RIP, Env.EIP),
    (_x86.UC_X86_REG_CR2, Env.CR + 16),
)


@functools.cache
def layout_holds() -> bool:
    """Whether the pointers may be used; decided once a process."""
    if lib.VERSION[:3] != (2, 1, 4) or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    uc = ctypes.c_void_p()
    if lib.open_core(uc) or uc.value is None:
        return False
    try:
        return _compare(uc, uc.value)
    finally:
        lib.uc_close(uc)


def _compare(uc: ctypes.c_void_p, handle: int) -> bool:
    value = ctypes.c_uint64()
    at = ctypes.byref(value)
    if lib.uc_reg_read(uc, _x86.UC_X86_REG_RAX, at):  # the state exists after the first call
        return False
    context = ctypes.c_void_p()
    if lib.uc_context_alloc(uc, ctypes.byref(context)) or context.value is None:
        return False
    try:
        # The payload of the public context tells how the state must begin: a wrong pointer is noticed before it
        # is followed for more than one word.
        cpu = ctypes.c_uint64.from_address(handle + UC_CPU).value
        if not cpu or ctypes.c_uint64.from_address(cpu + CPU_ENV).value != cpu + CPU_TO_ENV:
            return False
        if ctypes.c_uint64.from_address(cpu + CPU_ICOUNT_DECR).value >> 12 < 1:
            return False
        env = cpu + CPU_TO_ENV
        if any(ctypes.c_uint64.from_address(env + at).value != has for at, (has, _) in FEATURES.items()):
            return False
        for n, (register, offset) in enumerate(_PROBES):
            pattern = 0x1122_3344_0000_1000 + 0x1111 * n if register != _x86.UC_X86_REG_CR2 else 0x1234_5000
            value.value = pattern
            if lib.uc_reg_write(uc, register, at) or ctypes.c_uint64.from_address(env + offset).value != pattern:
                return False
            ctypes.c_uint64.from_address(env + offset).value = pattern ^ 0xFF00
            value.value = 0
            if lib.uc_reg_read(uc, register, at) or value.value != pattern ^ 0xFF00:
                return False
        if lib.uc_context_save(uc, context):
            return False
        saved = ctypes.string_at(context.value + CONTEXT_PAYLOAD, ENV_END)
        return saved == ctypes.string_at(env, ENV_END)
    finally:
        lib.uc_context_free(context)
