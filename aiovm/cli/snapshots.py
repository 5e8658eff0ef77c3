"""``aiovm run --save`` and ``--restore``: a running guest into a file, and one out of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from aiovm import snapshot_file
from aiovm.cli.files import check_writable
from aiovm.clock import Alarm
from aiovm.errors import ConfigError
from aiovm.loop import Host
from aiovm.policy import by_name
from aiovm.units import format_ns, parse_duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import typer

    from aiovm.snapshot import Snapshot
    from aiovm.trace import Tracer
    from aiovm.vm import Vm

__all__ = ["given", "host_like", "open_snapshot", "save_time", "saving"]

#: Options that say what the machine is: a snapshot has them.
_MACHINE: Final = ("vcpus", "memory", "append", "initrd", "ple", "nodes", "unpack")


def given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def open_snapshot(context: typer.Context, image: Path | None, path: Path | None) -> Snapshot | None:
    """The snapshot to go on from, or None when an image is to be started."""
    if path is None:
        if image is None:
            raise ConfigError("which guest? give an image, or a snapshot with --restore")
        return None
    if image is not None:
        raise ConfigError(f"an image ({image}) and a snapshot to restore ({path}): give one of them")
    for name in _MACHINE:
        if given(context, name):
            raise ConfigError(f"--{name} is part of the machine in {path}: it is not given again with --restore")
    return snapshot_file.read(path)


def host_like(
    saved: Snapshot, *, pcpus: int | None, policy: str | None, slice_ns: int | None, seed: int | None, trace: Tracer
) -> Host:
    """The host that the snapshot was taken on, but for what the user wants otherwise."""
    chosen = by_name(
        saved.policy if policy is None else policy, slice_ns=saved.slice_ns if slice_ns is None else slice_ns
    )
    return Host(
        saved.pcpus if pcpus is None else pcpus,
        policy=chosen,
        costs=saved.costs,
        seed=saved.seed if seed is None else seed,
        trace=trace,
    )


def save_time(path: Path | None, at: str | None) -> int:
    """When to save, ns on the guest's clock; 0 when nothing is to be saved."""
    if (path is None) != (at is None):
        raise ConfigError("--save says where, --save-at when (as in 2s): give both")
    if path is None or at is None:
        return 0
    check_writable(path)
    return parse_duration(at)


@asynccontextmanager
async def saving(vm: Vm, path: Path | None, at: int) -> AsyncIterator[None]:
    """Store the machine at time ``at`` while it runs in the block; it goes on afterwards."""
    if path is None:
        yield
        return
    if at < vm.clock.now() and vm.clock.is_virtual:  # real time does not wait for a guest to be loaded
        raise ConfigError(f"--save-at {format_ns(at)} has passed: the guest is at {format_ns(vm.clock.now())}")
    task = asyncio.create_task(_save(vm, path, at))
    try:
        yield
        if not task.done():
            raise ConfigError(
                f"nothing was saved: the guest ended at {format_ns(vm.clock.now())}, --save-at is {format_ns(at)}"
            )
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _save(vm: Vm, path: Path, at: int) -> None:
    await Alarm(vm.clock).until(at)
    await vm.pause()
    try:
        snapshot_file.write(path, vm.save())
    finally:
        vm.resume()
