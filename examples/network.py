"""A Linux guest fetches a page from this program and sums a disk; nothing leaves the process. After ``make guests``."""

import os
import tempfile
from asyncio import StreamReader, StreamWriter
from pathlib import Path

import aiovm
from aiovm.backends import Disk, FileStorage, Overlay, UserNet

GUESTS = Path(os.environ.get("AIOVM_GUESTS", "out/guests"))
PAGE = b"HTTP/1.0 200 OK\r\nContent-Length: 18\r\n\r\nhello from asyncio"
LEASE = "#!/bin/sh\nifconfig $interface ${ip:-0.0.0.0}\nroute add default gw $router 2>/dev/null; true\n"


async def serve(reader: StreamReader, writer: StreamWriter) -> None:
    request = await reader.readuntil(b"\r\n\r\n")
    print("asked for:", request.split(b"\r\n")[0].decode())
    writer.write(PAGE)


async def main(image: Path) -> None:
    net, disk = UserNet(), Disk(Overlay(FileStorage(image)))
    net.listen(80, serve)
    devices = [disk, net]
    async with aiovm.Vm.linux(GUESTS / "vmlinuz", initrd=str(GUESTS / "initrd.gz"), virtio=devices) as vm:
        await vm.expect("~ # ")
        print("disk:", await vm.shell("md5sum < /dev/vda"), end="")
        await vm.shell("dd if=/dev/zero of=/dev/vda bs=1k count=1 conv=fsync 2>/dev/null")
        await vm.shell(
            f"printf '{LEASE}' > /tmp/lease; chmod +x /tmp/lease; ifconfig eth0 up; udhcpc -q -i eth0 -s /tmp/lease"
        )
        print("page:", await vm.shell("wget -q -O - http://10.0.2.2/"))


with tempfile.TemporaryDirectory() as folder:
    image = Path(folder) / "disk.img"
    image.write_bytes(bytes(range(256)) * 256)
    aiovm.run(main(image))
    print("the file is as it was:", image.read_bytes() == bytes(range(256)) * 256)
