#!/usr/bin/env python3
"""Linux guests from Debian's packages, without root: ``make guests`` fills out/guests.

=====================  ===========================================================================================
vmlinuz                the newest cloud kernel of the distribution (``linux-image-cloud-amd64``)
initrd.gz              a shell: BusyBox, and the kernel's virtio modules, which it loads when there are such devices
initrd-python.gz       the same with bash, coreutils and Python
MANIFEST               the packages and the SHA-256 of each file
=====================  ===========================================================================================

Needs ``apt-get`` and ``dpkg-deb`` and their configured archives; elsewhere it says so and does nothing. The same
packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from elftools.elf.elffile import ELFFile

from aiovm.loaders.cpio import Archive

__all__ = ["main", "module_dependencies"]

_KERNEL = re.compile(r"linux-image-\S+-cloud-amd64$", re.MULTILINE)
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "vmw_vsock_virtio_transport")
_NOT_NEEDED = {"base-files", "debianutils", "debconf", "dpkg", "gcc-12-base", "tar"}
_SKIPPED_DIRECTORIES = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/info")

_INIT = """#!/bbin/busybox sh
/bbin/busybox mkdir -p /proc /sys /dev /tmp /root /bin
/bbin/busybox mount -t proc proc /proc
/bbin/busybox mount -t sysfs sys /sys
/bbin/busybox mount -t devtmpfs dev /dev
/bbin/busybox mount -t tmpfs tmp /tmp
/bbin/busybox --install -s /bbin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin:/bbin HOME=/root PS1='~ # ' TERM=linux
for device in /sys/bus/platform/devices/LNRO0005:*; do
    [ -e "$device" ] || continue
    while read -r module; do insmod "/modules/$module"; done < /modules/order
    break
done
echo "up on $(nproc) CPUs"
exec setsid cttyhack SHELL
"""


def module_dependencies(path: Path) -> list[str]:
    """The modules that a kernel module needs, by its own account (``.modinfo``)."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".modinfo")
        words = section.data().split(b"\0")
    needs = next((word[8:] for word in words if word.startswith(b"depends=")), b"")
    return [name.replace("-", "_") for name in needs.decode().split(",") if name]


def _modules_in_order(root: Path) -> list[Path]:
    """The virtio modules with what they need, each before whoever needs it."""
    by_name = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    ordered: list[Path] = []

    def visit(name: str) -> None:
        path = by_name.get(name)
        if path is not None and path not in ordered:
            for needed in module_dependencies(path):
                visit(needed)
            ordered.append(path)

    for name in _MODULES:
        visit(name)
    return ordered


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _closure(*roots: str) -> list[str]:
    """Packages and what they depend on, the first of each alternative."""
    found: list[str] = []
    waiting = list(roots)
    while waiting:
        name = waiting.pop(0)
        if name in found or name in _NOT_NEEDED or name.startswith("<"):
            continue
        found.append(name)
        lines = _run("apt-cache", "depends", "-i", name).splitlines()
        after_bar = False
        for line in lines[1:]:
            match = re.match(r"\s(\|| )(?:Pre)?Depends: (\S+)", line)
            if match is not None and not after_bar:
                waiting.append(match[2])
            after_bar = match is not None and match[1] == "|"
    return found


def _unpack(packages: list[str], debs: Path, into: Path) -> None:
    debs.mkdir(parents=True, exist_ok=True)
    into.mkdir(parents=True, exist_ok=True)
    for name in packages:
        if not list(debs.glob(f"{name}_*.deb")):
            _run("apt-get", "download", "-q", name, cwd=debs)
        (deb,) = debs.glob(f"{name}_*.deb")
        _run("dpkg-deb", "-x", str(deb), str(into))


def _base(busybox: Path, modules: list[Path], shell: str) -> Archive:
    archive = Archive()
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("dev/null", 0o20666, device=(1, 3))
    archive.add("init", 0o100755, _INIT.replace("SHELL", shell).encode())
    archive.add("etc/passwd", 0o100644, b"root:x:0:0:root:/root:/bin/sh\n")
    archive.add("etc/group", 0o100644, b"root:x:0:\n")
    archive.add("modules/order", 0o100644, "".join(f"{path.name}\n" for path in modules).encode())
    for path in modules:
        archive.add(f"modules/{path.name}", 0o100644, path.read_bytes())
    archive.add("bbin/busybox", 0o100755, busybox.read_bytes())
    return archive


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Linux guests from Debian's packages, without root.")
    parser.add_argument("--out", type=Path, default=Path("out/guests"))
    arguments = parser.parse_args()
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        print(f"make guests: skipped, {missing[0]} is not here: the guests are made from Debian's packages")
        return 0
    out: Path = arguments.out.resolve()
    debs, work = out / "debs", out / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        kernel = _KERNEL.findall(_run("apt-cache", "depends", "linux-image-cloud-amd64"))[0]
        (python,) = re.findall(r"Depends: (python3\.\d+-minimal)", _run("apt-cache", "depends", "python3-minimal"))
        _unpack([kernel], debs, work / "kernel")
        _unpack(["busybox-static"], debs, work / "busybox")
        _unpack(_closure("bash", "coreutils", python), debs, work / "python")
    except (subprocess.CalledProcessError, IndexError, ValueError) as error:
        detail = error.stderr.strip().splitlines()[-1:] if isinstance(error, subprocess.CalledProcessError) else [error]
        print(f"make guests: the packages cannot be had: {detail[0] if detail else error}", file=sys.stderr)
        return 1
    modules = _modules_in_order(work / "kernel")
    (busybox,) = (work / "busybox").rglob("bin/busybox")
    small = _base(busybox, modules, "/bbin/sh")
    small.add("bin/sh", 0o120777, b"/bbin/sh")
    large = _base(busybox, modules, "bash --norc")
    large.add("usr/bin/python3", 0o120777, python.removesuffix("-minimal").encode())
    large.add_tree(work / "python", without=_SKIPPED_DIRECTORIES)
    for name in ("bin", "lib", "lib64"):  # packages of merged releases know usr alone
        if not (work / "python" / name).exists():
            large.add(name, 0o120777, f"usr/{name}".encode())
    (image,) = (work / "kernel" / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, out / "vmlinuz")
    (out / "initrd.gz").write_bytes(small.packed())
    (out / "initrd-python.gz").write_bytes(large.packed())
    manifest = [deb.name for deb in sorted(debs.glob("*.deb"))]
    for name in ("vmlinuz", "initrd.gz", "initrd-python.gz"):
        data = (out / name).read_bytes()
        manifest.append(f"{hashlib.sha256(data).hexdigest()}  {name}")
        print(f"{out / name}  {len(data) >> 10} KiB")
    (out / "MANIFEST").write_text("\n".join(manifest) + "\n")
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
