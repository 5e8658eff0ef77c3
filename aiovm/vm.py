"""A virtual machine: memory, buses, chips, vCPUs and an engine, wired together, and its life.

    async with Vm(host, vcpus=2) as vm:
        vm.load(image)
        outcome = await vm.run()

``run`` starts a task for each vCPU and ends when the guest ends: by power-off, reset, the debug-exit port, a triple
fault. All of the machine's state is touched by one thread at a time: in virtual time there is only one, on the wall
clock either a slice runs in the machine's worker thread or the loop's callbacks run, never both (``call_at``).
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from aiovm.acpi import Board, MmioDevice, write_tables
from aiovm.bus import Bus
from aiovm.clock import VirtualClock, new_cells
from aiovm.console import Console
from aiovm.control import MAXPHYADDR
from aiovm.cpuid import CpuidTable
from aiovm.devices.debug_exit import DebugExit
from aiovm.devices.virtio.slots import virtio_slots
from aiovm.engine.unicorn import UnicornEngine
from aiovm.errors import ConfigError, EngineError, GuestPanic, StateError, TripleFault, UnhandledExit
from aiovm.exits import Debug, EngineFault, Exit, Interrupted, Mmio, Pio, Shutdown, SystemEvent
from aiovm.halt_poll import LINUX_6_16
from aiovm.kvmclock import KvmClock
from aiovm.lapic import Lapic
from aiovm.lapic_map import ApicMap
from aiovm.loaders import LoadedImage, Module, apply, load, read_image, read_modules
from aiovm.loop import Host
from aiovm.memory import GuestMemory
from aiovm.panic import PanicWatch
from aiovm.paravirt import DEFAULT_FEATURES, KvmFeature
from aiovm.pc import Pc
from aiovm.snapshot import check_host, put, take
from aiovm.spin import SpinOptions
from aiovm.trace import Kind
from aiovm.tsc import ns_to_tsc, tsc_to_ns
from aiovm.units import parse_size, whole
from aiovm.vcpu import Vcpu
from aiovm.vcpu_io import UserHandler, UserRange
from aiovm.vm_interrupts import VmInterrupts
from aiovm.vm_life import LIFE, LifeEvent, LifeState
from aiovm.vm_rest import VmRest
from aiovm.vm_slices import VmSlices
from aiovm.vm_state import VmIoctls

if TYPE_CHECKING:
    import re
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

    from aiovm.backends.base import Backend
    from aiovm.snapshot import Snapshot

__all__ = ["MAX_VCPUS", "Debugger", "LifeEvent", "LifeState", "Outcome", "Vm"]

_HOLE, _HOLE_END = 0xC000_0000, 1 << 32
#: So that it ends, behind the hole, below what CR3 can name.
_MAX_MEMORY = (1 << MAXPHYADDR) - (_HOLE_END - _HOLE)
_DEBUG_EXIT = 0xF4
#: What a character takes on a serial line at 115200 baud, ns.
_CHARACTER_NS = 87_000
MAX_VCPUS = 255
#: What firmware leaves in the boot CPU's local APIC: enabled, LINT0 takes the 8259's interrupts, LINT1 is NMI.
_FIRMWARE_APIC = ((0x0F0, 0x1FF), (0x350, 0x700), (0x360, 0x400))
#: And in the two 8259s, by offset: interrupts 0-7 are vectors 0x08 on, 8-15 are 0x70 on.
_FIRMWARE_PIC = (
    ((0, 0x11), (1, 0x08), (1, 1 << 2), (1, 0x01)),
    ((0, 0x11), (1, 0x70), (1, 2), (1, 0x01)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the guest ended: ``reason`` is power-off, reset, debug-exit or stopped; ``status`` the process status."""

    reason: str
    status: int
    now: int


class Debugger(Protocol):
    """What a machine asks of who debugs it."""

    async def on_exit(self, vcpu: Vcpu, exit_: Debug | Interrupted) -> None:
        """A vCPU has left; it goes on when this returns."""


