"""The terminal as a guest's serial console: where output goes, raw input, and the keys that are not the guest's.

On a terminal, input is raw (each key goes to the guest, Ctrl-C too), and Ctrl-A begins a command, as in QEMU:
Ctrl-A x leaves, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h lists these. Who is stopped and goes on makes it raw again; who is
terminated leaves it as it was. Input from a pipe or a file goes to the guest as it is.
Only a guest on the wall clock has input: what arrives when would decide a virtual run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HELP", "EscapeKeys", "keyboard", "open_output", "orderly_end"]

_CTRL_A = 1
HELP = b"\r\nCtrl-A x  leave\r\nCtrl-A Ctrl-A  send Ctrl-A\r\nCtrl-A h  this list\r\n"


class EscapeKeys:
    """Ctrl-A and the key behind it, which may come later. ``leave()``, ``show(bytes)``: for the person's eyes."""

    def __init__(self, leave: Callable[[], object], show: Callable[[bytes], object]) -> None:
        self._leave = leave
        self._show = show
        self._escaped = False

    def filter(self, data: bytes) -> bytes:
        """What of ``data`` is for the guest."""
        out = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    self._leave()
                elif key in b"hH?":
                    self._show(HELP)
                else:
                    if key != _CTRL_A:
                        out.append(_CTRL_A)
                    out.append(key)
            elif key == _CTRL_A:
                self._escaped = True
            else:
                out.append(key)
        return bytes(out)


def open_output(where: str) -> tuple[Callable[[bytes], None], Callable[[], None]]:
    """A sink for ``stdio``, ``null`` or ``file:PATH``, and what to call at the end."""
    if where == "null":
        return (lambda _: None), (lambda: None)
    if where == "stdio":
        stream = sys.stdout.buffer
        prompt = sys.stdout.isatty()
        midline = False

        def write(data: bytes) -> None:
            nonlocal midline
            stream.write(data)
            midline = not data.endswith(b"\n")
            if prompt or not midline or len(data) > 1:
                stream.flush()

        def close() -> None:
            if prompt and midline:  # what comes after the guest's prompt is not the guest's
                stream.write(b"\n")
            stream.flush()

        return write, close
    kind, _, path = where.partition(":")
    if kind != "file" or not path:
        raise ConfigError(f"bad console {where!r}: stdio, null or file:PATH")
    try:
        file = open(path, "wb")  # noqa: SIM115  (closed by the caller's close())
    except OSError as error:
        raise ConfigError(f"cannot write console file {path}: {error.strerror}") from error
    return (lambda data: (file.write(data), None)[1]), file.close


@contextmanager
def keyboard(feed: Callable[[bytes], object], leave: Callable[[], object], *, descriptor: int = 0) -> Iterator[None]:
    """While inside, what comes in on ``descriptor`` goes to ``feed``; on the running loop."""
    loop = asyncio.get_running_loop()
    terminal = os.isatty(descriptor)
    keys = EscapeKeys(leave, lambda text: os.write(descriptor, text))

    def readable() -> None:
        data = os.read(descriptor, 4096)
        if not data:
            loop.remove_reader(descriptor)
        elif terminal:
            feed(keys.filter(data))
        else:
            feed(data)

    try:
        loop.add_reader(descriptor, readable)
    except OSError:  # a file, which nobody needs to wait for
        while data := os.read(descriptor, 1 << 20):
            feed(data)
        yield
        return
    before = termios.tcgetattr(descriptor) if terminal else None
    try:
        if terminal:
            tty.setraw(descriptor)
            loop.add_signal_handler(signal.SIGCONT, tty.setraw, descriptor)
        yield
    finally:
        loop.remove_reader(descriptor)
        if before is not None:
            loop.remove_signal_handler(signal.SIGCONT)
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does; then the process ends by them, as its parent expects."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        signal.raise_signal(signal.SIGINT)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])
