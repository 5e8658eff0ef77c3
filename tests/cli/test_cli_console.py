"""The terminal as a guest's console, on a real pseudo-terminal."""

import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest

from aiovm.cli.console import HELP, EscapeKeys, open_output
from aiovm.errors import ConfigError

#: Echo on COM1 in real mode: wait for LSR bit 0, read, write.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")


class Keys:
    def __init__(self):
        self.left = 0
        self.shown = b""
        self.keys = EscapeKeys(self.leave, self.show)

    def leave(self):
        self.left += 1

    def show(self, text):
        self.shown += text


@pytest.mark.parametrize(
    ("typed", "sent", "left"),
    [
        (b"ls\r", b"ls\r", 0),
        (b"\x03\x1b[A", b"\x03\x1b[A", 0),
        (b"a\x01xb", b"ab", 1),
        (b"\x01X", b"", 1),
        (b"\x01\x01", b"\x01", 0),
        (b"\x01q", b"\x01q", 0),
    ],
)
def test_escape_keys(typed, sent, left):
    whole = Keys()
    assert whole.keys.filter(typed) == sent
    assert whole.left == left
    split = Keys()
    assert b"".join(split.keys.filter(bytes((key,))) for key in typed) == sent
    assert split.left == left


def test_help_is_for_the_person():
    keys = Keys()
    assert keys.keys.filter(b"\x01h") == b""
    assert keys.shown == HELP


def test_output_goes_where_it_was_told(tmp_path):
    write, close = open_output(f"file:{tmp_path}/log")
    write(b"x\n")
    close()
    assert (tmp_path / "log").read_bytes() == b"x\n"
    open_output("null")[0](b"nobody sees")
    for bad in ("stdout", "file:", f"file:{tmp_path}/no/dir"):
        with pytest.raises(ConfigError, match="console"):
            open_output(bad)


@pytest.fixture
def echo(tmp_path):
    """A guest that echoes, on a pseudo-terminal: our end of it, the process, and the terminal's own descriptor."""
    image = tmp_path / "echo.bin"
    image.write_bytes(ECHO)
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiovm", "run", str(image), "--clock", "wall", "--timeout", "60s"],
        stdin=its,
        stdout=its,
        stderr=subprocess.PIPE,
    )
    yield ours, its, process
    process.kill()
    process.communicate()
    os.close(ours)
    os.close(its)


def read_until(descriptor, wanted, patience=60):
    said = b""
    deadline = time.monotonic() + patience
    while wanted not in said and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            said += os.read(descriptor, 4096)
    return said


@pytest.mark.wall
def test_raw_keys_reach_the_guest_and_ctrl_a_x_leaves(echo):
    ours, its, process = echo
    before = termios.tcgetattr(its)
    while termios.tcgetattr(its)[3] & termios.ICANON:  # until the terminal is raw
        assert process.poll() is None
        select.select([], [], [], 0.05)
    os.write(ours, b"a\x03\x01\x01!")
    assert read_until(ours, b"!") == b"a\x03\x01!"
    os.write(ours, b"\x01x")
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    assert termios.tcgetattr(its) == before
