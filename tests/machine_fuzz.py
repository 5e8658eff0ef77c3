"""Guests that mean harm: random instructions, tables and devices' registers in every mode, from a seed.

One case is one machine of 1 to 3 vCPUs. Each vCPU starts in a mode of its own (real, virtual-8086, 16- and 32-bit
protected, PAE paging, long, compatibility) at a page of instructions: some random bytes, most of them chosen to reach
what a guest can reach (MSRs, ports, device registers, control and debug registers, tables, hypercalls, interrupts).
Every handler goes on somewhere in that page. Meanwhile memslots come and go, and the host injects events.

:func:`play` runs one to its end in virtual time. What may happen: the guest ends, ends itself by a triple fault, or
the limit passes. Everything else is a failure: :class:`Broken`.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import struct
from contextlib import suppress
from dataclasses import dataclass

from aiovm.backends.disk import Disk
from aiovm.backends.entropy import Entropy
from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.errors import ConfigError, GuestError, StallError
from aiovm.lapic_message import DeliveryMode
from aiovm.loop import Host, run
from aiovm.memory import SlotFlags
from aiovm.trace import HashSink, Tracer
from aiovm.vcpu import MpState
from aiovm.vm import Vm

__all__ = ["MODES", "Broken", "Played", "play"]

MODES = ("real", "v86", "prot16", "prot32", "pae", "long", "compat")
_RAM = 4 << 20
_GUARD = 64 << 10
_CODE, _SIZE, _STACK, _STACK0, _DATA = 0x8000, 0x1000, 0x7_0000, 0x6_0000, 0x5_0000
_GDT, _IDT, _TSS, _HANDLERS, _TABLES = 0x1_0000, 0x1_1000, 0x1_3000, 0x1_8000, 0x2_0000
_LIMIT_NS = 300_000
_M64 = (1 << 64) - 1

#: Null, 64-, 32- and 16-bit code and data of both privileges, a TSS, an LDT, a call gate and a task gate.
_CODE64, _CODE32, _CODE16, _DATA32, _DATA16, _USER = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
_TR, _LDT, _OTHER_TSS = 0x60, 0x70, 0x80
_KINDS = (0xAF_9B00, 0xCF_9B00, 0x0F_9B00, 0xCF_9300, 0x0F_9300)

_MSRS = (
    0x10, 0x17, 0x1B, 0x3A, 0x3B, 0x8B, 0x9E, 0x174, 0x175, 0x176, 0x1A0, 0x277, 0x6E0, 0xC000_0080, 0xC000_0081,
    0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103, 0x11, 0x12,
    0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04, 0x4B56_4D05, 0x4B56_4D06, 0x4B56_4D07,
    0x4B56_4D08, 0x1D9, 0x2FF, 0x38F,
)  # fmt: skip
_PORTS = (
    0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xCF9,
    0x3F8, 0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FD, 0x510, 0x511, 0x514, 0x518, 0x600, 0x604, 0x608, 0xE0, 0x2000, 0x2001,
)  # fmt: skip
_MMIO = (
    *(0xFEE0_0000 + 0x10 * n for n in range(0x40)), 0xFEC0_0000, 0xFEC0_0010, 0xFEC0_0040, 0xFED0_0000, 0xFED0_0010,
    0xFED0_00F0, 0xFED0_0100, 0xFED0_0108, 0xFF00_0000, 0xFF00_0FFC,
    *(0xD000_0000 + 0x1000 * d + r for d in range(2) for r in (
        *range(0, 0x24, 4), 0x28, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4,
        0x100, 0x104, 0x108,
    )),
)  # fmt: skip
_EDGES = (0, 1, 2, 0x80, 0xFF, 0x100, 0x200, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 39, 1 << 40,
          1 << 47, (1 << 47) - 1, 1 << 52, 1 << 63, _M64, 0xFFFF_8000_0000_0000)  # fmt: skip

#: Instructions without operands of ours that reach the privileged side, the FPU and the string unit.
_PLAIN_HEX = """
    0fa2 0f31 0f01f9 0f33 0f06 0f08 0f09 0faa f4 fa fb fbf4 f390 9c 9d 9c9d cf 48cf 66cf 0f05 0f34 0f07 480f07
    0f35 480f35 0f01f8 0f01c1 0f01d9 0f01c8 0f01d0 f1 cc ce cd80 cd20 cd03 cdff 0f0b 0f77 dbe3 9b d9ff 0f2ec0
    0f58c1 f30f6f00 0fae00 0fae08 0fae10 0fae18 0fae38 f3a4 f3a5 f3aa f3ab f3a6 f2ae a4 ac 6c f36c 6e f36e f36d
    0fc708 f00fc708 480fc708 0fc7f0 660fc7f0 480fc7f0 0fc7f8 0f0100 0f0108 0f0110 0f0118 0f0120 0f0130 0f0138
    0f01e0 0f01ee 0f01ef 0f01f0 0f00d8 0f00d0 0f00c8 0f00c0 0f00e0 0f00e8 8ed8 8ee0 8ec0 8ed0 1e 1f 07 17 0fa1 0fa9
    c8040001 c9 c3 cb ca0400 c20400 ff18 ff28 ff10 ff20 f7f1 f7f9 d50a d400 6200 f0ff00 f00fb10f f00fc101 0f18e0 0fc300
    0f38f000 f30fb8c0 f30fbdc0 eb00 e2fe 67e2fe 0f20c0 0f22d8 0f20d8 0f20e0 0f22e0 0f22c0 440f20c0 440f22c0
    0f21f0 0f23f8 0f23c0 0f23f0 f30fc7f8 f3480faec8 f30faed8 0f01ca 0f01d8 0f01da 0f01db 0f01df 0f1a00 f30f1efa
    660f3880c8 0f0d00 26a1 6663c0 8b00 8900 668b00 488b00 488900 66a5 fd fc f5 9e 9f d7 98 99
