"""libunicorn's functions, called raw: the binding's wrappers cost several microseconds each.

``lib`` is the library that the ``unicorn`` package loaded. Calls that run guest code exist twice: with the
GIL released (the wall clock's worker thread) and held (virtual time, where nothing else runs and giving the
lock away costs more than the slice).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import unicorn.unicorn_py3.unicorn as binding
from unicorn import unicorn_const, x86_const

__all__ = [
    "HOOK_ACCESS_T",
    "HOOK_BLOCK_T",
    "HOOK_EDGE_T",
    "HOOK_INTR_T",
    "HOOK_IN_T",
    "HOOK_MEM_T",
    "HOOK_OUT_T",
    "HOOK_SYSCALL_T",
    "address_of",
    "check",
    "const",
    "ctl",
    "hook_add",
    "internal",
    "open_core",
    "words",
    "x86",
]

const = unicorn_const
x86 = x86_const
raw = binding.uclib
_holding = ctypes.PyDLL(raw._name)


def _version() -> tuple[int, int, int]:
    # major << 24 | minor << 16 | patch << 8 | extra
    number = raw.uc_version(None, None)
    return number >> 24, number >> 16 & 0xFF, number >> 8 & 0xFF


VERSION = _version()

HOOK_INTR_T = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
HOOK_BLOCK_T = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)
HOOK_EDGE_T = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p)
HOOK_IN_T = ctypes.CFUNCTYPE(c_uint32, c_void_p, c_uint32, c_int, c_void_p)
HOOK_OUT_T = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_uint32, c_void_p)
HOOK_SYSCALL_T = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
HOOK_ACCESS_T = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_uint64, c_int, c_int64, c_void_p)
HOOK_MEM_T = ctypes.CFUNCTYPE(ctypes.c_bool, c_void_p, c_int, c_uint64, c_int, c_int64, c_void_p)
MMIO_READ_T = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint32, c_void_p)
MMIO_WRITE_T = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_uint64, c_void_p)


def _prototype(name: str, *arguments: type, holding: bool = False) -> ctypes._NamedFuncPointer:
    # A fresh function object: the binding's own prototypes stay as they are.
    library = _holding if holding else ctypes.CDLL(raw._name)
    function = library[name]
    function.argtypes = arguments
    function.restype = c_int
    return function


uc_open = _prototype("uc_open", c_int, c_int, c_void_p)
uc_close = _prototype("uc_close", c_void_p)
uc_emu_start = _prototype("uc_emu_start", c_void_p, c_uint64, c_uint64, c_uint64, c_size_t)
uc_emu_start_holding = _prototype("uc_emu_start", c_void_p, c_uint64, c_uint64, c_uint64, c_size_t, holding=True)
uc_emu_stop = _prototype("uc_emu_stop", c_void_p, holding=True)
uc_reg_read = _prototype("uc_reg_read", c_void_p, c_int, c_void_p, holding=True)
uc_reg_write = _prototype("uc_reg_write", c_void_p, c_int, c_void_p, holding=True)
uc_mem_map_ptr = _prototype("uc_mem_map_ptr", c_void_p, c_uint64, c_uint64, c_uint32, c_void_p)
uc_mem_protect = _prototype("uc_mem_protect", c_void_p, c_uint64, c_uint64, c_uint32)
uc_mem_unmap = _prototype("uc_mem_unmap", c_void_p, c_uint64, c_uint64)
uc_mmio_map = _prototype("uc_mmio_map", c_void_p, c_uint64, c_uint64, c_void_p, c_void_p, c_void_p, c_void_p)
uc_context_alloc = _prototype("uc_context_alloc", c_void_p, c_void_p)
uc_context_save = _prototype("uc_context_save", c_void_p, c_void_p, holding=True)
uc_context_restore = _prototype("uc_context_restore", c_void_p, c_void_p, holding=True)
uc_context_free = _prototype("uc_context_free", c_void_p)
uc_vmem_read = _prototype("uc_vmem_read", c_void_p, c_uint64, c_uint32, c_void_p, c_size_t, holding=True)
uc_vmem_translate = _prototype("uc_vmem_translate", c_void_p, c_uint64, c_uint32, c_void_p, holding=True)
uc_hook_del = _prototype("uc_hook_del", c_void_p, c_size_t)
uc_ctl_0 = _prototype("uc_ctl", c_void_p, c_int, holding=True)

_variadic = ctypes.CDLL(raw._name)

#: uc_ctl codes: type | arguments << 26 | direction << 30 (1 write, 2 read), as C's signed int.
CTL_EXITS_ENABLE = const.UC_CTL_UC_USE_EXITS | 1 << 26 | 1 << 30
CTL_TLB_FLUSH = const.UC_CTL_TLB_FLUSH | 1 << 30
CTL_TB_FLUSH = const.UC_CTL_TB_FLUSH | 1 << 30
CTL_CPU_MODEL = const.UC_CTL_CPU_MODEL | 1 << 26 | 1 << 30
CTL_TCG_BUFFER = const.UC_CTL_TCG_BUFFER_SIZE | 1 << 26 | 1 << 30


def ctl(handle: c_void_p, code: int, *arguments: ctypes.c_uint64 | ctypes.c_uint32 | ctypes.c_int) -> int:
    """``uc_ctl`` with arguments of the right C type; returns the error number."""
    function = _variadic["uc_ctl"]
    function.restype = c_int
    result: int = function(handle, c_int(code), *arguments)
    return result


def open_core(out: c_void_p) -> int:
    """A 64-bit core of the model that knows most instructions (Skylake-Server) into ``out``; the error number."""
    return uc_open(const.UC_ARCH_X86, const.UC_MODE_64, ctypes.byref(out)) or ctl(
        out, CTL_CPU_MODEL, c_int(x86.UC_CPU_X86_SKYLAKE_SERVER)
    )


def hook_add(handle: c_void_p, kind: int, callback: int, user: int, *extra: c_int, out: c_size_t | None = None) -> int:
    """Add a hook over all addresses; ``callback`` and ``user`` are addresses, ``out`` gets what :func:`uc_hook_del`
    takes. Returns the error number."""
    function = _variadic["uc_hook_add"]
    function.restype = c_int
    hook = c_size_t() if out is None else out
    result: int = function(
        handle, ctypes.byref(hook), c_int(kind), c_void_p(callback), c_void_p(user), c_uint64(1), c_uint64(0), *extra
    )
    return result


def address_of(callback: ctypes._FuncPointer) -> int:
    """A C function's address, for a hook."""
    value = ctypes.cast(callback, c_void_p).value
    assert value is not None
    return value


def internal(name: str) -> int:
    """The address of a function of the core's own, which the library exports beside its API; 0 where it does not."""
    try:
        return address_of(raw[name])
    except AttributeError:
        return 0


def words(error: int) -> str:
    """Unicorn's words for an error number."""
    function = raw.uc_strerror
    text = function(error)
    return text.decode() if isinstance(text, bytes) else str(text)


def check(error: int, what: str) -> None:
    """``EngineError`` unless ``error`` is 0."""
    if error:
        from aiovm.errors import EngineError

        raise EngineError(f"{what}: Unicorn error {error} ({words(error)})")
