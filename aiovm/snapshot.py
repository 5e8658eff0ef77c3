"""A whole machine as a value: memory, vCPUs, chips, clock, and the host's scheduler where it is this machine's alone.

    await vm.pause()
    snapshot = vm.save()
    vm.resume()

and, on another host, in another process or after the guest has gone wrong:

    async with Vm.restore(Host(2), snapshot) as vm:
        await vm.run()

Rules:

* A machine is saved while it is paused or not yet started: every vCPU is out of ``run()``, and no interrupt is on its
  way between CPUs. :meth:`aiovm.vm.Vm.pause` brings it there, as a signal brings KVM's vCPUs out of the guest. That is
  a scheduling event like any other: the guest goes on a little differently than had nobody asked.
* In virtual time the restored machine's future is the saved one's, record by record, on a host with as many CPUs and
  the same policy and costs. Both begin with an empty TLB and with their timers armed in the same order.
* Time goes on from the saved moment: the clock of the new host is set to it. So the guest does not see how long it lay
  on a disk, and is told by its clock's "stopped" flag; the wall time of kvmclock's record is the real one.
* What is outside is not saved: the program's own devices, claims and hooks, the console's other end, files. Of virtio,
  disks (with what an overlay holds), entropy and consoles are saved; networks and sockets are refused.

Another host's scheduler (other CPUs, another policy, other machines beside) begins afresh.
"""

# ruff: noqa: TC001  (msgspec reads the annotations)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiovm.backends.base import SavedBackend
from aiovm.costs import Costs
from aiovm.errors import ConfigError, StateError
from aiovm.kvmclock import KvmClockState
from aiovm.loop import HostState
from aiovm.memory import SlotFlags
from aiovm.panic import PanicState
from aiovm.pc import PcState
from aiovm.spin import SpinOptions
from aiovm.vcpu_snapshot import VcpuSnapshot, restore_vcpu, save_vcpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiovm.backends.base import Backend
    from aiovm.loop import Host
    from aiovm.memory import Memslot
    from aiovm.vm import Vm

__all__ = ["CHUNK", "ENGINE", "MachineConfig", "SlotImage", "Snapshot", "check_host", "put", "take"]

#: Whose bytes :class:`~aiovm.engine.base.ContextState` holds.
ENGINE: Final = "unicorn 2.1.4"
#: Memory is looked at in pieces of this size.
CHUNK: Final = 0x1_0000


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """How to make the machine again: :class:`aiovm.vm.Vm`'s arguments."""

    vcpus: int
    memory: int
    ple: bool
    halt_poll_ns: int
    features: int
    wall_slice_ns: int
    nodes: int
    spin_options: SpinOptions


@dataclass(frozen=True, slots=True)
class SlotImage:
    """One memslot. ``dirty``: its log, where it keeps one; ``chunks``: (offset, bytes) of each 64 KiB that is not all
    zeroes."""

    slot_id: int
    base: int
    size: int
    flags: int
    dirty: bytes | None
    chunks: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine. ``is_virtual`` to ``costs``: of the host it ran on, to make one like it."""

    engine: str
    now: int
    epoch_ns: int
    is_virtual: bool
    pcpus: int
    policy: str
    slice_ns: int
    seed: int
    costs: Costs
    host: HostState | None
    config: MachineConfig
    vcpus: tuple[VcpuSnapshot, ...]
    pc: PcState
    kvmclock: KvmClockState
    panic: PanicState
    last_boosted_vcpu: int
    tsc_last: int
    typed: bytes
    virtio: tuple[object, ...]
    memory: tuple[SlotImage, ...]


def take(vm: Vm) -> Snapshot:
    """A copy of a machine that is at rest."""
    vm.check_at_rest()
    host = vm.host
    vcpus = tuple(save_vcpu(vcpu) for vcpu in vm.vcpus)
    return Snapshot(
        engine=ENGINE,
        now=vm.clock.now(),
        epoch_ns=vm.clock.epoch_ns,
        is_virtual=vm.clock.is_virtual,
        pcpus=len(host.pcpus),
        policy=host.policy.name,
        slice_ns=host.policy.slice_ns,
        seed=host.seed,
        costs=host.costs,
        host=host.save() if len(host.machines) == 1 and vm.number == 0 else None,
        config=MachineConfig(
            len(vm.vcpus), vm.ram_size, vm.ple, vm.halt_poll_ns, int(vm.features), vm.wall_slice_ns, vm.nodes,
            vm.spin_options,
        ),
        vcpus=vcpus,
        pc=vm.pc.save(),
        kvmclock=vm.kvmclock.save(),
        panic=vm.panic.save(),
        last_boosted_vcpu=vm.last_boosted_vcpu,
        tsc_last=vm.engine.tsc_last,
        typed=bytes(vm.typed),
        virtio=tuple(_saved_backend(backend) for backend in vm.backends),
        memory=tuple(
            SlotImage(
                slot.slot_id, slot.base, slot.size, int(slot.flags), _dirty(vm, slot),
                tuple(_chunks(slot.bytes_)),
            )
            for slot in vm.memory.map.slots
        ),
    )  # fmt: skip


def _saved_backend(backend: Backend) -> object:
    if not isinstance(backend, SavedBackend):
        raise ConfigError(f"a machine with a virtio {type(backend).__name__} cannot be saved: its peers are elsewhere")
    return backend.save()


def _chunks(memory: memoryview) -> Iterator[tuple[int, bytes]]:
    """What is not all zeroes, through a buffer that stays in the CPU's cache: most guests leave most of it alone."""
    zeroes, buffer = bytes(CHUNK), bytearray(CHUNK)
    for at in range(0, len(memory), CHUNK):
        buffer[:] = memory[at : at + CHUNK]
        if buffer != zeroes[: len(buffer)]:
            yield at, bytes(buffer)


