"""Debian's kernel and its own virtio modules drive every device, in virtual time and on the wall clock.

Needs what ``make guests`` leaves in out/guests, or in the directory that AIOVM_GUESTS names.
"""

import asyncio
import hashlib
import random

import pytest
from linux_guests import GUESTS, needs

from aiovm import snapshot_file
from aiovm.backends import ConsolePort, Disk, Entropy, FileStorage, Overlay, UserNet, Vsock
from aiovm.loop import Host, run, run_wall
from aiovm.trace import HashSink, Tracer
from aiovm.vm import Vm

PATIENCE = 300

pytestmark = [pytest.mark.peer, pytest.mark.timeout(900), needs()]

LEASE = (
    r'printf "#!/bin/sh\nif [ \$1 = bound ]; then ifconfig \$interface \$ip netmask \$subnet;'
    r' route add default gw \$router; echo nameserver \$dns > /etc/resolv.conf; fi\n" > /tmp/lease;'
    " mkdir -p /etc; chmod +x /tmp/lease; ifconfig eth0 up; udhcpc -s /tmp/lease -i eth0 -n -q"
)


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(4 << 20))
    return path


def linux(host=None, initrd="initrd.gz", **options):
    return Vm.linux(GUESTS / "vmlinuz", initrd=str(GUESTS / initrd), host=host, **options)


async def prompt(vm):
    await vm.expect("# ", timeout=PATIENCE)


async def sh(vm, command):
    return await vm.shell(command, timeout=PATIENCE)


async def every_device(vm, image, console, net):
    """What a guest with a shell can do with each of them."""
    before = image.read_bytes()
    assert (await sh(vm, "md5sum < /dev/vda")).split()[0] == md5(before)
    await sh(vm, "dd if=/dev/zero of=/dev/vda bs=64k count=8 conv=fsync")
    await sh(vm, "echo 3 > /proc/sys/vm/drop_caches")
    assert (await sh(vm, "md5sum < /dev/vda")).split()[0] == md5(bytes(8 << 16) + before[8 << 16 :])
    assert image.read_bytes() == before
    assert (await sh(vm, "cat /sys/block/vda/serial")).strip() == "root"

    assert int(await sh(vm, "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c")) == 16

    await sh(vm, "(echo from hvc0; read x; echo got $x) < /dev/hvc0 > /dev/hvc0 &")
    reader, writer = console.streams
    assert await reader.readuntil(b"\n") == b"from hvc0\r\n"
    writer.write(b"typed\n")
    assert await reader.readuntil(b"got typed\r\n")

    page = random.Random(2).randbytes(200_000)

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page)

    net.listen(80, serve)
    await sh(vm, LEASE)
    assert " 0% packet loss" in await sh(vm, "ping -c 2 10.0.2.2")
    assert (await sh(vm, "wget -q -O - http://db.internal/ | md5sum")).split()[0] == md5(page)

    await sh(vm, "(nc -l -p 23 -e /bbin/cat &) 2>/dev/null; sleep 0.2")
    reader, writer = await net.connect(23)
    writer.write(page)
    assert await reader.readexactly(len(page)) == page
    writer.close()
    await writer.wait_closed()

    assert (await vm.shell('dmesg | grep -E "BUG|WARNING|virtio.*(broken|rror)"', timeout=PATIENCE, check=False)) == ""


@pytest.mark.parametrize("runner", [run, pytest.param(run_wall, marks=pytest.mark.wall)])
def test_a_shell_uses_every_device(runner, image):
    async def main():
        console, net = ConsolePort(), UserNet(names={"db.internal": "10.0.2.99"})
        disk = Disk(Overlay(FileStorage(image)), serial="root")
        async with linux(vcpus=2, virtio=[console, disk, Entropy(), net]) as vm:
            await prompt(vm)
            await every_device(vm, image, console, net)

    runner(main())


def test_two_runs_with_devices_are_the_same_run(image):
    """The disk's thread, the sockets' tasks and the guest's entropy leave no mark of the host."""

    async def main():
        sink = HashSink()
        trace = Tracer()
        trace.add(sink)
        net, served = UserNet(), asyncio.Event()

        async def serve(reader, writer):
            writer.write(md5(await reader.read()).encode())
            served.set()

        net.listen(7, serve)
        disk = Disk(Overlay(FileStorage(image)))
        async with linux(Host(1, trace=trace), vcpus=2, virtio=[disk, Entropy(), net]) as vm:
            await prompt(vm)
            await sh(vm, LEASE)
            await sh(vm, "(head -c 300000 /dev/vda; head -c 100 /dev/hwrng) | nc 10.0.2.2 7 > /dev/null")
            assert served.is_set()
        trace.close()
        return sink.hexdigest()

    assert run(main()) == run(main())


@needs("initrd-python.gz")
def test_sockets_both_ways():
    async def main():
        vsock = Vsock()

        async def upper(reader, writer):
            writer.write((await reader.read()).upper())

        vsock.listen(5000, upper)
        program = (
            "import socket as s; c = s.socket(s.AF_VSOCK, s.SOCK_STREAM); c.connect((2, 5000)); "
            "c.sendall(b'abc' * 50000); c.shutdown(s.SHUT_WR); f = c.makefile('rb').read(); print(len(f), f[:3]); "
            "l = s.socket(s.AF_VSOCK, s.SOCK_STREAM); l.bind((0xffffffff, 22)); l.listen(); print('listening'); "
            "k, _ = l.accept(); f = k.makefile('rb').read(); k.sendall(f[::-1])"
        )
        async with linux(initrd="initrd-python.gz", memory="512M", virtio=[vsock, Entropy()]) as vm:
            await prompt(vm)
            vm.feed_console(f'python3 -c "{program}"\n'.encode())
            await vm.expect(r"150000 b'ABC'", timeout=PATIENCE)
            await vm.expect("listening\r\n", timeout=PATIENCE)
            reader, writer = await vsock.connect(22)
            data = random.Random(3).randbytes(100_000)
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data[::-1]
            writer.close()

    run(main())


def test_saved_between_two_writes_disk_and_guest_agree(image, tmp_path):
    options = {"initrd": "initrd.gz", "cmdline": "console=ttyS0 quiet"}

    def devices():
        return [Disk(Overlay(FileStorage(image))), Entropy(), ConsolePort()]

    async def rest(vm, digest):
        vm.trace.add(digest)
        await prompt(vm)
        words = await sh(vm, "md5sum /dev/vda; head -c 16 /dev/hwrng | md5sum; cat /proc/interrupts")
        vm.console.type("poweroff -f\n")
        outcome = await vm.finished()
        vm.trace.close()
        return words, outcome, digest.hexdigest()

    async def first():
        async with linux(virtio=devices(), **options) as vm:
            await prompt(vm)
            # Typed, not sh(): that numbers its commands, and the restored program begins at one.
            vm.console.type("head -c 16 /dev/hwrng | md5sum; dd if=/dev/zero of=/dev/vda bs=4k count=100 conv=fsync\n")
            await vm.expect("records out", timeout=PATIENCE)
            await prompt(vm)
            vm.console.type("dd if=/dev/urandom of=/dev/vda bs=4k count=200 seek=300\n")
            await asyncio.sleep(0.002)
            await vm.pause()
            snapshot_file.write(tmp_path / "x.snap", vm.save())
            vm.resume()
            return await rest(vm, HashSink())

    async def second():
        snapshot = snapshot_file.read(tmp_path / "x.snap")
        async with Vm.restore(Host(1), snapshot, virtio=devices()) as vm:
            vm.start()
            return await rest(vm, HashSink())

    found = run(first())
    assert run(second()) == found
