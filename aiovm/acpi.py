"""What firmware tells a guest about the machine: ACPI and MP tables, in the BIOS area.

RSDP (revision 2) at 0xE0000, then XSDT, FADT, FACS, MADT, DSDT, SRAT when there are several NUMA nodes, and HPET when
asked for; the MP floating pointer and configuration table (Intel MP specification 1.4) at 0xF0000.

Rules: a function of a :class:`Board` value, nothing else; every table's bytes add up to 0. The DSDT names the sleep
type of power-off, the serial port, the clock, and each virtio-mmio device; its AML comes from the few encoders below.

Source: ACPI 6.5, chapters 5 (tables), 6.4 (resources), 19 and 20 (AML). Modelled: full hardware mode (PM1 block at
0x600, reset register 0xCF9), local APICs and x2APICs, ISA overrides, LINT1 as NMI. Not modelled: PCI, processor
objects, S1–S4, thermal and battery objects.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiovm.devices.hpet import HPET_BASE
from aiovm.devices.ioapic import IOAPIC_BASE
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from aiovm.memory import GuestMemory

__all__ = ["PM_BASE", "RESET_PORT", "RSDP", "S5_TYPE", "SCI", "Board", "MmioDevice", "write_tables"]

#: Where the root pointer lies.
RSDP = 0xE0000
_MP = 0xF0000
_MP_END = 0x100000

#: ACPI's fixed hardware: I/O base, interrupt, the sleep type of S5.
PM_BASE = 0x600
SCI = 9
S5_TYPE = 0
#: Port 0xCF9; 6 is a hard reset.
RESET_PORT = 0xCF9
_RESET_VALUE = 6

_LAPIC_BASE = 0xFEE0_0000
_OEM = b"AIOVM "
_OEM_TABLE = b"AIOVMPC "
_CREATOR = b"AIOV"
_ACTIVE_HIGH_LEVEL = 0xD
_NMI_LINT = 1


@dataclass(frozen=True, slots=True)
class MmioDevice:
    """A virtio-mmio device (``LNRO0005``): its register block and its interrupt."""

    base: int
    size: int
    gsi: int


@dataclass(frozen=True, slots=True)
class Board:
    """What the tables say. ``apic_ids``: one a CPU, the boot CPU first. ``nodes``: NUMA nodes, equal shares."""

    apic_ids: tuple[int, ...]
    memory: tuple[tuple[int, int], ...]
    nodes: int = 1
    hpet: bool = False
    mmio: tuple[MmioDevice, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= len(self.apic_ids):
            raise ConfigError(f"{self.nodes} NUMA nodes for {len(self.apic_ids)} CPUs")


def write_tables(board: Board, memory: GuestMemory) -> int:
    """Store all tables; the root pointer's address."""
    at = RSDP + 0x40
    stored: list[int] = []

    def store(table: bytes) -> int:
        nonlocal at
        base = -(-at // 64) * 64
        at = base + len(table)
        if at > _MP:
            raise ConfigError(f"ACPI tables of {at - RSDP:#x} bytes do not fit {RSDP:#x}-{_MP:#x}")
        memory.write(base, table)
        return base

    facs = store(struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2))
    dsdt = store(_dsdt(board))
    stored += [store(_fadt(facs, dsdt)), store(_madt(board))]
    if board.nodes > 1:
        stored.append(store(_srat(board)))
    if board.hpet:
        stored.append(store(_hpet()))
    xsdt = store(_table(b"XSDT", 1, b"".join(struct.pack("<Q", base) for base in stored)))
    memory.write(RSDP, _rsdp(xsdt))
    floating, configuration = _mp_tables(board)
    if _MP + 16 + len(configuration) > _MP_END:
        raise ConfigError(f"MP tables of {len(configuration):#x} bytes do not fit {_MP:#x}-{_MP_END:#x}")
    memory.write(_MP, floating + configuration)
    return RSDP


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table (ACPI 6.5, 5.2.6)."""
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    table = bytearray(head + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    """5.2.5.3: two checksums, the first over the first 20 bytes; no RSDT."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    data[8] = _checksum(data[:20])
    data[32] = _checksum(data)
    return bytes(data)


