"""What tests of the command share."""

import sys

import pytest

from aiovm.cli import main


@pytest.fixture
def aiovm(monkeypatch, capfd):
    """The command, in this process: status, what it printed, and its lines on standard error."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["aiovm", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return left.value.code, out, err.splitlines()

    return call