class Vm(VmIoctls, VmInterrupts, VmSlices, VmRest):
    """One machine on ``host``.

    ``memory``: bytes of RAM, or a text like ``64M``.
    ``ple``: pause-loop exiting. ``halt_poll_ns``: the longest halt poll (KVM's default).
    ``features``: what KVM's CPUID leaf promises. ``native``, ``pointers``: the engine's paths, for tests.
    ``wall_slice_ns``: a slice's length on the wall clock, charged ns; six times that when no other vCPU wants to run.
    ``nodes``: NUMA nodes, each with an equal share of CPUs and memory.
    ``console``: called with each byte string that the guest writes to its first serial port; on the wall clock in the
    machine's own thread. What it raises, :meth:`run` raises.
    ``virtio``: what stands behind its virtio devices (:mod:`aiovm.backends`), in the order in which it finds them.
    """

    def __init__(
        self,
        host: Host,
        *,
        vcpus: int = 1,
        memory: int | str = 64 << 20,
        ple: bool = True,
        halt_poll_ns: int = 200_000,
        features: KvmFeature = DEFAULT_FEATURES,
        spin_options: SpinOptions | None = None,
        console: Callable[[bytes], None] | None = None,
        native: bool | None = None,
        pointers: bool | None = None,
        wall_slice_ns: int = 1_000_000,
        nodes: int = 1,
        virtio: Sequence[Backend] = (),
    ) -> None:
        if not isinstance(vcpus, int) or not 1 <= vcpus <= MAX_VCPUS:
            raise ConfigError(f"a machine has 1 to {MAX_VCPUS} vCPUs, not {vcpus!r}")
        whole("nodes, of NUMA", nodes, 1, vcpus)
        whole("halt_poll_ns", halt_poll_ns, 0)
        whole("wall_slice_ns", wall_slice_ns, 1)
        if isinstance(memory, str):
            memory = parse_size(memory)
        if not isinstance(memory, int):
            raise ConfigError(f"memory of {memory!r}: a number of bytes, or a text like 64M")
        if not 1 << 20 <= memory <= _MAX_MEMORY or memory & 0xFFF:
            raise ConfigError(f"memory of {memory:#x} bytes: 1M to {_MAX_MEMORY >> 30}G, in whole pages")
        if console is not None and not callable(console):
            raise ConfigError(f"console: {console!r} cannot be called")
        host.check_loop()
        self.host = host
        self.number = host.register_machine(self)
        self.clock = host.clock
        virtual = isinstance(self.clock, VirtualClock)
        self.costs = host.costs if virtual else host.costs.on_the_wall()
        self.cells = self.clock.cells if virtual else new_cells()
        self.trace = host.trace
        self.tsc_khz = host.costs.tsc_khz
        self.ple = ple
        self.halt_poll_ns = halt_poll_ns
        self.halt_poll_params = LINUX_6_16
        self.spin_options = SpinOptions() if spin_options is None else spin_options
        self.last_boosted_vcpu = 0
        self.wall_slice_ns = wall_slice_ns
        self.life = LifeState.NEW
        #: Takes the exits that are a debugger's (:mod:`aiovm.gdb`).
        self.debugger: Debugger | None = None
        self.features = features

        self.memory = GuestMemory()
        self.memory.set_region(0, 0, min(memory, _HOLE))
        if memory > _HOLE:
            self.memory.set_region(1, _HOLE_END, memory - _HOLE)
        self.ram_size = memory
        self.ports = Bus("port", 16)
        self.mmio = Bus("MMIO", 52)
        self._sink = console
        self.panic = PanicWatch()
        self.console = Console(
            soon=lambda ns, callback: self.clock.call_at(self.clock.now() + ns, callback),  # a look stops no slice
            send=self.feed_console,
        )
        self.typed = bytearray()
        self.ports.register(_DEBUG_EXIT, 4, DebugExit(lambda status: self.end("debug-exit", status)))

        self.runs_ahead = virtual
        self._init_slices()
        self._init_rest()
        self.memory.on_change(self._may_change_memory)
        self.memory.on_log(self._may_change_memory)
        self.engine = UnicornEngine(
            self.memory,
            self.cells,
            costs=self.costs,
            native=native,
            pointers=pointers,
            release_gil=not virtual,
        )
        self.engine.serve_tsc(self.tsc_khz, None if isinstance(self.clock, VirtualClock) else self.clock.base_ns)
        self.engine.serve_cr3(MAXPHYADDR)
        self.cpuid = CpuidTable(vcpus=vcpus, tsc_khz=self.tsc_khz, features=features)
        self.kvmclock = KvmClock(host_khz=self.tsc_khz, now=self.clock.now())
        self.lapics = [Lapic(i, bsp=i == 0, maxphyaddr=40) for i in range(vcpus)]
        self.apic_map = ApicMap(self.lapics)
        self.vcpus = tuple(Vcpu(self, i, vcpu_id=i, apic=self.lapics[i]) for i in range(vcpus))
        self.nodes = nodes
        self.pc = Pc(self, sink=self._put, on_room=self._go_on_typing)
        self._backends = tuple(virtio)
        self._virtio_slots = virtio_slots(len(virtio))
        for slot, backend in zip(self._virtio_slots, self._backends, strict=True):
            self.mmio.register(slot.base, slot.length, backend.attach(self, self.pc.new_line(slot.gsi)))
        self._running: asyncio.Task[Outcome] | None = None
        self._ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self.image: LoadedImage | None = None

    @classmethod
    @asynccontextmanager
    async def linux(
        cls,
        kernel: str | Path,
        *,
        initrd: str = "",
        cmdline: str = "console=ttyS0",
        vcpus: int = 1,
        pcpus: int | None = None,
        memory: int | str = "256M",
        host: Host | None = None,
        unpack: bool = True,
        **options: Any,
    ) -> AsyncIterator[Self]:
        """A running Linux guest: wait for its words with :meth:`expect`, run commands with :meth:`shell`.

        ``initrd`` as ``aiovm run`` takes it, ``options`` as the class does. Without ``host`` one is made, with a
        physical CPU for each vCPU. The machine is stopped at the end; a guest that ended badly before raises there.
        """
        image = read_image(kernel, "the kernel ")
        if host is None:
            host = Host(vcpus if pcpus is None else pcpus)
        async with cls(host, vcpus=vcpus, memory=memory, **options) as vm:
            vm.load(image, name=Path(kernel).name, cmdline=cmdline, modules=read_modules(initrd), unpack=unpack)
            vm.start()
            assert vm._running is not None
            yield vm
            if vm._running.done():
                vm._running.result()

    # ---- life --------------------------------------------------------------------------------------------------

    def _following(self, event: LifeEvent) -> LifeState:
        following = LIFE[self.life].get(event)
        if following is None:
            raise StateError(f"a machine that is {self.life.value} cannot {event.value}")
        return following

    def _move(self, event: LifeEvent) -> None:
        self.life = self._following(event)

    def load(
        self,
        image: bytes,
        *,
        name: str = "image",
        cmdline: str = "",
        modules: Sequence[Module] = (),
        kind: str | None = None,
        unpack: bool = True,
    ) -> LoadedImage:
        """Put ``image`` into memory and the first vCPU at its entry; the kind is found by itself.

        Firmware's tables (:mod:`aiovm.acpi`) are stored first. ``unpack``: see :func:`aiovm.loaders.load`.
        """
        self._move(LifeEvent.LOAD)
        slots = tuple((slot.base, slot.size) for slot in self.memory.map.slots)
        virtio = tuple(MmioDevice(slot.base, slot.length, slot.gsi) for slot in self._virtio_slots)
        board = Board(tuple(v.vcpu_id for v in self.vcpus), slots, nodes=self.nodes, mmio=virtio)
        rsdp = write_tables(board, self.memory)
        self.image = load(
            image, name=name, memory=self.memory, cmdline=cmdline, modules=modules, kind=kind, unpack=unpack, rsdp=rsdp
        )
        apply(self.image.entry, self.vcpus[0].context.state)
        boot_apic = self.lapics[0]
        for register, value in _FIRMWARE_APIC:
            boot_apic.mmio_write(register, 4, value, self.clock.now())
        for chip, words in zip(self.pc.pic.ports, _FIRMWARE_PIC, strict=True):
            for offset, word in words:
                chip.write(offset, 1, word, self.clock.now())
        self.apic_map_changed()
        return self.image

    def start(self) -> None:
        """:meth:`run` in the background; :meth:`finished` waits for it."""
        if self._running is not None:
            raise StateError("the machine was started already")
        self._following(LifeEvent.RUN)
        self._running = asyncio.create_task(self.run(), name=f"vm-{self.number}")

    async def finished(self) -> Outcome:
        """Wait until a machine that was started has ended."""
        if self._running is None:
            raise StateError("the machine was not started")
        return await asyncio.shield(self._running)

    async def run(self) -> Outcome:
        """Run every vCPU until the guest ends; raises :class:`GuestError` when it ended itself badly."""
        try:
            outcome = await self._run()
        except Exception as error:
            self.console.end(error)
            raise
        except BaseException:
            self.console.end(StateError("the machine was stopped"))
            raise
        self.console.end(StateError(f"the guest has ended: {outcome.reason}"))
        return outcome

    async def _run(self) -> Outcome:
        self.host.check_loop()
        self._move(LifeEvent.RUN)
        tasks = [asyncio.create_task(self._drive(v), name=f"vcpu-{self.number}.{v.index}") for v in self.vcpus]
        try:
            awaited: list[asyncio.Future[Any]] = [self._ended, *tasks]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            return self._ended.result()
        finally:
            for task in tasks:
                task.cancel()
            try:  # a second cancellation comes out of it, when all have ended
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                self._move(LifeEvent.END)
                self._no_rest()
                self._over.set()

    async def _drive(self, vcpu: Vcpu) -> None:
        """One vCPU's task: KVM_RUN again and again, as a VMM's thread does."""
        while not self._ended.done():
            exit_ = await vcpu.run()
            if self.life is LifeState.PAUSED and isinstance(exit_, Interrupted):
                await self._park(vcpu)
                continue
            if self.debugger is not None and isinstance(exit_, Debug | Interrupted):
                await self.debugger.on_exit(vcpu, exit_)
                continue
            handler = self._handler(exit_)
            if handler is None:
                self._answer(vcpu, exit_)
            else:
                vcpu.kvm_run.data = await handler(exit_)  # type: ignore[arg-type]  # only these have one

    def claim_ports(self, base: int, length: int, handler: UserHandler | None = None) -> None:
        """Ports that the program answers: their accesses leave as :class:`~aiovm.exits.Pio`.

        ``handler``: ``async def handler(exit_) -> bytes | None``, awaited by :meth:`run`; while it waits, the vCPU
        does not run, and time passes. Without one, call ``vcpu.run()`` yourself (:mod:`aiovm.kvm_run`).
        """
        self.ports.register(base, length, UserRange(base, ports=True, leave=self._leave_for_io, handler=handler))

    def claim_mmio(self, base: int, length: int, handler: UserHandler | None = None) -> None:
        """As :meth:`claim_ports` for guest physical addresses, where no memory is: :class:`~aiovm.exits.Mmio`."""
        if any(slot.base < base + length and base < slot.end for slot in self.memory.map.slots):
            raise ConfigError(f"MMIO range {base:#x}+{length:#x} lies in memory")
        self._may_change_memory()
        self.mmio.register(base, length, UserRange(base, ports=False, leave=self._leave_for_io, handler=handler))
        self.engine.claim(base, length)

    def _leave_for_io(self, exit_: Pio | Mmio) -> None:
        current = self.engine.current
        assert current is not None
        self.vcpus[current.index].leave_for_io(exit_)

    def _handler(self, exit_: Exit) -> UserHandler | None:
        """Who answers an exit about a port or a register."""
        match exit_:
            case Pio(port, size):
                found = self.ports.find(port, size)
            case Mmio(gpa, size):
                found = self.mmio.find(gpa, size)
            case _:
                return None
        return found[0].handler if found is not None and isinstance(found[0], UserRange) else None

    def _answer(self, vcpu: Vcpu, exit_: Exit) -> None:
        """An exit that reached the embedding side."""
        rip, history = vcpu.context.state.rip, tuple(vcpu.history)
        match exit_:
            case SystemEvent("panic" | "reset") if self.panic.message is not None:
                raise GuestPanic(self.panic.message, lines=self.panic.lines, vcpu=vcpu.index, rip=rip)
            case SystemEvent(kind, status):
                if self.trace.on:
                    self.trace.emit(self.clock.now(), Kind.END, vcpu.thread.number, status, rip)
                if not self._ended.done():
                    self._ended.set_result(Outcome(kind, status, self.clock.now()))
            case Shutdown(reason):
                raise TripleFault(reason, vcpu=vcpu.index, rip=rip, history=history)
            case EngineFault(number, message):
                raise EngineError(f"Unicorn error {number} ({message}) at RIP {rip:#x} of vCPU {vcpu.index}")
            case _:
                raise UnhandledExit(f"nobody answers {exit_}", vcpu=vcpu.index, rip=rip, history=history)

    @property
    def backends(self) -> Sequence[Backend]:
        """What stands behind the virtio devices, in their order."""
        return self._backends

    def save(self) -> Snapshot:
        """The whole machine as a value, while it is at rest (:mod:`aiovm.snapshot`)."""
        return take(self)

    @classmethod
    def restore(
        cls,
        host: Host,
        snapshot: Snapshot,
        *,
        console: Callable[[bytes], None] | None = None,
        virtio: Sequence[Backend] = (),
        native: bool | None = None,
        pointers: bool | None = None,
    ) -> Self:
        """The machine of ``snapshot``, ready to :meth:`run`, on a fresh ``host``, whose clock is set to its time.

        In virtual time its future is the saved machine's if the host has as many CPUs, the same policy and costs.
        ``virtio``: backends of the same kinds in the same order.
        """
        check_host(host, snapshot, virtio)
        host.clock.set_now(snapshot.now, snapshot.epoch_ns)
        c = snapshot.config
        vm = cls(
            host, vcpus=c.vcpus, memory=c.memory, ple=c.ple, halt_poll_ns=c.halt_poll_ns,
            features=KvmFeature(c.features), spin_options=c.spin_options, wall_slice_ns=c.wall_slice_ns, nodes=c.nodes,
            console=console,
            virtio=virtio, native=native, pointers=pointers,
        )  # fmt: skip
        vm._move(LifeEvent.LOAD)
        vm._at_rest = True
        watched, vm.trace.on = vm.trace.on, False
        try:
            put(vm, snapshot)
        except BaseException:
            vm.close()
            raise
        finally:
            vm.trace.on = watched
        vm._wake_up()
        return vm

    def end(self, reason: str, status: int) -> None:
        """The guest wants to end, from inside a slice."""
        self.engine.leave(SystemEvent(reason, status))

    def on_end(self, callback: Callable[[Outcome], object]) -> None:
        """Call ``callback`` when the guest has ended by itself or by :meth:`stop`."""
        self._ended.add_done_callback(lambda ended: None if ended.cancelled() else callback(ended.result()))

    def stop(self) -> None:
        """End the machine from outside: :meth:`run` returns with the reason "stopped"."""
        if not self._ended.done():
            self._ended.set_result(Outcome("stopped", 0, self.clock.now()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A machine that still runs is stopped; then :meth:`close`."""
        try:
            if self.life in (LifeState.RUNNING, LifeState.PAUSED):
                self.stop()
                await self._over.wait()
            for backend in self._backends:
                await backend.aclose()
        finally:
            self.close()

    def close(self) -> None:
        """Free the engine; nothing may run. The second time it does nothing."""
        if self.life is LifeState.CLOSED:
            return
        if self.life not in (LifeState.RUNNING, LifeState.PAUSED):  # whose tasks are the machine's own
            for vcpu in self.vcpus:
                if vcpu.mutex.locked():
                    raise StateError(f"vCPU {vcpu.index} is in run(): cancel it before the machine is closed")
        self._move(LifeEvent.CLOSE)
        self.host.release_machine(self, self.number)
        for vcpu in self.vcpus:
            vcpu.disarm_timer()
        self.pc.disarm()
        if self._worker is not None:
            self._worker.close()
        self.engine.close()
        self.memory.close()

    def _put(self, byte: int) -> bool:
        """The serial port sends; the console takes everything at once."""
        data = bytes((byte,))
        self.console.put(data)
        if self._sink is not None:
            self._sink(data)
        if self.panic.put(byte):
            self.end("panic", 0)
        return True

    async def expect(self, wanted: str | re.Pattern[str], *, timeout: float | None = None) -> re.Match[str]:  # noqa: ASYNC109
        """Wait for words on the console (:meth:`aiovm.console.Console.expect`)."""
        return await self.console.expect(wanted, timeout=timeout)

    async def shell(self, command: str, *, timeout: float | None = None, check: bool = True) -> str:  # noqa: ASYNC109
        """Run a command in the shell on the console (:meth:`aiovm.console.Console.shell`)."""
        return await self.console.shell(command, timeout=timeout, check=check)

    def feed_console(self, data: bytes) -> None:
        """Input for the first serial port, as much as its FIFO takes now, the rest as the guest reads.

        A guest that has read all finds nothing for a while, as on a line: a kernel's driver would else not leave its
        interrupt handler, give up after some thousand characters, and wait for an edge that never comes.
        """
        self.typed.extend(data)
        self.post(self.clock.now(), self._type)

    def _go_on_typing(self) -> None:
        if self.typed and self.pc.serial.empty:
            self.post(self.clock.now() + _CHARACTER_NS, self._type)

    def _type(self) -> None:
        room = self.pc.serial.room
        if room and self.typed:
            taken = self.pc.serial.feed(bytes(self.typed[:room]), self.clock.now())
            del self.typed[:taken]
            self.pc.rearm(self.pc.serial)

    # ---- time --------------------------------------------------------------------------------------------------

    def read_tsc(self) -> int:
        # vCPUs run up to a quantum apart; a TSC that steps back between CPUs is a broken one to a guest.
        return self.engine.latest_tsc(ns_to_tsc(self.clock.now(), self.tsc_khz))

    def wall_ns(self) -> int:
        return self.clock.epoch_ns + self.clock.now()

    def tsc_to_ns(self, tsc: int) -> int:
        return tsc_to_ns(tsc, self.tsc_khz)

    def unclaimed_in(self, vcpu: Vcpu, port: int, size: int) -> int:
        if self.trace.on:
            self.trace.emit(self.clock.now(), Kind.UNKNOWN_ACCESS, vcpu.thread.number, port, 0)
        return (1 << 8 * size) - 1

    def unclaimed_out(self, vcpu: Vcpu, port: int, size: int, value: int) -> None:
        if self.trace.on:
            self.trace.emit(self.clock.now(), Kind.UNKNOWN_ACCESS, vcpu.thread.number, port, value)

    # ---- for people ------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Every vCPU's state in one line."""
        return "; ".join(v.describe() for v in self.vcpus)
