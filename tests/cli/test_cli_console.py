"""The terminal as a guest's console, on a real pseudo-terminal."""

import os
import signal
import subprocess
import sys
import termios

import pytest
from terminal import terminal

from aiovm.cli.console import HELP, EscapeKeys, open_output
from aiovm.errors import ConfigError

#: Echo on COM1 in real mode: wait for LSR bit 0, read, write.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee ebf1")
WALL = ("--clock", "wall", "--timeout", "60s")


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


@pytest.mark.wall
def test_raw_keys_reach_the_guest_and_ctrl_a_x_leaves(tmp_path):
    image = tmp_path / "echo.bin"
    image.write_bytes(ECHO)
    with terminal("run", str(image), *WALL) as tty:
        tty.wait_until_raw()
        tty.type(b"a\x03\x01\x01!")
        assert tty.read_until(b"!") == b"a\x03\x01!"
        tty.type(b"\x01x")
        assert tty.process.wait(60) == 0
        assert tty.read_until(b"\n") == b"\r\n"  # the shell's prompt gets a line of its own
        assert tty.process.stderr.read() == b""
        assert termios.tcgetattr(tty.its) == tty.before


@pytest.mark.wall
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_goes_on_is_raw_again_and_who_is_terminated_leaves_the_terminal_as_it_was(number, tmp_path):
    image = tmp_path / "echo.bin"
    image.write_bytes(ECHO)
    with terminal("run", str(image), *WALL, "--trace", f"{tmp_path}/trace.jsonl") as tty:
        tty.wait_until_raw()
        termios.tcsetattr(tty.its, termios.TCSANOW, tty.before)  # a shell does so when a job of its is stopped
        tty.process.send_signal(signal.SIGSTOP)
        tty.process.send_signal(signal.SIGCONT)
        tty.wait_until_raw()
        tty.process.send_signal(number)
        assert tty.process.wait(60) == -number
        assert termios.tcgetattr(tty.its) == tty.before
        assert tty.process.stderr.read() == b""
    assert (tmp_path / "trace.jsonl").read_bytes().endswith(b"}\n")


def start(tmp_path, image, *arguments, **streams):
    """``aiovm run`` of ``image`` as a process."""
    (tmp_path / "guest.bin").write_bytes(image)
    command = [sys.executable, "-m", "aiovm", "run", f"{tmp_path}/guest.bin", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **streams)


@pytest.mark.wall
def test_a_file_is_typed(tmp_path):
    (tmp_path / "keys").write_bytes(b"some words\n" * 100)
    with (tmp_path / "keys").open("rb") as keys:
        running = start(tmp_path, ECHO, *WALL, stdin=keys, stdout=subprocess.PIPE)
        assert running.stdout.read(1100) == b"some words\n" * 100
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60) == (b"", b"aiovm: interrupted\n")


@pytest.mark.wall
def test_all_streams_closed(tmp_path):
    """No file of the command's gets a stream's number: the loop's library would end the process."""
    image = bytes.fromhex("b000 e6f4")  # out 0xF4, 0
    running = start(tmp_path, image, *WALL, preexec_fn=lambda: os.closerange(0, 3))
    assert running.communicate(timeout=60)[1] == b""
    assert running.returncode == 1


def test_nobody_reads(tmp_path):
    """A status of its own: 1, Python's and typer's, would be a guest's that wrote 0."""
    reader, writer = os.pipe()
    os.close(reader)
    image = bytes.fromhex("b061 baf803 ee ebfd")  # write a letter for ever
    running = start(tmp_path, image, stdout=writer)
    os.close(writer)
    assert running.communicate(timeout=60)[1] == b"aiovm: cannot write: Broken pipe\n"
    assert running.returncode == 2