"""
_PLAIN = tuple(bytes.fromhex(code) for code in _PLAIN_HEX.split())


class Broken(AssertionError):
    """A property does not hold; the message says which, and how to see it again."""


@dataclass(frozen=True, slots=True)
class Played:
    """How a case went."""

    how: str
    now: int
    hash: str


class _Guarded:
    """RAM for a slot between two stretches that nobody may touch."""

    def __init__(self, size):
        self._all = mmap.mmap(-1, size + 2 * _GUARD)
        self._view = memoryview(self._all)
        self.ram = self._view[_GUARD : _GUARD + size]
        self._pattern = bytes(range(256)) * (_GUARD // 256)
        self._view[:_GUARD] = self._view[-_GUARD:] = self._pattern

    @property
    def whole(self):
        return self._view[:_GUARD] == self._pattern == self._view[-_GUARD:]


def play(seed: int, *, native: bool | None = None, limit_ns: int = _LIMIT_NS) -> Played:
    """Run the case of ``seed``."""
    try:
        return run(_play(seed, native, limit_ns))
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


class _Sectors:
    """Eight sectors in memory."""

    sectors, read_only = 8, False

    def __init__(self):
        self._data = bytearray(8 * 512)

    def read(self, sector, length):
        return bytes(self._data[sector * 512 : sector * 512 + length])

    def write(self, sector, data):
        self._data[sector * 512 : sector * 512 + len(data)] = data

    def flush(self):
        pass

    def close(self):
        pass


async def _play(seed, native, limit_ns):
    rng = random.Random(seed)
    tracer, digest = Tracer(), HashSink()
    if seed % 4:
        tracer.add(digest)  # where nobody traces the engine does more by itself
    vcpus = rng.choice((1, 1, 1, 2, 2, 3))
    host = Host(rng.randint(1, vcpus), seed=seed, trace=tracer)
    blocks = [_Guarded(_RAM)]
    try:
        async with Vm(host, vcpus=vcpus, memory=_RAM, native=native, virtio=(Entropy(), Disk(_Sectors()))) as vm:
            vm.memory.set_region(0, 0, 0)
            vm.memory.set_region(0, 0, _RAM, backing=blocks[0].ram)
            vm.load(b"\xf4", kind="flat")
            for vcpu in vm.vcpus:
                _prepare(vm, vcpu, rng)
            _rings(vm, rng)
            _disturb(vm, host, rng, blocks, limit_ns)
            how = await _run(vm, host, limit_ns)
            tracer.flush()
            digest.write(blocks[0].ram)
            for vcpu in vm.vcpus:
                state = vcpu.context.state
                digest.write(repr((list(state.gpr), state.rip, state.rflags, vcpu.mp_state)).encode())
            now = host.clock.now()
    finally:
        tracer.close()
    if not all(block.whole for block in blocks):
        raise Broken("memory beside a slot was written")
    return Played(how, now, digest.hexdigest())


async def _run(vm, host, limit_ns):
    task = asyncio.ensure_future(vm.run())
    host.clock.call_at(limit_ns, task.cancel)
    try:
        return (await task).reason
    except asyncio.CancelledError:
        now = host.clock.now()
        if now > limit_ns + 100_000:
            raise Broken(f"the limit of {limit_ns} ns passed at {now}") from None
        return "limit"
    except (GuestError, StallError) as error:
        return type(error).__name__


# ---- the world beside the guest ------------------------------------------------------------------------------------


def _disturb(vm, host, rng, blocks, limit_ns):
    """What happens meanwhile: memslots and events from outside."""
    for _ in range(rng.randint(0, 6)):
        action = rng.choice((_slot, _slot, _event, _event, _signal))
        host.clock.call_at(rng.randrange(limit_ns), action(vm, rng, blocks))


def _slot(vm, rng, blocks):
    slot = rng.randint(2, 4)
    what = rng.choice(("add", "add", "rom", "log", "move", "delete", "all"))
    base = rng.choice((0x40_0000, 0x41_0000, 0x60_0000, 0xFEC0_0000, 0xFEE0_0000, 1 << 32, 0xD000_0000))
    size = rng.choice((0x1000, 0x2000, 0x1_0000))

    def change():
        old = next((s for s in vm.memory.map.slots if s.slot_id == slot), None)
        with suppress(ConfigError):  # what KVM refuses
            if what in ("delete", "move") and old is not None:
                vm.memory.set_region(slot, base, 0 if what == "delete" else old.size)
            elif what == "all":
                vm.memory.set_region(0, 0, 0)
                vm.memory.set_region(0, 0, _RAM, backing=blocks[0].ram)
            elif old is None:
                flags = {"rom": SlotFlags.READONLY, "log": SlotFlags.LOG_DIRTY}.get(what, SlotFlags.NONE)
                block = _Guarded(size)
                blocks.append(block)
                vm.memory.set_region(slot, base, size, flags=flags, backing=block.ram)

    return change


def _event(vm, rng, _blocks):
    vcpu = rng.choice(vm.vcpus)
    mode = rng.choice([m for m in DeliveryMode if m is not DeliveryMode.EXTINT])
    vector = rng.choice((0x10, 0x20, 0x31, 0xFF, 0x08))
    return lambda: vcpu.accept_apic(mode, vector, level=True, trigger_level=bool(vector & 1))


def _signal(vm, rng, _blocks):
    line, level = rng.randrange(24), rng.random() < 0.5
    return lambda: vm.pc.ioapic.set_line(line, level)


def _rings(vm, rng):
    """Pages full of descriptors, and sometimes a device that has been told to use them."""
    for page in range(0x9_0000, 0x9_4000, 0x1000):
        entries = b"".join(
            struct.pack("<QIHH", _address(rng), rng.choice((1, 16, 512, 513, 0x1_0000, 0xFFFF_FFFF)),
                        rng.choice((0, 1, 2, 3, 4, 7)), rng.randrange(9))
            for _ in range(16)
        )  # fmt: skip
        vm.memory.write(page, entries)
        vm.memory.write(page + 0x400, struct.pack("<10H", rng.choice((0, 1)), rng.choice((1, 4, 0xFFFF)), *range(8)))
    for device in range(2):
        base = 0xD000_0000 + 0x1000 * device
        if rng.random() < 0.5:
            for register, value in (
                (0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 8),
                (0x80, 0x9_0000 + 0x1000 * device), (0x90, 0x9_0400 + 0x1000 * device), (0xA0, 0x9_0800), (0x44, 1),
                (0x70, 15),
            ):  # fmt: skip
                vm.mmio.write(base + register, 4, value, 0)


# ---- the guest -----------------------------------------------------------------------------------------------------


def _prepare(vm, vcpu, rng):
    """Tables, registers and code of one vCPU, in a megabyte of its own."""
    mode = rng.choice(MODES)
    at = vcpu.index << 20
    memory, state = vm.memory, vcpu.context.state
    cpl = rng.choice((0, 0, 0, 3)) if mode not in ("real", "v86") else 0
    memory.write(at + _CODE, _program(rng, mode, at))
    for register in range(16):
        state.gpr[register] = _value(rng)
    _descriptors(memory, at, long=mode in ("long", "compat"))
    _handlers(memory, rng, mode, at)
    _tables(memory, mode, at)
    _load_state(state, mode, cpl, at)
    state.rflags = 2 | rng.choice((0, 0x200, 0x3200, 0x3000, 0x100, 0x4_0000)) | (0x2_0000 if mode == "v86" else 0)
    if mode == "v86":
        state.cpl = 3
    if rng.random() < 0.3:
        state.cr0 |= rng.choice((8, 4, 2, 0x20, 0x1_0000, 0x4_0000))
    if rng.random() < 0.3:
        state.cr4 |= rng.choice((1 << 18, 1 << 22, 5 << 20))  # OSXSAVE; PKE; SMEP and PKE
        state.pkru = rng.getrandbits(32) & rng.choice((~3, ~0))
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 6)):
            place = at + rng.choice((_GDT, _IDT, _TSS, _TABLES, _TABLES + 0x1000, _TABLES + 0x2000))
            memory.write_u(place + 8 * rng.randrange(32), 8, rng.getrandbits(64) if rng.random() < 0.5 else _flip(rng))
    if vcpu.index:
        vcpu.set_mp_state(rng.choice((MpState.RUNNABLE, MpState.RUNNABLE, MpState.UNINITIALIZED)))


def _flip(rng):
    return rng.choice(_EDGES) | rng.choice((0, 7, 0x87, 0x8E00 << 32, 0x8900 << 32, 0x8500 << 32))


def _load_state(s, mode, cpl, at):
    if mode == "real":
        s.cr0, s.efer = 0x10, 0
        s.set_segment(Seg.CS, Segment(at >> 4, at, 0xFFFF, 0x9B00))
        for which in (Seg.SS, Seg.DS, Seg.ES, Seg.FS, Seg.GS):  # as wide as can be: devices are within reach
            s.set_segment(which, Segment(at >> 4, 0 if which is not Seg.SS else at, 0xFFFF_FFFF, 0x9300))
        s.idt = DescriptorTable(at, 0x3FF)
        s.gdt = DescriptorTable(at + _GDT, 0xFF)
        s.rip, s.gpr[4] = _CODE, 0xF000
        return
    s.cr4 = 0x620 if mode in ("pae", "long", "compat") else 0x600
    s.cr3 = at + _TABLES
    s.efer = 0xD01 if mode in ("long", "compat") else 0
    s.cr0 = 0x8001_0033 if mode in ("pae", "long", "compat") else 0x33
    s.gdt = DescriptorTable(at + _GDT, 0xFF)
    s.idt = DescriptorTable(at + _IDT, 0xFFF if mode in ("long", "compat") else 0x7FF)
    s.set_segment(Seg.TR, Segment(_TR, at + _TSS, 0x67, 0x8B00))
    s.set_segment(Seg.LDTR, Segment(0, 0, 0, 0x8200))
    if mode == "v86":
        for which in (Seg.CS, Seg.SS, Seg.DS, Seg.ES, Seg.FS, Seg.GS):
            s.set_segment(which, Segment(at >> 4 & 0xFFFF, at & 0xF_FFFF, 0xFFFF, 0xF300))
        s.rip, s.gpr[4] = _CODE, 0xF000
        return
    code = {"long": _CODE64, "prot16": _CODE16}.get(mode, _CODE32)
    data = _DATA16 if mode == "prot16" else _DATA32
    user = _USER if cpl else 0
    dpl = cpl << 13
    base = at if mode == "prot16" else 0
    limit = 0xF_FFFF if mode == "prot16" else 0xFFFF_FFFF
    s.set_segment(Seg.CS, Segment(code + user | cpl, base, limit, _KINDS[code // 8 - 1] | dpl))
    s.set_segment(Seg.SS, Segment(data + user | cpl, base, limit, _KINDS[data // 8 - 1] | dpl))
    for which in (Seg.DS, Seg.ES, Seg.FS, Seg.GS):
        s.set_segment(which, Segment(_DATA32 + user | cpl, 0, 0xFFFF_FFFF, 0xCF_9300 | dpl))
    s.cpl = cpl
    s.rip = _CODE if mode == "prot16" else at + _CODE
    s.gpr[4] = (_STACK & 0xFFFF or 0xF000) if mode == "prot16" else at + _STACK


def _descriptors(memory, at, *, long):
    entries = [0]
    for dpl in (0, 3):
        for kind in _KINDS:
            base = at if kind & 0xFF_0000 == 0x0F_0000 else 0
            high = (kind & 0xFF_FF00) | dpl << 13 | base >> 16 & 0xFF
            entries.append((high | 0xF_0000 if kind & 0x80_0000 else high) << 32 | (base & 0xFFFF) << 16 | 0xFFFF)
        entries.append(0)
    entries = entries[: _TR // 8] + [0] * max(0, _TR // 8 - len(entries))
    tss = at + _TSS
    system = 0x67 | (tss & 0xFF_FFFF) << 16 | 0x8B << 40
    entries += [system, 0, 0xFF | (at + _GDT & 0xFF_FFFF) << 16 | 0x82 << 40, 0]
    other = tss + 0x200
    entries += [0x67 | (other & 0xFF_FFFF) << 16 | 0x89 << 40, 0]
    for index, entry in enumerate(entries):
        memory.write_u(at + _GDT + 8 * index, 8, entry)
    if long:
        memory.write_u(tss + 4, 8, at + _STACK0)
        for index in range(7):
            memory.write_u(tss + 0x24 + 8 * index, 8, at + _STACK0 - 0x1000 * index)
    else:
        memory.write_u(tss + 4, 4, at + _STACK0)
        memory.write_u(tss + 8, 4, _DATA32)
        fields = (at + _TABLES, at + _CODE, 2, 0, 0, 0, 0, at + _STACK, 0, 0, 0, _DATA32, _CODE32, _DATA32)
        memory.write(other + 0x1C, struct.pack("<14I", *fields))
    memory.write_u(tss + 0x66, 2, 0x68)


def _handlers(memory, rng, mode, at):
    """Each vector's handler sets up a stack and goes on somewhere in the code."""
    for vector in range(256):
        where = at + _HANDLERS + 16 * vector
        target = at + _CODE + rng.randrange(_SIZE)
        if mode == "real":
            # mov sp, 0xf000; jmp target
            code = b"\xbc\x00\xf0\xe9" + struct.pack("<H", target - where - 6 & 0xFFFF)
            memory.write(at + 4 * vector, struct.pack("<HH", where & 0xFFFF, (where & ~0xFFFF) >> 4 & 0xFFFF))
        else:
            kind = rng.choice((0xE, 0xE, 0xE, 0xF, 5, 6)) if mode not in ("long", "compat") else 0xE
            dpl = rng.choice((0, 3))
            code = b"\xbc" + struct.pack("<I", at + _STACK0) + b"\xe9" + struct.pack("<i", target - where - 10)
            if rng.random() < 0.4:
                code = rng.choice((b"\xcf", b"\x48\xcf", b"\x58\xcf", b"\xf4", b"\x58\x48\xcf"))
            selector = _OTHER_TSS if kind == 5 else _CODE64 if mode in ("long", "compat") else _CODE32
            ist = rng.choice((0, 0, 1, 7)) if mode in ("long", "compat") else 0
            gate = where & 0xFFFF | selector << 16 | ist << 32 | (0x80 | dpl << 5 | kind) << 40 | (where >> 16) << 48
            if mode in ("long", "compat"):
                memory.write(at + _IDT + 16 * vector, struct.pack("<QQ", gate, 0))
            else:
                memory.write_u(at + _IDT + 8 * vector, 8, gate)
        memory.write(where, code)


