"""``aiovm run``: statuses, the one line that goes with them, and what lands in files."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from images import MIB, Load, elf

from aiovm import guests
from aiovm.cli.status import status_of
from aiovm.errors import (
    ConfigError,
    DeadlockError,
    EngineError,
    InternalError,
    LivelockError,
    StateError,
    TimeoutExpired,
    TripleFault,
    UnhandledExit,
)

HELLO = str(guests.path("hello"))

# Flat images begin in real mode at 0000:7C00.
EXIT_21 = bytes.fromhex("b015 e6f4")  # mov al, 0x15; out 0xf4, al
HALT_FOR_EVER = bytes.fromhex("fa f4")  # cli; hlt
NEVER_END = bytes.fromhex("ebfe")  # jmp $
NO_IDT = bytes.fromhex("0f011e077c 0f0b 000000000000")  # lidt [0x7c07]; ud2; a table of one byte
RESET = bytes.fromhex("b0fe e664 ebfe")  # mov al, 0xfe; out 0x64, al: the keyboard controller's reset line
SAY = bytes.fromhex("be0a7c baf803 ac ee ebfc")  # mov si, 0x7c0a; mov dx, 0x3f8; lodsb; out dx, al; again: what follows
POWER_OFF = bytes.fromhex("ba0406 b80020 ef ebfe")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: SLP_EN in PM1 control


@pytest.fixture
def image(tmp_path):
    """A file with these bytes."""

    def write(data):
        path = tmp_path / "guest"
        path.write_bytes(data)
        return str(path)

    return write


def process(*args, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "aiovm", *args],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def one_line(lines):
    assert len(lines) == 1, lines
    assert lines[0].startswith("aiovm: ")
    return lines[0].removeprefix("aiovm: ")


# ---- how guests end -----------------------------------------------------------------------------------------------


def test_the_guest_status_is_the_process_status(aiovm, image):
    assert aiovm("run", image(EXIT_21)) == (43, "", [])


@pytest.mark.parametrize("code", [POWER_OFF, RESET], ids=["power-off", "reset"])
def test_a_clean_end_is_status_0(aiovm, image, code):
    assert aiovm("run", image(code)) == (0, "", [])


def test_what_the_guest_prints_is_printed(aiovm):
    assert aiovm("run", HELLO, "--vcpus", "2", "--pcpus", "1") == (
        1,
        "hello from vCPU 0 of 2\r\nhello from vCPU 1 of 2\r\n",
        [],
    )


def test_in_a_process_of_its_own():
    done = process("run", HELLO)
    assert (done.returncode, done.stdout, done.stderr) == (1, "hello from vCPU 0 of 1\n", "")


@pytest.mark.parametrize("bits", [32, 64])
def test_a_jump_into_nothing_is_a_triple_fault_where_nobody_handles_exceptions(aiovm, image, bits):
    code = bytes.fromhex("b8000000e0 ffe0")  # mov eax, 0xe0000000; jmp rax
    status, out, lines = aiovm("run", image(elf(bits, [Load(MIB, code)], MIB)))
    assert (status, out) == (64, "")
    line = one_line(lines)
    assert "triple fault (vCPU 0, RIP 0xe0000000)" in line
    assert "last exits: #" in line


def test_a_triple_fault(aiovm, image):
    status, out, lines = aiovm("run", image(NO_IDT))
    assert (status, out) == (64, "")
    assert one_line(lines) == "triple fault (vCPU 0, RIP 0x7c05); last exits: #6, triple fault"


def test_a_kernel_panic_is_a_line_and_what_the_kernel_said(aiovm, image):
    said = (
        b"[    0.1] Kernel panic - not syncing: no init\n[    0.1] CPU: 0\n[    0.1] ---[ end Kernel panic - x ]---\n"
    )
    status, out, lines = aiovm("run", image(SAY + said))
    assert (status, out) == (74, said.decode())
    assert lines[0] == "aiovm: the guest's kernel panicked: no init (vCPU 0, RIP 0x7c08)"
    assert [line.strip() for line in lines[1:]] == said.decode().splitlines()


def test_a_guest_that_halts_for_ever_is_a_stall(aiovm, image):
    status, out, lines = aiovm("run", image(HALT_FOR_EVER), "--vcpus", "2")
    assert (status, out) == (68, "")
    line = one_line(lines)
    assert re.search(r"nothing can happen any more at \d+ ns", line)
    assert "vCPU 0 halted at RIP 0x7c02 (last exits: hlt)" in line
    assert "vCPU 1 uninitialized at RIP 0xfff0" in line


def test_a_stall_is_told_as_one_under_a_time_limit_too(aiovm, image):
    status, _, lines = aiovm("run", image(HALT_FOR_EVER), "--timeout", "10s")
    assert status == 68
    assert one_line(lines) == "nothing can happen any more: vCPU 0 halted at RIP 0x7c02 (last exits: hlt)"


def test_a_guest_that_never_ends_runs_into_its_time_limit(aiovm, image):
    status, out, lines = aiovm("run", image(NEVER_END), "--timeout", "1ms")
    assert (status, out) == (70, "")
    assert one_line(lines) == "the guest is not done after 1ms: vCPU 0 runnable at RIP 0x7c00"


def test_the_time_limit_counts_on_the_wall_clock_too(aiovm, image):
    status, _, lines = aiovm("run", image(NEVER_END), "--timeout", "50ms", "--clock", "wall")
    assert status == 70
    assert "not done after 50ms: vCPU 0 runnable" in one_line(lines)


def test_without_a_traceback_in_a_process_of_its_own(image):
    done = process("run", image(NO_IDT))
    assert (done.returncode, done.stdout) == (64, "")
    assert one_line(done.stderr.splitlines()).startswith("triple fault")


def test_an_interruption_from_the_keyboard(image):
    # Says "x" on the serial port, then goes on for ever.
    code = bytes.fromhex("baf803 b078 ee b00a ee ebfe")
    running = subprocess.Popen(
        [sys.executable, "-m", "aiovm", "run", image(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert running.stdout.readline() == b"x\n"
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (130, b"aiovm: interrupted\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (StateError("x"), 2),
        (TripleFault("x", vcpu=0, rip=0), 64),
        (UnhandledExit("x", vcpu=0, rip=0), 66),
        (DeadlockError("x"), 68),
        (LivelockError("x"), 68),
        (TimeoutExpired("x"), 70),
        (EngineError("x"), 72),
        (InternalError("x"), 72),
    ],
)
def test_status_of_each_error(error, status):
    assert status_of(error) == status


# ---- bad images ---------------------------------------------------------------------------------------------------


def test_no_such_image(aiovm, tmp_path):
    status, _, lines = aiovm("run", str(tmp_path / "nothing"))
    assert status == 2
    assert one_line(lines).endswith("nothing: No such file or directory")


TWO = [Load(MIB, b"\xf4" * 64), Load(MIB + 32, b"\xf4" * 64)]
GOOD = elf(64, [Load(MIB, b"\xf4" * 64)], MIB)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (GOOD[:40], "truncated: ELF header .* 0x28 bytes"),
        (GOOD[:150], "truncated: segment 0 .* 0x96 bytes"),
        (elf(64, [Load(MIB, b"\xf4")], MIB, elf_class=3), "ELF class 3"),
        (elf(64, [Load(MIB, b"\xf4")], MIB, machine=0xB7), "machine 0xb7"),
        (elf(64, TWO, MIB), "segment 1 at 0x100020-0x100060 overlaps segment 0"),
        (elf(64, [Load(MIB, b"\xf4", memsz=65 << 20)], MIB), "0x100000-0x4200000 does not fit RAM"),
        (elf(64, [Load(1 << 30, b"\xf4")], 1 << 30), "0x40000000-0x40000001 does not fit RAM"),
    ],
    ids=["empty", "cut in the header", "cut in the segment", "class", "machine", "overlap", "too large", "too high"],
)
def test_bad_images(aiovm, image, data, says):
    status, out, lines = aiovm("run", image(data))
    assert (status, out) == (2, "")
    assert re.search(says, one_line(lines))


def test_a_device_is_no_image(aiovm):
    status, out, lines = aiovm("run", "/dev/zero")
    assert (status, out) == (2, "")
    assert one_line(lines).endswith("cannot read /dev/zero: a device is no image")


@pytest.mark.parametrize("option", ["--console=file:full", "--json=full"])
def test_a_full_disk_is_one_line(aiovm, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").symlink_to("/dev/full")
    status, _, lines = aiovm("run", HELLO, option)
    assert status == 2
    assert re.search("cannot write.*: No space left on device", one_line(lines))


def test_a_trace_on_a_full_disk_is_a_line_and_the_guest_goes_on(aiovm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full.jsonl").symlink_to("/dev/full")
    status, out, lines = aiovm("run", HELLO, "--trace", "full.jsonl")
    assert (status, out) == (1, "hello from vCPU 0 of 1\r\n")
    assert re.search(r"trace sink dropped \(sink: JsonLinesSink, error: .*No space left", one_line(lines))


def test_closed_streams():
    command = (
        f"{sys.executable} -m aiovm run {HELLO} >&-; echo $?; {sys.executable} -m aiovm run /no/such 2>&-; echo $?"
    )
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("1\n2\n", "")


def test_a_fault_in_a_users_policy_is_called_his(aiovm, tmp_path, monkeypatch):
    module = "from aiovm.policy.base import Policy\nclass Bad(Policy):\n"
    module += "    def select_pcpu(self, thread, now):\n        return 1 // 0\n"
    (tmp_path / "faulty.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    status, _, lines = aiovm("run", HELLO, "--policy", "faulty:Bad")
    assert status == 2
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"aiovm: {tmp_path}/faulty.py, line 4: ZeroDivisionError: ")


def test_version(aiovm):
    status, out, lines = aiovm("--version")
    assert (status, lines) == (0, [])
    assert re.fullmatch(r"aiovm \d+\.\d+\.\d+\n", out)


# ---- bad options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vcpus", "0"], "a machine has 1 to 255 vCPUs, not 0"),
        (["--vcpus", "256"], "a machine has 1 to 255 vCPUs, not 256"),
        (["--vcpus", "1" + 20 * "0"], "a machine has 1 to 255 vCPUs, not 10000"),
        (["--vcpus", "x"], "--vcpus"),
        (["--pcpus", "0"], "at least one physical CPU, not 0"),
        (["--pcpus", "1000000000"], "a host has 65536 physical CPUs at most, not 1000000000"),
        (["--seed", "x"], "--seed"),
        (["--seed", "0x10"], "--seed"),
        (["--seed", str(1 << 63)], "bad seed 9223372036854775808"),
        (["--timeout", "5"], "bad duration '5'"),
        (["--timeout", "soon"], "bad duration 'soon'"),
        (["--slice", "6"], "bad duration '6'"),
        (["--slice", "0ms"], "slice of 0 ns"),
        (["--memory", "12Q"], "bad size '12Q'"),
        (["--memory", "0"], "memory of 0x0 bytes"),
        (["--memory", "1000001"], "whole pages"),
        (["--memory", "100000G"], "memory of 0x[0-9a-f]+ bytes: 1M to 1023G"),
        (["--policy", "fare"], "no policy is called 'fare'"),
        (["--policy", "no.such:Thing"], "no.such:Thing"),
        (["--policy", "os:path"], "does not derive"),
        (["--clock", "sundial"], "--clock"),
        (["--console", "stderr"], "bad console 'stderr'"),
        (["--console", "file:/no/such/file"], "cannot write console file /no/such/file: No such file or directory"),
        (["--trace", "trace.txt"], "ends in .pftrace, .json or .jsonl"),
        (["--trace", "/no/such/trace.jsonl"], "/no/such/trace.jsonl': No such file or directory"),
        (["--json", "-"], "cannot write -: name a file"),
        (["--json", "/no/such/result"], "/no/such/result: No such directory"),
        (["--initrd", "/no/such/module"], "cannot read module /no/such/module: No such file or directory"),
        (["--frobnicate"], r"No such option: --frobnicate.*--help"),
        (["another"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(aiovm, options, says):
    status, out, lines = aiovm("run", HELLO, *options)
    assert (status, out) == (2, "")
    assert re.search(says, one_line(lines))


@pytest.mark.parametrize(
    ("args", "says"),
    [(["run"], "which guest? give an image, or a snapshot with --restore"), (["ruin"], "No such command 'ruin'")],
)
def test_usage(aiovm, args, says):
    status, out, lines = aiovm(*args)
    assert (status, out) == (2, "")
    assert says in one_line(lines)


def test_usage_in_a_process_of_its_own():
    done = process("run", HELLO, "--vcpus", "many")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--vcpus" in one_line(done.stderr.splitlines())


def test_alone_it_gives_help(aiovm):
    status, out, lines = aiovm()
    assert (status, lines) == (2, [])
    assert "run" in out
    assert "locks" in out


@pytest.mark.parametrize("args", [["--help"], ["run", "-h"], ["locks", "--help"]])
def test_help_is_not_an_error(aiovm, args):
    status, out, lines = aiovm(*args)
    assert (status, lines) == (0, [])
    assert "Usage: aiovm" in out


# ---- files --------------------------------------------------------------------------------------------------------


def test_json(aiovm, image, tmp_path):
    result = tmp_path / "result.json"
    status, _, _ = aiovm("run", image(EXIT_21), "--vcpus", "2", "--pcpus", "1", "--json", str(result))
    found = json.loads(result.read_bytes())
    assert status == found["status"] == 43
    assert found["reason"] == "debug-exit"
    assert 0 < found["now_ns"] < 1_000_000
    assert re.fullmatch("[0-9a-f]{32}", found["trace_hash"])
    first, second = found["vcpus"]
    assert (first["index"], first["mp_state"], first["rip"]) == (0, "RUNNABLE", 0x7C04)
    assert first["io_exits"] == 1
    assert (second["index"], second["mp_state"]) == (1, "UNINITIALIZED")
    assert [(p["index"], p["switches"]) for p in found["pcpus"]] == [(0, 2)]
    assert 0 < found["pcpus"][0]["busy_ns"] <= found["now_ns"]


def test_the_same_run_gives_the_same_json(aiovm, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        aiovm("run", HELLO, "--vcpus", "3", "--pcpus", "2", "--json", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_console_in_a_file(aiovm, tmp_path):
    said = tmp_path / "said"
    assert aiovm("run", HELLO, "--console", f"file:{said}") == (1, "", [])
    assert said.read_bytes() == b"hello from vCPU 0 of 1\r\n"


def test_console_into_nothing(aiovm):
    assert aiovm("run", HELLO, "--console", "null") == (1, "", [])


def test_traces(aiovm, image, tmp_path):
    lines, picture = tmp_path / "t.jsonl", tmp_path / "t.pftrace"
    assert aiovm("run", image(EXIT_21), "--trace", f"{lines},{picture}") == (43, "", [])
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    access = next(r for r in records if r["kind"] == "pio")
    assert (access["port"], access["value"]) == (0x100F4, 0x15)
    assert (records[-1]["kind"], records[-1]["status"]) == ("end", 43)
    assert picture.stat().st_size > 0


def test_the_command_line_reaches_the_guest(aiovm):
    assert aiovm("run", HELLO, "--append", "cpus=many") == (5, "not a number: many\r\n", [])
