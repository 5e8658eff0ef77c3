"""Guest code: deterministic slices of about 60,000 instructions, beside bare Unicorn's free run and QEMU TCG.

Bare Unicorn runs the very same loop functions of the bench guest, free: no hook, no limit, paging on with data
pages that are not executable, as the guest sets them up itself.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
from functools import partial

from elftools.elf.elffile import ELFFile
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, x86_const

from aiovm import guests
from benchmarks.common import QEMU, aiovm_seconds, interleaved, qemu_seconds, show

#: loop: rounds, instructions a round, bytes a round.
LOOPS = {"alu": (40_000_000, 3, 8), "mem": (20_000_000, 6, 20), "call": (10_000_000, 5, 12)}
_TABLES = 0x700000
#: Where the loop function returns to, and the run ends.
_RETURN = 0x200300


def unicorn_seconds(loop: str, rounds: int) -> float:
    """Host seconds of one loop function on bare Unicorn."""
    image = guests.path("bench").read_bytes()
    elf = ELFFile(io.BytesIO(image))
    address = elf.get_section_by_name(".symtab").get_symbol_by_name(loop)[0]["st_value"]
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, 8 << 20)
    for segment in elf.iter_segments("PT_LOAD"):
        uc.mem_write(segment["p_paddr"], segment.data())
    for offset, entry in ((0, _TABLES + 0x1003), (0x1000, _TABLES + 0x2003)):
        uc.mem_write(_TABLES + offset, struct.pack("<Q", entry))
    for page in range(4):  # 2 MiB each; only the second holds code
        uc.mem_write(_TABLES + 0x2000 + 8 * page, struct.pack("<Q", page << 21 | 0x83 | (0 if page == 1 else 1 << 63)))
    uc.msr_write(0xC000_0080, 0xD01)
    uc.reg_write(x86_const.UC_X86_REG_CR4, 0x620)
    uc.reg_write(x86_const.UC_X86_REG_CR3, _TABLES)
    uc.reg_write(x86_const.UC_X86_REG_CR0, 0x8000_0033)
    stack = 0x600000
    uc.mem_write(stack, struct.pack("<Q", _RETURN))
    uc.reg_write(x86_const.UC_X86_REG_RSP, stack)
    uc.reg_write(x86_const.UC_X86_REG_RDI, rounds)
    begin = time.perf_counter()
    uc.emu_start(address, _RETURN)
    return time.perf_counter() - begin


def one(side: str, loop: str) -> float:
    """Host seconds of ``loop`` on "aiovm" or "unicorn"."""
    rounds, instructions, size = LOOPS[loop]
    if side == "unicorn":
        return unicorn_seconds(loop, rounds)
    beat = 60_000 // instructions * size // 4  # ns at 0.25 ns a code byte
    return aiovm_seconds("bench", f"loop={loop} n={rounds}", beat_ns=beat)


def fresh(side: str, loop: str) -> float:
    """:func:`one` in a process of its own: a loop of three instructions may run at half the speed for as long as its
    translation lies badly, which is drawn anew with each process's addresses."""
    command = [sys.executable, "-m", "benchmarks.bench_engine", side, loop]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def qemu(loop: str, *extra: str) -> float | None:
    """QEMU's seconds for the loop alone: a run less one of a single round."""
    idle, full = (qemu_seconds(f"loop={loop} n={n}", *extra) for n in (1, LOOPS[loop][0]))
    return None if idle is None or full is None else full - idle


def main() -> None:
    """Measure and print."""
    rows = []
    for loop, (rounds, instructions, _) in LOOPS.items():
        total = rounds * instructions / 1e6
        measures = [partial(fresh, "aiovm", loop), partial(fresh, "unicorn", loop)]
        if QEMU is not None:
            measures += [partial(qemu, loop), partial(qemu, loop, "-icount", "shift=0,sleep=off")]
        ours, *others = interleaved(*measures)
        row = [loop, f"{total / ours:.0f}"]
        for other in others:
            row += [f"{total / other:.0f}", f"{other / ours:.2f}"]
        rows.append(row)
    columns = ("loop", "aiovm", "Unicorn", "ratio", "QEMU", "ratio", "icount", "ratio")
    show(
        "Guest code in slices of 60k instructions: MIPS, and aiovm's times the neighbour's",
        columns[: len(rows[0])],
        rows,
    )


if __name__ == "__main__":
    print(one(*sys.argv[1:]))