def _tables(memory, mode, at):
    """Four GiB to themselves in 2-MiB pages, for user and supervisor."""
    if mode in ("long", "compat"):
        memory.write_u(at + _TABLES, 8, at + _TABLES + 0x1007)
        memory.write_u(at + _TABLES + 0x1FF8 - 0x1000, 8, at + _TABLES + 0x1007)
        first, flags = at + _TABLES + 0x1000, 7
    elif mode == "pae":
        first, flags = at + _TABLES, 1
    else:
        return
    for gib in range(4):
        directory = at + _TABLES + 0x2000 + 0x1000 * gib
        memory.write_u(first + 8 * gib, 8, directory | flags)
        memory.write(directory, _directory(gib))


_DIRECTORIES = [struct.pack("<512Q", *((gib << 9 | page) << 21 | 0x87 for page in range(512))) for gib in range(4)]


def _directory(gib):
    return _DIRECTORIES[gib]


# ---- its code ------------------------------------------------------------------------------------------------------


def _value(rng):
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(_EDGES)
    return _address(rng) if kind < 0.8 else rng.getrandbits(rng.choice((8, 16, 32, 64)))


def _address(rng):
    return rng.choice(
        (_CODE, _GDT, _IDT, _TSS, _HANDLERS, _TABLES, _STACK, _DATA, 0x9_0000, _RAM - 4, _RAM, 0x40_0000, 0x60_0FFF)
    ) + rng.choice((0, 0, 1, 7, 8, 0xFFC, 0xFFF)) if rng.random() < 0.6 else rng.choice(_MMIO)  # fmt: skip