def _gas(address: int, bits: int) -> bytes:
    """A generic address structure in I/O space (5.2.3.2)."""
    access = {8: 1, 16: 2, 32: 3}[bits]
    return struct.pack("<BBBBQ", 1, bits, 0, access, address)


def _fadt(facs: int, dsdt: int) -> bytes:
    """5.2.9, revision 6. No SMI command port: the hardware is always in ACPI mode."""
    event, control, timer = PM_BASE, PM_BASE + 4, PM_BASE + 8
    # ISA devices but no VGA. The 8042 has no keyboard and is not announced: guests would wait for one.
    legacy = 1 << 0 | 1 << 2
    # WBINVD, C1, no sleep button, no RTC wake-up, 32-bit timer, reset register.
    flags = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
    body = struct.pack(
        "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI",
        facs, dsdt, 0, 0, SCI, 0, 0, 0, 0, 0,
        event, 0, control, 0, 0, timer, 0, 0,
        4, 2, 0, 4, 0, 0, 0, 0,
        0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, 0x32, legacy, 0, flags,
    )  # fmt: skip
    body += _gas(RESET_PORT, 8) + struct.pack("<BHB", _RESET_VALUE, 0, 5)
    body += struct.pack("<QQ", facs, dsdt)
    none = bytes(12)
    body += _gas(event, 32) + none + _gas(control, 16) + none + none + _gas(timer, 32) + none + none
    body += none + none + bytes(8)  # sleep registers of reduced hardware, hypervisor vendor
    return _table(b"FACP", 6, body)


def _madt(board: Board) -> bytes:
    """5.2.12: one entry a CPU, the I/O APIC, what differs from ISA's defaults, and LINT1 as NMI."""
    body = bytearray(struct.pack("<II", _LAPIC_BASE, 1))  # with 8259s
    for uid, apic_id in enumerate(board.apic_ids):
        if apic_id < 255:
            body += struct.pack("<BBBBI", 0, 8, uid & 0xFF, apic_id, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, _ACTIVE_HIGH_LEVEL)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, _NMI_LINT)
    return _table(b"APIC", 4, bytes(body))


def _srat(board: Board) -> bytes:
    """5.2.16: CPUs and memory in equal, contiguous shares."""
    body = bytearray(struct.pack("<IQ", 1, 0))
    cpus = len(board.apic_ids)
    for index, apic_id in enumerate(board.apic_ids):
        node = index * board.nodes // cpus
        if apic_id < 255:
            body += struct.pack("<BBBBIB3sI", 0, 16, node & 0xFF, apic_id, 1, 0, node.to_bytes(4, "little")[1:], 0)
        else:
            body += struct.pack("<BBHIIIII", 2, 24, 0, node, apic_id, 1, 0, 0)
    total = sum(size for _, size in board.memory)
    share = total // board.nodes // 0x20_0000 * 0x20_0000
    node, left = 0, share if board.nodes > 1 else total
    for start, size in board.memory:
        base, rest = start, size
        while rest:
            length = rest if node == board.nodes - 1 else min(rest, left)
            body += struct.pack("<BBIHQQIIQ", 1, 40, node, 0, base, length, 0, 1, 0)
            base, rest, left = base + length, rest - length, left - length
            if not left and node < board.nodes - 1:
                node, left = node + 1, share
    return _table(b"SRAT", 3, bytes(body))


def _hpet() -> bytes:
    """The IA-PC HPET specification's table (3.2.4)."""
    return _table(b"HPET", 1, struct.pack("<IBBBBQBHB", 0x8086_A201, 0, 64, 0, 0, HPET_BASE, 0, 0x80, 0))


# ---- AML (ACPI 6.5, chapter 20) ------------------------------------------------------------------------------------


def _package(opcode: bytes, body: bytes) -> bytes:
    """An opcode with its package length, which counts itself (20.2.4)."""
    length = len(body) + 1
    if length < 0x40:
        return opcode + bytes([length]) + body
    extra = 1 if length + 1 < 0x1000 else 2
    length += extra
    rest = (length >> 4).to_bytes(extra, "little")
    return opcode + bytes([extra << 6 | length & 0xF]) + rest + body


