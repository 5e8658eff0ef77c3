"""Saving and restoring a machine of 64 MB, all of it in use, beside copying 64 MB, and QEMU's migration to a file."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from aiovm import Host, Vm, guests, run, snapshot_file
from benchmarks.common import QEMU, show

if TYPE_CHECKING:
    from aiovm.snapshot import Snapshot

MEMORY = 64 << 20
ROUNDS = 5
#: Words in memory: nothing is zero, and it compresses as code and text do.
FILLER = b"".join(b"%x %x\n" % (n, n * n) for n in range(200_000))


def saved() -> tuple[Snapshot, float]:
    """A paused machine whose memory is full, and the seconds that saving it took."""

    async def main() -> tuple[Snapshot, float]:
        async with Vm(Host(1), memory=MEMORY, console=lambda _: None) as vm:
            vm.load(guests.path("ticks").read_bytes(), cmdline="n=5")
            free = 16 << 20  # above the guest
            memory = vm.memory.map.slots[0].bytes_
            for at in range(free, MEMORY, len(FILLER)):
                memory[at : at + len(FILLER)] = FILLER[: MEMORY - at]
            memory[8 << 20 : free] = memory[free : free + (8 << 20)]
            vm.start()
            await asyncio.sleep(1e-3)
            await vm.pause()
            begin = time.perf_counter()
            snapshot = vm.save()
            seconds = time.perf_counter() - begin
            vm.resume()
            await vm.finished()
            return snapshot, seconds

    return run(main())


def restored(snapshot: Snapshot) -> float:
    """Seconds to make the machine anew, ready to run."""

    async def main() -> float:
        begin = time.perf_counter()
        async with Vm.restore(Host(1), snapshot):
            return time.perf_counter() - begin

    return run(main())


def copied() -> float:
    """Seconds to copy as many bytes into fresh memory."""
    source = (FILLER * 30)[:MEMORY]
    assert len(source) == MEMORY
    begin = time.perf_counter()
    bytearray(source)
    return time.perf_counter() - begin


def through_a_file(snapshot: Snapshot, path: Path) -> tuple[float, float]:
    """Seconds to write and to read."""
    begin = time.perf_counter()
    snapshot_file.write(path, snapshot)
    written = time.perf_counter()
    snapshot_file.read(path)
    return written - begin, time.perf_counter() - written


def qemu_migrates(path: Path) -> float:
    """Seconds that QEMU takes for a machine of this size, whose memory the same words fill, into a file."""
    if QEMU is None:
        return 0.0
    words = path.with_suffix(".words")
    words.write_bytes((FILLER * 60)[: MEMORY - (16 << 20)])
    command = [
        QEMU, "-accel", "tcg", "-m", "64M", "-display", "none", "-serial", "none", "-monitor", "stdio", "-S",
        "-device", f"loader,file={words},addr=0x1000000,force-raw=on",
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def say(line: str) -> str:
            process.stdin.write(f"{line}\ninfo status\n".encode())
            process.stdin.flush()
            heard = b""
            while b"VM status" not in heard:
                heard += process.stdout.readline()
            return heard.decode(errors="replace")

        say("migrate_set_parameter max-bandwidth 100G")
        begin = time.perf_counter()
        heard = say(f'migrate "exec:cat > {path}"')
        seconds = time.perf_counter() - begin
        process.stdin.write(b"quit\n")
        process.stdin.flush()
        process.stdout.read()
    assert re.search("postmigrate|completed", heard), heard
    return seconds


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.snap"
        found = []
        for _ in range(ROUNDS):
            snapshot, saving = saved()
            found.append(
                (
                    copied(),
                    saving,
                    restored(snapshot),
                    *through_a_file(snapshot, path),
                    qemu_migrates(path.with_suffix(".q")),
                )
            )
        size = path.stat().st_size
    columns = [median(column) for column in zip(*found, strict=True)]
    names = [
        "copying 64 MB",
        "save, a value",
        "restore, ready to run",
        "write the file",
        "read it",
        "QEMU, into a file",
    ]
    rows = [
        [name, f"{seconds * 1000:.0f}", f"{seconds / columns[0]:.1f}", f"{seconds / columns[-1]:.2f}" if QEMU else ""]
        for name, seconds in zip(names, columns, strict=True)
        if seconds
    ]
    show(f"A snapshot of 64 MB, all in use (file: {size >> 20} MB)", ("", "ms", "times the copy", "times QEMU"), rows)