def _program(rng, mode, at):
    """A page of instructions."""
    code = bytearray()
    while len(code) < _SIZE - 64:
        code += _SNIPPETS[rng.choices(range(len(_SNIPPETS)), _WEIGHTS)[0]](rng, mode, at)
    # jmp back to the start
    code += b"\xe9" + (-(len(code) + 5)).to_bytes(4, "little", signed=True)
    return bytes(code[:_SIZE])


def _mov(mode, register, value):
    """mov of a register (0 to 7), as wide as the mode has it, but 32 bits in 16-bit code."""
    if mode == "long":
        return bytes((0x48, 0xB8 + register)) + struct.pack("<Q", value & _M64)
    prefix = b"\x66" if mode in ("real", "v86", "prot16") else b""
    return prefix + bytes((0xB8 + register,)) + struct.pack("<I", value & 0xFFFF_FFFF)


def _bytes(rng, _mode, _at):
    return rng.randbytes(rng.randint(1, 8))


def _plain(rng, _mode, _at):
    prefix = bytes(
        rng.choices((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x48, 0x26, 0x2E, 0x64), k=rng.choice((0, 0, 0, 1, 2, 3)))
    )
    return prefix + rng.choice(_PLAIN)


def _msr(rng, mode, _at):
    index = rng.choice(_MSRS) if rng.random() < 0.7 else 0x800 + rng.randrange(0x40)
    value = _value(rng)
    if index == 0x1B and rng.random() < 0.7:
        value = 0xFEE0_0800 | rng.choice((0, 0x100, 0x400, 0x500))
    code = _mov(mode, 1, index) + _mov(mode, 0, value & 0xFFFF_FFFF) + _mov(mode, 2, value >> 32)
    return code + rng.choice((b"\x0f\x30", b"\x0f\x30", b"\x0f\x32"))


