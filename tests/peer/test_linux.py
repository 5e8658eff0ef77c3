"""Debian's kernel, unmodified: to a shell on 1 to 8 CPUs, in both clocks, and every way to end.

Needs what ``make guests`` leaves in out/guests, or in the directory that AIOVM_GUESTS names.
"""

import asyncio
import hashlib
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter

import pytest
from linux_guests import GUESTS, needs
from linux_storm import COMPLAINTS, prepare, storm
from terminal import terminal

from aiovm import snapshot_file
from aiovm.backends import Disk, FileStorage, Overlay
from aiovm.errors import CommandFailed, ConfigError, GuestPanic, StateError
from aiovm.loaders import identify
from aiovm.loaders.image import LoadRequest
from aiovm.loaders.ram import Ram
from aiovm.loaders.unpack import unpack as unpack_kernel
from aiovm.loop import Host, run, run_wall
from aiovm.memory import GuestMemory
from aiovm.trace import HashSink, Kind, Tracer, unpack
from aiovm.vm import Vm

PATIENCE = 300

pytestmark = [pytest.mark.peer, pytest.mark.timeout(900), needs()]


def linux(*, kernel=GUESTS / "vmlinuz", initrd="initrd.gz", cmdline="console=ttyS0 quiet", **options):
    return Vm.linux(kernel, initrd=str(GUESTS / initrd), cmdline=cmdline, **options)


def unpacked():
    """The kernel as its linker made it: an ELF file with Xen's PVH note."""
    image = (GUESTS / "vmlinuz").read_bytes()
    request = LoadRequest(image, "vmlinuz", Ram(GuestMemory(), "vmlinuz"))
    offset, length = struct.unpack_from("<II", image, 0x248)
    return unpack_kernel(request, request.piece(512 * (1 + image[0x1F1]) + offset, length, "payload"))[1]


async def prompt(vm):
    await vm.expect("~ # ", timeout=PATIENCE)


async def sh(vm, command):
    return await vm.shell(command, timeout=PATIENCE)


async def end(vm, command):
    vm.console.type(command + "\n")
    return await vm.finished()


class Overcommitted:
    """A trace's sink: how many halts and kicks came from each vCPU, and the steal time it was told last."""

    def __init__(self):
        self.halts, self.kicks, self.steal, self.preempted = Counter(), Counter(), Counter(), Counter()

    def write(self, batch):
        for record in unpack(batch):
            if record.kind == Kind.HALT:
                self.halts[record.vcpu] += 1
            elif record.kind == Kind.KICK:
                self.kicks[record.vcpu] += 1
            elif record.kind == Kind.STEAL:
                assert record.a >= self.steal[record.vcpu]
                self.steal[record.vcpu] = record.a
                self.preempted[record.vcpu] += record.b

    def close(self):
        pass


@pytest.mark.parametrize(("vcpus", "pcpus"), [(1, 1), (2, 2), (4, 4), (8, 2)])
def test_to_a_shell_in_virtual_time(vcpus, pcpus, tmp_path):
    image = random.Random(vcpus).randbytes(1 << 20)
    (tmp_path / "disk").write_bytes(image)

    async def main():
        seen, trace = Overcommitted(), Tracer()
        if pcpus < vcpus:
            trace.add(seen)
        disk = Disk(Overlay(FileStorage(tmp_path / "disk")))
        async with linux(vcpus=vcpus, host=Host(pcpus, trace=trace), virtio=[disk]) as vm:
            await prompt(vm)
            assert await sh(vm, "nproc") == f"{vcpus}\n"
            assert (await sh(vm, "sha1sum /dev/vda")).split()[0] == hashlib.sha1(
                image, usedforsecurity=False
            ).hexdigest()
            await prepare(vm)
            assert await storm(vm, 0, 1) == vcpus
            log = await sh(vm, "dmesg")
            assert not COMPLAINTS.search(log)
            for fact in (
                "Hypervisor detected: KVM",
                "kvm-clock: Using msrs 4b564d01 and 4b564d00",
                "TSC deadline timer available",
                "Switched APIC routing to physical x2apic",
                "APIC: Switch to symmetric I/O mode setup",
                "ACPI: PM: (supports S0 S5)",
                "Spectre V2 : Mitigation: Enhanced / Automatic IBRS",
            ):
                assert fact in log
            assert "page tables isolation: enabled" not in log
            assert "Retpolines" not in log
            if vcpus > 1:
                for fact in (
                    "kvm-guest: PV spinlocks enabled",
                    "kvm-guest: setup PV IPIs",
                    "kvm-guest: KVM setup pv remote TLB flush",
                    "kvm-guest: setup PV sched yield",
                ):
                    assert fact in log
                # What this kernel does not mention in its log is seen from outside.
                assert all(v.steal.enabled and v.pv.eoi.enabled for v in vm.vcpus)
            if pcpus < vcpus:
                stolen = int((await sh(vm, "grep '^cpu ' /proc/stat")).split()[8])
                assert stolen > 0
                trace.flush()
                for vcpu in range(vcpus):
                    assert min(seen.halts[vcpu], seen.kicks[vcpu], seen.preempted[vcpu]) > 0
                    assert seen.steal[vcpu] > 0
                # The guest counts in ticks of 10 ms what it was told in ns.
                assert sum(seen.steal.values()) // 10_000_000 >= stolen
            outcome = await end(vm, "poweroff -f")
            assert (outcome.reason, outcome.status) == ("power-off", 0)

    run(main())


