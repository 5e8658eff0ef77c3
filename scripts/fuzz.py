"""Hostile guests for as long as you like: ``make fuzz``, or ``python scripts/fuzz.py --seconds 3600 --seed 1``.

Each case (tests/machine_fuzz.py) runs in a child process, so that a crash of the core is a finding with a seed and not
the end of the hunt; one that is not done in time counts as a hang. Every case is played twice in the child, and both
must leave the same trace, registers and memory.
"""

from __future__ import annotations

import faulthandler
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
_console = Console()


def _work(first: int, only: bool) -> None:
    """In the child: a line before each case, and one after it."""
    faulthandler.enable()
    sys.path.insert(0, str(ROOT / "tests"))
    from machine_fuzz import Broken, play

    seed = first
    while True:
        print("begin", seed, flush=True)
        try:
            played = play(seed)
            again = play(seed)
            if played != again:
                raise Broken(f"two runs differ: {played} and {again}")
            print("end", seed, played.how, flush=True)
        except Broken as error:
            print("broken", seed, str(error).replace("\n", " "), flush=True)
            if only:
                raise
        if only:
            return
        seed += 1


class _Child:
    """A process that plays case after case."""

    def __init__(self, first: int) -> None:
        command = [sys.executable, __file__, "--seed", str(first), "--worker"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._buffer = b""

    def line(self, timeout: float) -> list[str] | None:
        """The next line's words; [] at the end, None when nothing comes in time."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            more = self.process.stdout.read1(65536)
            if not more:
                return []
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode().split(" ", 2)

    def end(self) -> str:
        """Make sure that it is gone; what it said last, and how it ended."""
        self.process.kill()
        _, errors = self.process.communicate()
        status = self.process.returncode
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"{how}\n{errors.decode()[-2000:]}"


def main(
    seconds: Annotated[float, typer.Option(help="Stop after this time.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The first case.")] = 0,
    cases: Annotated[int, typer.Option(help="Stop after so many cases; 0: no end.")] = 0,
    hang: Annotated[float, typer.Option(help="A case that takes longer (s) hangs.")] = 60.0,
    one: Annotated[bool, typer.Option(help="Play this one case here, with the traceback.")] = False,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Play cases; status 1 when one of them broke something."""
    if one or worker:
        _work(seed, only=one)
        return
    begin = time.monotonic()
    outcomes: Counter[str] = Counter()
    failures: list[int] = []

    def failed(at: int, why: str) -> None:
        failures.append(at)
        _console.print(f"[red]seed {at}[/red]: {why}", highlight=False)
        _console.print(f"  again: {sys.executable} scripts/fuzz.py --seed {at} --one", highlight=False)

    child = _Child(seed)
    current, done = seed, 0
    with _console.status("") as status:
        while time.monotonic() - begin < seconds and (not cases or done < cases):
            words = child.line(hang)
            if words and words[0] == "begin":
                current = int(words[1])
                continue
            done += 1
            if words and words[0] == "end":
                outcomes[words[2]] += 1
            elif words:
                failed(current, words[2])
            else:
                failed(current, f"a hang: over {hang:.0f} s" if words is None else f"a crash: {child.end()}")
                child.end()
                child = _Child(current + 1)
            spent = time.monotonic() - begin
            status.update(f"{done} cases, {len(failures)} failures, {spent:.0f} s, {done / spent:.1f} a second")
    child.end()
    rate = done / (time.monotonic() - begin)
    _console.print(
        f"{done} cases from seed {seed}, {rate:.1f} a second: {dict(outcomes)}; failures: {failures or 'none'}"
    )
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
