"""What tests of the command share."""

import signal
import sys

import pytest
import structlog

from aiovm.cli import main


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def aiovm(monkeypatch, capfd):
    """The command, in this process: status, what it printed, and its lines on standard error."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["aiovm", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return left.value.code, out, err.splitlines()

    yield call
    structlog.reset_defaults()  # what the command sets ends with its process; this one goes on