def _port(rng, mode, _at):
    port = rng.choice(_PORTS) if rng.random() < 0.9 else rng.getrandbits(16)
    if port in (0x64, 0xCF9, 0x604, 0x92) and rng.random() < 0.9:
        port = 0x70  # most guests should live
    code = _mov(mode, 2, port) + _mov(mode, 0, _value(rng))
    return code + rng.choice((b"\xec", b"\xed", b"\x66\xed", b"\xee", b"\xef", b"\x66\xef"))


def _memory(rng, mode, at):
    """A load or store through [rBX], of a device or of the tables."""
    address = rng.choice(_MMIO) if rng.random() < 0.7 else at + _address(rng)
    code = _mov(mode, 3, address + rng.choice((0, 0, 0, 0, 1, 4))) + _mov(mode, 0, _value(rng))
    wide = b"\x67" if mode in ("real", "v86", "prot16") else b""
    what = rng.choice(
        ("8803", "8903", "8a03", "8b03", "668903", "668b03", "0103", "f00103", "8703", "c6034e", "ff03", "0f2803",
         "0f2903", "dd03", "dd13", "0fc70b", "a4", "a5", "f3ab")
    )  # fmt: skip
    if mode == "long" and rng.random() < 0.4:
        what = "48" + rng.choice(("8903", "8b03", "8703", "0103"))
    return code + wide + bytes.fromhex(what)


