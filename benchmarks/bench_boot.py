"""Debian's kernel to a shell: aiovm in both clocks beside QEMU TCG; same kernel, same initial file system, in turns.

Each boot is a process of its own, timed from its start to the shell's prompt, so Python's imports and QEMU's firmware
and decompressor are in it. A second table says what the exits of one boot in virtual time were, and what they took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiovm import Vm, run, run_wall
from aiovm.engine.unicorn.engine import UnicornEngine
from aiovm.engine.unicorn.intercepts import Intercepts
from aiovm.engine.unicorn.layout import Intercept
from aiovm.engine.unicorn.syscall import SystemCalls
from aiovm.port import VcpuPort
from benchmarks.common import QEMU, interleaved, show

if TYPE_CHECKING:
    from collections.abc import Callable

GUESTS = Path(os.environ.get("AIOVM_GUESTS") or Path(__file__).parents[1] / "out" / "guests")
PROMPT = "~ # "
_CMDLINE = "console=ttyS0"
_ROUNDS = 3
_INTERCEPTS = {value: name.replace("_", " ") for name, value in vars(Intercept).items() if isinstance(value, int)}
_VECTORS = {1: "#DB", 3: "#BP", 6: "#UD", 13: "#GP", 14: "#PF"}


async def boot(vcpus: int) -> Vm:
    """One machine, from nothing to the prompt; the closed machine."""
    async with Vm.linux(GUESTS / "vmlinuz", initrd=str(GUESTS / "initrd.gz"), cmdline=_CMDLINE, vcpus=vcpus) as vm:
        await vm.expect(PROMPT)
        print("at the prompt", flush=True)
        return vm


def seconds(command: list[str], words: bytes) -> float:
    """From a process's start until it says ``words``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    said = b""
    while words not in said:
        more = os.read(process.stdout.fileno(), 1 << 16)
        if not more:
            raise RuntimeError(f"{command[0]} ended before it said {words!r}; it said {said[-500:]!r}")
        said += more
    took = time.perf_counter() - begin
    process.kill()
    process.communicate()
    return took


def ours(clock: str, vcpus: int) -> float:
    """aiovm's seconds."""
    return seconds([sys.executable, "-m", "benchmarks.bench_boot", clock, str(vcpus)], b"at the prompt")


def qemu(vcpus: int) -> float:
    """QEMU's seconds."""
    assert QEMU is not None
    command = [
        QEMU, "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", str(vcpus), "-m", "256M", "-nodefaults",
        "-nographic", "-serial", "stdio", "-no-reboot", "-kernel", str(GUESTS / "vmlinuz"), "-initrd",
        str(GUESTS / "initrd.gz"), "-append", _CMDLINE,
    ]  # fmt: skip
    return seconds(command, PROMPT.encode())


def intercept_name(number: int) -> str:
    """What an intercept is called."""
    code = number - 0x100
    if Intercept.EXCEPTION <= code < Intercept.EXCEPTION + 32:
        vector = code - Intercept.EXCEPTION
        return _VECTORS.get(vector, f"exception {vector}")
    if code < 0x20:
        return f"{'write' if code & 0x10 else 'read'} CR{code & 0xF}"
    return _INTERCEPTS.get(code, f"{code:#x}")


def counted(vcpus: int) -> tuple[Counter[str], Counter[str], Vm, float]:
    """One boot in virtual time with each Python exit timed: how often, ns, the machine, seconds."""
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    clock = time.perf_counter_ns

    def watch(where: type, method: str, name: Callable[..., str]) -> None:
        function = getattr(where, method)

        def timed(*args: Any) -> Any:
            begin = clock()
            answer = function(*args)
            took = clock() - begin
            key = name(*args)
            counts[key] += 1
            times[key] += took
            return answer

        setattr(where, method, timed)

    VcpuPort.hears_exceptions = property(lambda _: True)
    watch(Intercepts, "on_interrupt", lambda _, number: intercept_name(number))
    watch(VcpuPort, "on_cpuid", lambda *_: "CPUID")
    watch(VcpuPort, "on_rdmsr", lambda *_: "RDMSR")
    watch(VcpuPort, "on_wrmsr", lambda *_: "WRMSR")
    watch(VcpuPort, "on_in", lambda *args: f"IN {args[1]:#x}")
    watch(VcpuPort, "on_out", lambda *args: f"OUT {args[1]:#x}")
    watch(SystemCalls, "on_syscall", lambda *_: "SYSCALL")
    watch(VcpuPort, "on_mmio_read", lambda *_: "MMIO load")
    watch(VcpuPort, "on_mmio_write", lambda *_: "MMIO store")
    watch(VcpuPort, "on_hypercall", lambda *_: "hypercall")
    watch(UnicornEngine, "run", lambda *_: "slices, exits apart")
    begin = time.perf_counter()
    vm = run(boot(vcpus))
    return counts, times, vm, time.perf_counter() - begin


def table(vcpus: int) -> None:
    """Exits by kind and their share of the boot."""
    counts, times, vm, total = counted(vcpus)
    slices = "slices, exits apart"
    exits = sum(took for name, took in times.items() if name != slices)
    times[slices] -= exits
    kinds = [name for name, _ in times.most_common() if name != slices]
    shown, rest = kinds[:14], kinds[14:]
    rows = [
        [name, f"{counts[name]:,}", f"{times[name] / counts[name] / 1000:.1f}", f"{times[name] / total / 1e7:.1f} %"]
        for name in shown
    ]
    number, took = sum(counts[name] for name in rest), sum(times[name] for name in rest)
    rows += [
        ["others", f"{number:,}", f"{took / max(number, 1) / 1000:.1f}", f"{took / total / 1e7:.1f} %"],
        ["all exits in Python", f"{sum(counts[name] for name in kinds):,}", "", f"{exits / total / 1e7:.1f} %"],
        [
            slices,
            f"{counts[slices]:,}",
            f"{times[slices] / counts[slices] / 1000:.1f}",
            f"{times[slices] / total / 1e7:.1f} %",
        ],
        ["PAUSE, in C", f"{vm.engine.budget.struct.pauses:,}", "", ""],
    ]
    show(f"Exits of a boot, {vcpus} vCPUs, {total:.1f} s", ("exit", "number", "us", "share"), rows)


def main() -> None:
    """Measure and print."""
    if not (GUESTS / "initrd.gz").exists():
        print(f"boot: no guests in {GUESTS}; run make guests, or set AIOVM_GUESTS")
        return
    rows = []
    for vcpus in (1, 4):
        ours("virtual", vcpus)  # fills the caches: byte code, files
        measures = [partial(ours, "wall", vcpus), partial(ours, "virtual", vcpus)]
        if QEMU is not None:
            measures.append(partial(qemu, vcpus))
        wall, virtual, *peer = interleaved(*measures, rounds=_ROUNDS)
        row = [str(vcpus), f"{wall:.2f}", f"{virtual:.2f}"]
        if peer:
            row += [f"{peer[0]:.2f}", f"{wall / peer[0]:.2f}", f"{virtual / peer[0]:.2f}"]
        rows.append(row)
    columns = ("vCPUs", "wall s", "virtual s", "QEMU TCG s", "wall / QEMU", "virtual / QEMU")
    show("Process start to shell prompt", columns[: len(rows[0])], rows)
    for vcpus in (1, 4):
        table(vcpus)


if __name__ == "__main__":
    (run if sys.argv[1] == "virtual" else run_wall)(boot(int(sys.argv[2])))
