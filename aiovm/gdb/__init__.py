"""A debugger's view of a machine: GDB's remote protocol over asyncio.

* :mod:`~aiovm.gdb.packets`: framing, checksums, escapes.
* :mod:`~aiovm.gdb.registers`: what GDB is told of this CPU, and the registers in that order.
* :mod:`~aiovm.gdb.control`: stopping and resuming vCPUs, breakpoints, memory.
* :mod:`~aiovm.gdb.server`: the commands.
"""

from __future__ import annotations

from aiovm.gdb.control import DebugSession
from aiovm.gdb.server import GdbServer

__all__ = ["DebugSession", "GdbServer"]
