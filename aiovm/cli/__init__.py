"""The ``aiovm`` command: one module a sub-command.

A mistake of the user's is one line on standard error and status 2, never a traceback; what else a status says is in
:mod:`aiovm.cli.status`.
"""

from __future__ import annotations

import sys

import typer

from aiovm.cli import locks, run
from aiovm.cli.status import INTERRUPTED, status_of
from aiovm.errors import AiovmError

__all__ = ["app", "main"]

app = typer.Typer(
    name="aiovm",
    help="Linux KVM's vCPU as a citizen of asyncio: run x86 guests, and see what overcommit does to their locks.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (run, locks):
    _module.register(app)


def main() -> None:
    """Run the command line; the entry point."""
    try:
        app()
    except AiovmError as error:
        print(f"aiovm: {error}", file=sys.stderr)
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        print("aiovm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