def _integer(value: int) -> bytes:
    for limit, prefix, size in ((1 << 8, b"\x0a", 1), (1 << 16, b"\x0b", 2), (1 << 32, b"\x0c", 4)):
        if value < limit:
            return prefix + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def _string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def _name(name: str, value: bytes) -> bytes:
    return b"\x08" + name.encode("ascii") + value


def _device(name: str, body: bytes) -> bytes:
    return _package(b"\x5b\x82", name.encode("ascii") + body)


def _eisa_id(text: str) -> bytes:
    """A compressed EISA id: three letters of five bits, four hexadecimal digits, big-endian (19.3.4)."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def _resources(*descriptors: bytes) -> bytes:
    """A resource template: a buffer that ends with an end tag (6.4)."""
    data = b"".join(descriptors) + b"\x79\0"
    return _package(b"\x11", _integer(len(data)) + data)


def _io(base: int, length: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def _irq(gsi: int) -> bytes:
    return struct.pack("<BH", 0x22, 1 << gsi)


def _memory32(base: int, size: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def _interrupt(gsi: int) -> bytes:
    """Extended interrupt: consumer, level-triggered, active high, exclusive (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0b0001, 1, gsi)


def _dsdt(board: Board) -> bytes:
    devices = _device(
        "COM1",
        _name("_HID", _eisa_id("PNP0501"))
        + _name("_UID", _integer(1))
        + _name("_STA", _integer(0xF))
        + _name("_CRS", _resources(_io(0x3F8, 8), _irq(4))),
    )
    devices += _device("RTC0", _name("_HID", _eisa_id("PNP0B00")) + _name("_CRS", _resources(_io(0x70, 2), _irq(8))))
    for index, device in enumerate(board.mmio):
        devices += _device(
            f"VR{index:02X}",
            _name("_HID", _string("LNRO0005"))
            + _name("_UID", _integer(index))
            + _name("_CCA", _integer(1))
            + _name("_CRS", _resources(_memory32(device.base, device.size), _interrupt(device.gsi))),
        )
    s5 = _package(b"\x12", b"\x04" + _integer(S5_TYPE) * 2 + _integer(0) * 2)
    return _table(b"DSDT", 2, _package(b"\x10", b"\\_SB_" + devices) + _name("_S5_", s5))


# ---- MP tables (Intel MP specification 1.4, chapter 4) -------------------------------------------------------------


def _mp_tables(board: Board) -> tuple[bytes, bytes]:
    """The floating pointer and the configuration table that follows it."""
    entries = []
    for index, apic_id in enumerate(board.apic_ids):
        if apic_id < 255:
            enabled_boot = 1 | (2 if index == 0 else 0)
            entries.append(struct.pack("<BBBBII8x", 0, apic_id, 0x14, enabled_boot, 0x600, 0x201))
    entries.append(struct.pack("<BB6s", 1, 0, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, 0, 0x11, 1, IOAPIC_BASE))
    for irq in range(16):
        if irq != 2:
            flags = _ACTIVE_HIGH_LEVEL if irq == SCI else 0
            entries.append(struct.pack("<BBHBBBB", 3, 0, flags, 0, irq, 0, 2 if irq == 0 else irq))
    entries.append(struct.pack("<BBHBBBB", 4, 3, 0, 0, 0, 0xFF, 0))  # ExtINT on LINT0
    entries.append(struct.pack("<BBHBBBB", 4, 1, 0, 0, 0, 0xFF, _NMI_LINT))
    body = b"".join(entries)
    table = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBx",
            b"PCMP", 44 + len(body), 4, 0, _OEM.ljust(8), b"PC".ljust(12), 0, 0, len(entries), _LAPIC_BASE, 0, 0,
        )
        + body
    )  # fmt: skip
    table[7] = _checksum(table)
    floating = bytearray(struct.pack("<4sIBBBBBBBB", b"_MP_", _MP + 16, 1, 4, 0, 0, 0, 0, 0, 0))
    floating[10] = _checksum(floating)
    return bytes(floating), bytes(table)
