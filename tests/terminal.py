"""A pseudo-terminal with the command on it: what a person would type and see."""

import os
import pty
import select
import subprocess
import sys
import termios
import time
from contextlib import contextmanager


class Terminal:
    """``ours`` is the person's end, ``its`` the command's; ``before`` how the terminal was set."""

    def __init__(self, *arguments):
        self.ours, self.its = pty.openpty()
        self.before = termios.tcgetattr(self.its)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aiovm", *arguments], stdin=self.its, stdout=self.its, stderr=subprocess.PIPE
        )

    def wait_until_raw(self):
        while termios.tcgetattr(self.its)[3] & termios.ICANON:
            assert self.process.poll() is None
            select.select([], [], [], 0.05)

    def type(self, keys):
        os.write(self.ours, keys)

    def read_until(self, wanted, patience=60):
        said = b""
        deadline = time.monotonic() + patience
        while wanted not in said and time.monotonic() < deadline:
            if select.select([self.ours], [], [], 0.1)[0]:
                said += os.read(self.ours, 4096)
        return said

    def close(self):
        self.process.kill()
        self.process.communicate()
        os.close(self.ours)
        os.close(self.its)


@contextmanager
def terminal(*arguments):
    """``aiovm`` with these arguments on a terminal of its own."""
    started = Terminal(*arguments)
    try:
        yield started
    finally:
        started.close()