def _control(rng, mode, _at):
    register = rng.choice((0, 2, 3, 4, 8 if mode == "long" else 0, 0, 4, 3))
    flip = rng.choice((1 << rng.randrange(32), 0, rng.getrandbits(32)))
    rex = b"\x44" if register == 8 else b""
    number = (register & 7) << 3
    get, put = rex + bytes((0x0F, 0x20, 0xC0 | number)), rex + bytes((0x0F, 0x22, 0xC0 | number))
    if rng.random() < 0.3:
        return _mov(mode, 0, _value(rng)) + put
    return get + (b"\x66" if mode in ("real", "v86", "prot16") else b"") + b"\x35" + struct.pack("<I", flip) + put


def _debug(rng, mode, at):
    number = rng.randrange(8)
    value = rng.choice((at + _CODE + rng.randrange(_SIZE), 0x400, 0x402, 0xD_0402, 0x2_0401, 0x2400, _value(rng)))
    return _mov(mode, 0, value) + bytes((0x0F, rng.choice((0x21, 0x23)), 0xC0 | number << 3))


def _hypercall(rng, mode, at):
    code = _mov(mode, 0, rng.choice((1, 5, 9, 10, 11, 12, rng.getrandbits(64))))
    for register in (3, 1, 2, 6):
        code += _mov(mode, register, rng.choice((0, 1, 2, 3, at + _DATA, 0x40FD, _value(rng))))
    return code + rng.choice((b"\x0f\x01\xc1", b"\x0f\x01\xd9"))