SCRIPT = """
import sys
from pathlib import Path
from aiovm import HashSink, Host, Tracer, Vm, run

async def main():
    tracer, digest = Tracer(), HashSink()
    tracer.add(digest)
    host = Host(2, trace=tracer)
    guests = Path(sys.argv[1])
    async with Vm.linux(guests / "vmlinuz", initrd=str(guests / "initrd.gz"), vcpus=4, host=host) as vm:
        await vm.expect("~ # ")
        await vm.shell("seq 1 1000 | md5sum & seq 1 1000 | md5sum & wait")
        vm.console.type("poweroff -f\\n")
        outcome = await vm.finished()
        tracer.close()
        print(outcome.now, digest.hexdigest(), hash(vm.console.text) and len(vm.console.text))

run(main())
"""


def test_saved_in_the_middle_of_its_boot_it_comes_to_the_same_shell(tmp_path):
    async def rest(vm, digest):
        vm.trace.add(digest)
        await prompt(vm)
        words = await sh(vm, "nproc; dmesg; cat /proc/interrupts; seq 1 1000 | md5sum")
        assert (await end(vm, "poweroff -f")).reason == "power-off"
        vm.trace.close()
        return words, digest.hexdigest()

    async def first():
        async with linux(vcpus=2, cmdline="console=ttyS0") as vm:
            await asyncio.sleep(0.5)
            assert "~ #" not in vm.console.text
            await vm.pause()
            snapshot_file.write(tmp_path / "boot.snap", vm.save())
            vm.resume()
            return await rest(vm, HashSink())

    async def second():
        snapshot = snapshot_file.read(tmp_path / "boot.snap")
        async with Vm.restore(Host(2), snapshot) as vm:
            vm.start()
            return await rest(vm, HashSink())

    assert run(first()) == run(second())


def test_two_boots_are_the_same_to_the_byte():
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(GUESTS)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert re.fullmatch(r"\d+ [0-9a-f]{32} \d+\n", runs[0])


@pytest.mark.wall
def test_to_a_shell_on_the_wall_clock():
    async def main():
        async with linux(vcpus=4) as vm:
            await prompt(vm)
            assert await sh(vm, "nproc") == "4\n"
            await prepare(vm)
            assert await storm(vm, 0, 1) == 4
            assert not COMPLAINTS.search(await sh(vm, "dmesg"))
            outcome = await end(vm, "reboot -f")
            assert (outcome.reason, outcome.status) == ("reset", 0)

    run_wall(main())


