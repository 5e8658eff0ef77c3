"""GDB itself, on guests of ours: what a person does with it."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
from elftools.elf.elffile import ELFFile

from aiovm import guests

pytestmark = [
    pytest.mark.peer,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("gdb") is None and not os.environ.get("CI"), reason="no gdb: run make peers"),
]


def debug(guest, *commands, vcpus=1, clock="virtual", append="", bits=64):
    """GDB's output and the guest's status, after ``aiovm run --gdb``."""
    run = [sys.executable, "-m", "aiovm", "run", str(guests.path(guest)), "--vcpus", str(vcpus), "--clock", clock]
    machine = subprocess.Popen(
        [*run, "--append", append, "--gdb", "0", "--gdb-bits", str(bits), "--console", "null"],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    try:
        port = re.search(rb"localhost:(\d+)", machine.stderr.readline())[1].decode()
        script = [
            "set confirm off",
            "set pagination off",
            *(["set architecture i386:x86-64"] if bits == 64 else []),
            f"target remote localhost:{port}",
            *commands,
        ]
        words = [word for command in script for word in ("-ex", command)]
        done = subprocess.run(
            ["gdb", "-nx", "-batch", str(guests.path(guest)), *words],
            capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout + done.stderr, machine.wait(timeout=60)
    finally:
        machine.kill()
        machine.stderr.close()
        machine.wait()


def address(guest, symbol):
    elf = ELFFile(io.BytesIO(guests.path(guest).read_bytes()))
    return elf.get_section_by_name(".symtab").get_symbol_by_name(symbol)[0]["st_value"]


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_break_at_a_function_look_and_go_on_to_the_end(clock):
    inside = f"p (long long)$rip - {address('hello', 'guest_main')}"
    said, status = debug(
        "hello", "break guest_main", "continue", "backtrace 1", f"{inside} < 16", "info registers rip cr0 efer",
        "x/2i $pc", "stepi", f"{inside} < 32", "delete", "continue", clock=clock,
    )  # fmt: skip
    assert "Breakpoint 1, " in said
    assert "#0" in said
    assert "$1 = 1" in said
    assert re.search(r"cr0 +0x80\d+", said)
    assert re.search(r"efer +0x\w*d00", said)
    assert "=> 0x" in said
    assert "$2 = 1" in said
    assert status == 1, said


def test_a_guest_in_32_bits():
    said, status = debug(
        "hello", "info registers eip esp", "stepi", "stepi", "p $eax", "x/i $pc", "set var $esi = 7", "p $esi",
        "detach", bits=32,
    )  # fmt: skip
    assert re.search(r"eip +0x20\w+ ", said)
    assert "=> 0x20" in said
    assert "$2 = 7" in said
    assert "rejected" not in said
    assert "too long" not in said
    assert status == 1, said


def test_memory_registers_and_watchpoints():
    at = address("bench", "cell")
    cell, result = f"*(long long *){at:#x}", f"*(long long *){at + 8:#x}"
    said, status = debug(
        "bench", "break guest_main", "continue", "delete",
        "set var $rbx = 0x1234", "p/x $rbx", "set var $xmm0.v4_int32[1] = 77", "p $xmm0.v4_int32[1]",
        f"set var {cell} = 5", f"p {cell}", f"watch {result}", "continue", f"p {result}", "delete", "continue",
        append="loop=mem n=3",
    )  # fmt: skip
    assert "$1 = 0x1234" in said
    assert "$2 = 77" in said
    assert "$3 = 5" in said
    assert f"atchpoint 2: {result}" in said
    assert "Old value = 0" in said
    assert "New value = 6" in said
    assert "$4 = 6" in said
    assert status == 1, said


def test_vcpus_are_threads_and_monitor_tells_more():
    said, status = debug(
        "hello", "info threads", "break guest_main", "continue", "thread 3", "p $rip", "monitor info", "delete",
        "continue", vcpus=4,
    )  # fmt: skip
    assert len(re.findall(r"Thread \d", said)) >= 4
    assert "vCPU 3 uninitialized" in said
    assert status == 1, said


def test_killing_ends_the_machine():
    _, status = debug("hello", "kill")
    assert status == 0
