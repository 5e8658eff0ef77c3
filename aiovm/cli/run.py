"""``aiovm run``: one guest, from its image to its end."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from aiovm.cli.console import keyboard, open_output, orderly_end
from aiovm.cli.files import check_writable, write_file
from aiovm.cli.options import ClockName, TraceFiles, check_seed
from aiovm.cli.snapshots import given, host_like, open_snapshot, save_time, saving
from aiovm.cli.status import OK
from aiovm.errors import ConfigError, DeadlockError, TimeoutExpired
from aiovm.gdb import GdbServer
from aiovm.loaders import Module, identify, read_image, read_modules
from aiovm.loop import Host, run, run_wall
from aiovm.policy import by_name
from aiovm.results import to_json
from aiovm.sinks import open_sinks
from aiovm.trace import HashSink, Tracer
from aiovm.units import parse_duration, parse_size
from aiovm.vm import MAX_VCPUS, Outcome, Vm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(name="run")(_run)


def _run(
    context: typer.Context,
    image: Annotated[
        Path | None, typer.Argument(help="The guest: Linux, Multiboot, ELF (32 or 64 bit), or a flat binary.")
    ] = None,
    vcpus: Annotated[int, typer.Option(help="Virtual CPUs, 1 to 255.")] = 1,
    pcpus: Annotated[
        int | None, typer.Option(help="Physical CPUs they share.", show_default="as many as vCPUs")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Guest memory, as in 64M or 1G.", show_default="64M; for Linux 256M")
    ] = None,
    append: Annotated[str, typer.Option(help="The guest's command line.")] = "",
    initrd: Annotated[str, typer.Option(help="Modules: 'FILE arguments,FILE2'.")] = "",
    clock: Annotated[
        ClockName | None,
        typer.Option(
            help="virtual: repeatable to the byte. wall: real time.", show_default="wall for Linux on a terminal"
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Scheduling policy, or module:Class of your own.")] = "fair",
    slice_: Annotated[str, typer.Option("--slice", help="How long a vCPU may run while others wait.")] = "6ms",
    seed: Annotated[int, typer.Option(help="Of every random choice on the host.")] = 0,
    ple: Annotated[bool, typer.Option(help="Pause-loop exiting.")] = True,
    nodes: Annotated[int, typer.Option(help="NUMA nodes that the guest is told of.")] = 1,
    unpack: Annotated[bool, typer.Option(help="Unpack a bzImage here, or let its own decompressor run.")] = True,
    console: Annotated[str, typer.Option(help="Where serial output goes: stdio, null or file:PATH.")] = "stdio",
    timeout: Annotated[str | None, typer.Option(help="Give up after this time on the chosen clock, as in 10s.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result and statistics here.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the whole machine here, at --save-at; it goes on.")] = None,
    save_at: Annotated[str | None, typer.Option(help="When to save, on the guest's clock, as in 2s.")] = None,
    restore: Annotated[Path | None, typer.Option(help="Go on from a saved machine, instead of an image.")] = None,
    trace: TraceFiles = None,
    gdb: Annotated[
        int | None, typer.Option(help="Wait for GDB on this port: target remote localhost:PORT, then continue.")
    ] = None,
    gdb_bits: Annotated[int, typer.Option(help="32: GDB sees an i386, for guests in 32 bits.")] = 64,
) -> None:
    """Run a guest until it ends.

    The process status is the guest's: 0 for power-off, (value << 1) | 1 for a write to the debug-exit port 0xF4,
    64 triple fault, 66 unhandled exit, 68 stall (everything waits for ever), 70 time-out, 74 kernel panic, 2 bad input.
    On the wall clock the terminal is the guest's console; Ctrl-A x leaves, with status 0. In virtual time the guest
    has no input. Unless --clock says otherwise, a Linux kernel whose console is a terminal runs on the wall clock, a
    restored machine on the clock it was saved on, and all others in virtual time.

    Example: aiovm run guest.elf --vcpus 4 --pcpus 2 --append "verbose=1"

    Example: aiovm run vmlinuz --initrd initrd.gz --vcpus 4 --memory 512M --append console=ttyS0

    Example: aiovm run guest.elf --save half.snap --save-at 5ms; then aiovm run --restore half.snap
    """
    limit = None if timeout is None else parse_duration(timeout)
    saved = open_snapshot(context, image, restore)
    when = save_time(save, save_at)
    data = b""
    modules: tuple[Module, ...] = ()
    if image is not None:
        data = read_image(image)
        modules = read_modules(initrd)
        if not data:
            raise ConfigError(f"{image}: the image is empty")
    check_seed(seed)
    linux = identify(data) in ("bzimage", "vmlinux", "pvh")
    if clock is None:
        virtual = saved.is_virtual if saved is not None else not (linux and _on_terminal(console))
        clock = ClockName.VIRTUAL if virtual else ClockName.WALL
    wall = clock is ClockName.WALL
    size = parse_size(memory or ("256M" if linux else "64M"))
    if json is not None:
        check_writable(json)
    tracer = Tracer()
    digest = HashSink()
    if json is not None:
        tracer.add(digest)
    out, close = open_output(console)
    if trace is not None:
        open_sinks(tracer, trace)

    def make() -> Vm:
        if saved is not None:
            host = host_like(
                saved,
                pcpus=pcpus,
                policy=policy if given(context, "policy") else None,
                slice_ns=parse_duration(slice_) if given(context, "slice_") else None,
                seed=seed if given(context, "seed") else None,
                trace=tracer,
            )
            return Vm.restore(host, saved, console=out)
        host = Host(
            min(max(vcpus, 1), MAX_VCPUS) if pcpus is None else pcpus,  # the machine says what is wrong with vCPUs
            policy=by_name(policy, slice_ns=parse_duration(slice_)),
            seed=seed,
            trace=tracer,
        )
        vm = Vm(host, vcpus=vcpus, memory=size, ple=ple, nodes=nodes, console=out)
        assert image is not None
        try:
            vm.load(data, name=image.name, cmdline=append, modules=modules, unpack=unpack)
        except BaseException:
            vm.close()
            raise
        return vm

    async def main() -> tuple[Outcome, dict[str, object]]:
        async with make() as vm, saving(vm, save, when), _debugged(vm, gdb, gdb_bits):
            host = vm.host
            until = None if limit is None else host.clock.now() + limit
            task = asyncio.ensure_future(vm.run())
            left = False

            def leave() -> None:
                nonlocal left
                left = task.cancel()

            stalled = False

            def expire() -> None:
                nonlocal stalled
                stalled = host.clock.is_idle
                task.cancel()

            if until is not None:
                host.clock.call_at(until, expire)
            interactive = wall and console == "stdio"
            try:
                with keyboard(vm.feed_console, leave) if interactive else nullcontext():
                    outcome = await task
            except asyncio.CancelledError:
                if left:
                    return Outcome("left", OK, host.clock.now()), _statistics(vm, host)
                if stalled:  # nothing but the limit was left to happen
                    raise DeadlockError(f"nothing can happen any more: {vm.describe()}") from None
                if until is not None and host.clock.now() >= until:
                    raise TimeoutExpired(f"the guest is not done after {timeout}: {vm.describe()}") from None
                raise
            return outcome, _statistics(vm, host)

    with orderly_end():
        try:
            outcome, statistics = run_wall(main()) if wall else run(main())
        finally:
            tracer.close()
            close()
    if json is not None:
        report = {"reason": outcome.reason, "status": outcome.status, "now_ns": outcome.now, "clock": clock.value}
        report |= statistics
        report["trace_hash"] = digest.hexdigest()
        write_file(json, to_json(report))
    raise typer.Exit(outcome.status & 0xFF)


@asynccontextmanager
async def _debugged(vm: Vm, port: int | None, bits: int) -> AsyncIterator[None]:
    """With GDB on ``port``, the guest waits for it."""
    if port is None:
        yield
        return
    async with GdbServer(vm, port, bits=bits) as server:
        print(f"waiting for gdb: target remote localhost:{server.port}", file=sys.stderr, flush=True)
        yield


def _on_terminal(console: str) -> bool:
    """Whether somebody may type: who starts Linux on a terminal wants to."""
    return console == "stdio" and sys.stdin.isatty() and sys.stdout.isatty()


def _statistics(vm: Vm, host: Host) -> dict[str, object]:
    return {
        "vcpus": [
            {"index": v.index, "mp_state": v.mp_state.name, "rip": v.context.state.rip, **asdict(v.stat)}
            for v in vm.vcpus
        ],
        "pcpus": [{"index": p.index, "busy_ns": p.busy_ns, "switches": p.switches} for p in host.pcpus],
    }
