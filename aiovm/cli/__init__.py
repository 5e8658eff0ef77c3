"""The ``aiovm`` command: one module a sub-command.

A mistake of the user's is one line on standard error and status 2, never a traceback; what else a status says is in
:mod:`aiovm.cli.status`.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import site
import sys
import traceback
from pathlib import Path
from typing import Annotated, Final

import typer

from aiovm.cli.linux_locks import register as register_linux_locks
from aiovm.cli.locks import register as register_locks
from aiovm.cli.paper import register as register_paper
from aiovm.cli.run import register as register_run
from aiovm.cli.sim import register as register_sim
from aiovm.cli.status import BAD_INPUT, INTERNAL, INTERRUPTED, status_of
from aiovm.cli.sweep import register as register_sweep
from aiovm.errors import AiovmError, GuestPanic
from aiovm.sim.jobs import RunFailed

__all__ = ["app", "main"]

_STDERR: Final = 2
#: What writing says when the disk is full or broken, at whichever moment the file is flushed.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

app = typer.Typer(
    name="aiovm",
    help="Linux KVM's vCPU as a citizen of asyncio: run x86 guests, and see what overcommit does to their locks.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
register_run(app)
register_locks(app)
register_linux_locks(app)
register_sim(app)
register_sweep(app)
register_paper(app)


def main() -> None:
    """Run the command line; the entry point."""
    _streams()
    sys.exit(_run())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"aiovm {importlib.metadata.version('aiovm')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself, not of a sub-command."""


def _streams() -> None:
    """Who closed a standard stream wants to hear nothing; and no file of ours may take a stream's number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for as long as the process lives)


def _run() -> int:
    """The command line's process status; what went wrong is said on standard error."""
    try:
        status: int = app(prog_name="aiovm", standalone_mode=False) or 0
    except GuestPanic as error:
        headline, *lines = str(error).splitlines()
        _say(headline)
        print(*lines, sep="\n", file=sys.stderr)
        return status_of(error)
    except AiovmError as error:
        _say(str(error))
        return status_of(error)
    except typer.TyperException as error:
        if error.format_message():  # else it was a command without its sub-command, and help was given
            _say(f"{error.format_message()} (aiovm --help says more)")
        return BAD_INPUT
    except typer.Abort:
        status = INTERRUPTED
    except SystemExit:  # typer's answer when nobody reads what is written; 1 would be a guest's
        _say(f"cannot write: {os.strerror(errno.EPIPE)}")
        return BAD_INPUT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            _say(f"cannot write: {error.strerror}")
            return BAD_INPUT
        # Statuses of guests are odd, so Python's own 1 would pass for one.
        traceback.print_exc()
        failed = error if isinstance(error, RunFailed) else RunFailed.of(error)
        if _is_a_users(failed.filename):  # a policy of theirs
            _say(str(failed))
            return BAD_INPUT
        _say("this is a fault of aiovm's own: please report it")
        return INTERNAL
    if status == INTERRUPTED:
        _say("interrupted")
    return status


def _is_a_users(filename: str) -> bool:
    """Whether a file is neither ours nor installed."""
    roots = (Path(__file__).parent.parent, *map(Path, site.getsitepackages()), Path(os.__file__).parent)
    return Path(filename).is_file() and not any(Path(filename).is_relative_to(root) for root in roots)


def _say(text: str) -> None:
    print(f"aiovm: {' '.join(text.split())}", file=sys.stderr)