def _ipi(rng, mode, _at):
    """A store to the ICR, through memory or the x2APIC's MSR."""
    low = rng.choice((0, 0x4_0000, 0x8_0000, 0xC_0000)) | rng.getrandbits(16)
    if rng.random() < 0.5:
        return _mov(mode, 1, 0x830) + _mov(mode, 0, low) + _mov(mode, 2, rng.choice((0, 1, 2, 0xFF))) + b"\x0f\x30"
    wide = b"\x67\x66" if mode in ("real", "v86", "prot16") else b""
    return _mov(mode, 3, 0xFEE0_0300) + _mov(mode, 0, low) + wide + b"\x89\x03"


def _timer(rng, mode, _at):
    if rng.random() < 0.5:
        return _mov(mode, 1, 0x6E0) + b"\x0f\x31" + _mov(mode, 0, rng.getrandbits(20)) + b"\x0f\x30"
    wide = b"\x67\x66" if mode in ("real", "v86", "prot16") else b""
    code = _mov(mode, 3, 0xFEE0_0320) + _mov(mode, 0, 0x30 | rng.choice((0, 0x2_0000, 0x4_0000))) + wide + b"\x89\x03"
    return code + _mov(mode, 3, 0xFEE0_0380) + _mov(mode, 0, rng.getrandbits(rng.randint(1, 32))) + wide + b"\x89\x03"


def _registers(rng, mode, at):
    return _mov(mode, rng.choice((0, 1, 2, 3, 5, 6, 7)), at + _address(rng) if rng.random() < 0.7 else _value(rng))


def _stack(_rng, mode, at):
    return _mov(mode, 4, 0xF000 if mode in ("real", "v86", "prot16") else at + _STACK)


def _far(rng, mode, at):
    """A far jump to other code, by a pointer on the spot."""
    selector = rng.choice((_CODE64, _CODE32, _CODE16, _OTHER_TSS, _LDT, _TR, at >> 4 & 0xFFFF, rng.getrandbits(16)))
    target = rng.choice((_CODE, at + _CODE)) + rng.randrange(_SIZE)
    if mode == "long":
        return b"\x68" + struct.pack("<I", selector) + b"\x68" + struct.pack("<i", target & 0x7FFF_FFFF) + b"\xcb"
    if mode in ("real", "v86", "prot16"):
        return b"\xea" + struct.pack("<HH", target & 0xFFFF, selector)
    return b"\xea" + struct.pack("<IH", target, selector)


def _patch(rng, mode, at):
    """A store into the code itself."""
    address = at + _CODE + rng.randrange(_SIZE)
    wide = b"\x67" if mode in ("real", "v86", "prot16") else b""
    return _mov(mode, 3, address) + _mov(mode, 0, rng.getrandbits(32)) + wide + b"\x89\x03"


_CHOICES = (
    (_bytes, 10), (_plain, 30), (_msr, 12), (_port, 12), (_memory, 15), (_control, 5), (_debug, 3), (_hypercall, 4),
    (_ipi, 4), (_timer, 3), (_registers, 8), (_stack, 3), (_far, 3), (_patch, 2),
)  # fmt: skip
_SNIPPETS = tuple(snippet for snippet, _ in _CHOICES)
_WEIGHTS = tuple(weight for _, weight in _CHOICES)