def check_host(host: Host, snapshot: Snapshot, virtio: Sequence[Backend]) -> None:
    """Whether the machine can live there at all; :class:`ConfigError` says why not."""
    if snapshot.engine != ENGINE:
        raise ConfigError(f"the snapshot is of engine {snapshot.engine!r}, this is {ENGINE!r}")
    if host.costs.tsc_khz != snapshot.costs.tsc_khz:
        raise ConfigError(
            f"the guest's TSC runs at {snapshot.costs.tsc_khz} kHz; this host's costs say {host.costs.tsc_khz}"
        )
    if len(virtio) != len(snapshot.virtio):
        raise ConfigError(f"the saved machine has {len(snapshot.virtio)} virtio devices, not {len(virtio)}")
    if not host.is_new:
        raise StateError("a machine is restored on a host of its own: its time is the host's time")


def put(vm: Vm, snapshot: Snapshot) -> None:
    """Make ``vm``, which has the snapshot's configuration and is at rest, that machine."""
    _put_memory(vm, snapshot.memory)
    vm.pc.restore(snapshot.pc)
    vm.kvmclock.restore(snapshot.kvmclock)
    vm.panic.restore(snapshot.panic)
    vm.last_boosted_vcpu = snapshot.last_boosted_vcpu
    vm.engine.tsc_last = snapshot.tsc_last
    vm.typed[:] = snapshot.typed
    same_host = snapshot.host is not None and vm.host.restore(snapshot.host)
    for vcpu, saved in zip(vm.vcpus, snapshot.vcpus, strict=True):
        restore_vcpu(vcpu, saved, same_host=same_host)
    for backend, state in zip(vm.backends, snapshot.virtio, strict=True):
        if not isinstance(backend, SavedBackend):
            raise ConfigError(f"a virtio {type(backend).__name__} takes no saved state")
        backend.restore(state)
    vm.apic_map_changed()


def _dirty(vm: Vm, slot: Memslot) -> bytes | None:
    return None if slot.dirty is None else bytes(vm.memory.gather_log(slot))


def _put_memory(vm: Vm, images: tuple[SlotImage, ...]) -> None:
    memory = vm.memory
    wanted = {image.slot_id for image in images}
    for slot in memory.map.slots:
        if slot.slot_id not in wanted:
            memory.set_region(slot.slot_id, 0, 0)
    for image in images:
        new = memory.set_region(image.slot_id, image.base, image.size, flags=SlotFlags(image.flags))
        assert new is not None
        for at, data in image.chunks:
            new.bytes_[at : at + len(data)] = data
        if new.dirty is not None and image.dirty is not None:
            memory.gather_log(new)[:] = image.dirty
        memory.wrote(image.base, image.size)
