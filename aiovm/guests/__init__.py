"""The guest programs that come with aiovm: Multiboot ELF images, with their sources and Makefile beside them.

``hello`` each vCPU says hello; ``locks`` spinlocks under load (:mod:`aiovm.locks.layout` reads its statistics);
``kickrace`` HLT against the kick hypercall; ``ticks`` the LAPIC timer; ``ipi`` interrupts between vCPUs;
``bench`` fixed loops. Each ends by writing port 0xF4: 0 well, 1 failed, 2 refused its options.

``linux/`` has first processes for Linux guests, static and without a library: ``contend`` loads the kernel's spinlocks.
"""

from __future__ import annotations

from pathlib import Path

from aiovm.errors import ConfigError

__all__ = ["linux_path", "names", "path"]

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The programs, in alphabetical order."""
    return tuple(sorted(elf.stem for elf in _HERE.glob("*.elf")))


def path(name: str) -> Path:
    """The image of program ``name``; :class:`ConfigError` when there is none."""
    if name not in names():
        raise ConfigError(f"no guest program {name!r}; there are {', '.join(names())}")
    return _HERE / f"{name}.elf"


def linux_path(name: str) -> Path:
    """The program ``name`` for Linux guests; :class:`ConfigError` when there is none."""
    found = _HERE / "linux" / f"{name}.elf"
    if not found.is_file():
        raise ConfigError(f"no program {name!r} for Linux guests")
    return found