@pytest.mark.wall
def test_a_person_at_a_terminal():
    """``aiovm run`` of a kernel is an interactive shell, on the wall clock and with memory enough, by itself."""
    files = str(GUESTS / "vmlinuz"), "--initrd", str(GUESTS / "initrd.gz")
    with terminal("run", *files, "--append", "console=ttyS0 quiet") as tty:
        assert b"up on 1 CPUs\r\n" in tty.read_until(b"~ # ", PATIENCE)
        tty.type(b"echo $((6 * 7))\r")
        assert b"\r\n42\r\n" in tty.read_until(b"42\r\n~ # ")
        tty.type(b"echo ready; cat\r")
        assert b"\r\nready\r\n" in tty.read_until(b"\r\nready\r\n")
        tty.type(b"twice\r")
        assert b"twice\r\ntwice\r\n" in tty.read_until(b"twice\r\ntwice\r\n")
        tty.type(b"\x03")  # the guest's, not ours
        assert b"~ # " in tty.read_until(b"~ # ")
        tty.type(b"\x01x")
        assert tty.process.wait(60) == 0
        assert tty.process.stderr.read() == b""


def test_its_own_decompressor_numa_and_locks_without_kvm():
    async def main():
        async with linux(vcpus=4, memory="4G", nodes=2, unpack=False, cmdline="console=ttyS0 quiet nopvspin") as vm:
            await prompt(vm)
            log = await sh(vm, "dmesg")
            assert "ACPI: SRAT: Node 1 PXM 1 [mem 0x100000000-0x13fffffff]" in log
            assert 'PV spinlocks disabled, forced by "nopvspin" parameter' in log
            assert not COMPLAINTS.search(log)
            assert (await sh(vm, "ls -d /sys/devices/system/node/node*")).count("node/node") == 2

    run(main())


def test_bash_and_python_on_a_kernel_that_begins_by_pvh(tmp_path):
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(unpacked())
    assert identify(kernel.read_bytes()) == "pvh"

    async def main():
        async with linux(kernel=kernel, initrd="initrd-python.gz", memory="512M", vcpus=2) as vm:
            await prompt(vm)
            program = "import hashlib; print(hashlib.sha256(b'aiovm' * 1000).hexdigest())"
            assert (await sh(vm, f'python3 -c "{program}"')).strip() == hashlib.sha256(b"aiovm" * 1000).hexdigest()
            assert "GNU bash" in await sh(vm, "bash --version")

    run(main())


def test_a_panic_is_an_error_with_its_last_lines():
    async def main(how):
        async with linux(cmdline=f"console=ttyS0 quiet rdinit=/none {how}") as vm:
            with pytest.raises(GuestPanic, match="Unable to mount root fs") as caught:
                await vm.expect("never", timeout=PATIENCE)
            assert any("Call Trace" in line for line in caught.value.lines)
            with pytest.raises(GuestPanic):
                await vm.finished()

    for how in ("panic=-1", "panic=0"):
        with pytest.raises(GuestPanic):
            run(main(how))


def test_failed_commands_and_ended_guests_on_a_kernel_that_is_plain_elf(tmp_path):
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(unpacked().replace(b"\x12\0\0\0Xen\0", b"\x12\0\0\0xxx\0"))  # no note of type 18
    assert identify(kernel.read_bytes()) == "vmlinux"

    async def main():
        async with linux(kernel=kernel) as vm:
            await prompt(vm)
            with pytest.raises(CommandFailed, match="status 3"):
                await vm.shell("(echo no; exit 3)", timeout=PATIENCE)
            await end(vm, "poweroff -f")
            with pytest.raises(StateError, match="the guest has ended: power-off"):
                await vm.shell("true")

    run(main())


def test_damaged_files(tmp_path):
    kernel = bytearray((GUESTS / "vmlinuz").read_bytes())
    kernel[0x40_0000] ^= 1
    (tmp_path / "vmlinuz").write_bytes(kernel)

    async def main(kernel, **options):
        async with Vm.linux(kernel, **options):
            pass

    with pytest.raises(ConfigError, match="checksum is wrong"):
        run(main(tmp_path / "vmlinuz"))
    with pytest.raises(ConfigError, match="does not fit RAM"):
        run(main(GUESTS / "vmlinuz", memory="24M"))
    with pytest.raises(ConfigError, match="cannot read the kernel"):
        run(main(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot read module"):
        run(main(GUESTS / "vmlinuz", initrd="/none"))
