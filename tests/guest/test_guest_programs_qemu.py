"""The guest programs on QEMU's emulator: another machine than ours must agree that they are right.

The locks that halt are not here: that emulator has no kick hypercall.
"""

import os
import shutil
import subprocess

import pytest

from aiovm import guests

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(QEMU is None and not os.environ.get("CI"), reason="no qemu-system-x86_64: run make peers"),
]


def play(name, cmdline, *, vcpus=1):
    """Process status and printed lines."""
    done = subprocess.run(
        [
            *(
                QEMU,
                "-accel",
                "tcg",
                "-no-reboot",
                "-smp",
                str(vcpus),
                "-kernel",
                guests.path(name),
                "-append",
                cmdline,
            ),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-serial", "stdio", "-display", "none", "-monitor", "none"),
        ],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode().split("\r\n")[:-1]


def test_hello():
    assert play("hello", "", vcpus=3) == (1, [f"hello from vCPU {cpu} of 3" for cpu in range(3)])


def test_interrupts():
    assert play("ipi", "cpus=3 rounds=100", vcpus=3) == (1, [f"vCPU {cpu} received 100" for cpu in range(3)])


@pytest.mark.parametrize("mode", ["oneshot", "periodic"])
def test_ticks(mode):
    status, lines = play("ticks", f"mode={mode} n=3 period=2000")
    assert (status, len(lines)) == (1, 3)


@pytest.mark.parametrize("lock", ["tas", "ttas", "ticket", "mcs", "qspinlock"])
def test_lock_excludes(lock):
    status, lines = play("locks", f"lock={lock} cpus=2 think=2000 duration=50000000", vcpus=2)
    assert status == 1
    assert lines[-1].endswith(", 0 lost")


def test_kick_is_refused_where_there_is_none():
    assert play("locks", "lock=pvticket cpus=1")[0] == 5
