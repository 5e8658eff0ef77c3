"""The terminal as a guest's console, on a real pseudo-terminal."""

import termios

import pytest
from terminal import terminal

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


@pytest.mark.wall
def test_raw_keys_reach_the_guest_and_ctrl_a_x_leaves(tmp_path):
    image = tmp_path / "echo.bin"
    image.write_bytes(ECHO)
    with terminal("run", str(image), "--clock", "wall", "--timeout", "60s") as tty:
        tty.wait_until_raw()
        tty.type(b"a\x03\x01\x01!")
        assert tty.read_until(b"!") == b"a\x03\x01!"
        tty.type(b"\x01x")
        assert tty.process.wait(60) == 0
        assert tty.read_until(b"\n") == b"\r\n"  # the shell's prompt gets a line of its own
        assert tty.process.stderr.read() == b""
        assert termios.tcgetattr(tty.its) == tty.before
