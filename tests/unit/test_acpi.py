"""ACPI tables (ACPI 6.5, chapter 5) and MP tables (Intel MP specification 1.4), read back as a guest reads them."""

import struct

import pytest

from aiovm.acpi import Board, MmioDevice, write_tables
from aiovm.errors import ConfigError
from aiovm.memory import GuestMemory


def built(**kw):
    kw.setdefault("apic_ids", (0, 1, 2, 3))
    kw.setdefault("memory", ((0, 0x1000_0000),))
    memory = GuestMemory()
    memory.set_region(0, 0, 1 << 20)
    assert write_tables(Board(**kw), memory) == 0xE0000
    return memory


def tables(memory):
    """Follow RSDP and XSDT; every table by its signature."""
    rsdp = memory.read(0xE0000, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    assert rsdp[15] == 2
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)
    found = {}
    for at in struct.unpack_from(f"<{(memory.read_u(xsdt + 4, 4) - 36) // 8}Q", memory.read(xsdt, 200), 36):
        found[memory.read(at, 4).decode()] = table(memory, at)
    found["DSDT"] = table(memory, struct.unpack_from("<Q", found["FACP"], 140)[0])
    table(memory, xsdt)
    return found


def table(memory, at):
    data = memory.read(at, memory.read_u(at + 4, 4))
    assert sum(data) & 0xFF == 0
    assert at % 16 == 0
    return data


def test_the_fixed_description():
    memory = built()
    fadt = tables(memory)["FACP"]
    assert len(fadt) == 276
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert memory.read(facs, 4) == b"FACS"
    assert facs % 64 == 0
    assert memory.read(dsdt, 4) == b"DSDT"
    assert struct.unpack_from("<HI", fadt, 46) == (9, 0)  # SCI; no SMI command port
    assert struct.unpack_from("<I", fadt, 56) == (0x600,)  # PM1a event block
    assert struct.unpack_from("<I", fadt, 64) == (0x604,)  # PM1a control block
    assert struct.unpack_from("<I", fadt, 76) == (0x608,)  # PM timer
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)  # their lengths
    assert struct.unpack_from("<H", fadt, 109) == (5,)  # ISA devices, no VGA, no 8042
    assert struct.unpack_from("<I", fadt, 112)[0] & 0x400  # a reset register,
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)  # port 0xCF9 := 6


def entries(data, at):
    while at < len(data):
        yield data[at : at + data[at + 1]]
        at += data[at + 1]


def test_interrupt_controllers():
    madt = tables(built(apic_ids=(0, 5, 300)))["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    found = list(entries(madt, 44))
    assert [(e[2], e[3], e[4]) for e in found if e[0] == 0] == [(0, 0, 1), (1, 5, 1)]
    assert [struct.unpack_from("<III", e, 4) for e in found if e[0] == 9] == [(300, 1, 2)]
    assert [struct.unpack_from("<II", e, 4) for e in found if e[0] == 1] == [(0xFEC0_0000, 0)]
    # ISA 0 is input 2; the SCI is level-triggered and active high.
    assert [struct.unpack_from("<BIH", e, 3) for e in found if e[0] == 2] == [(0, 2, 0), (9, 9, 0xD)]
    assert [e[2:] for e in found if e[0] == 4] == [bytes([0xFF, 0, 0, 1])]


def test_numa_nodes_share_cpus_and_memory():
    srat = tables(built(nodes=2, memory=((0, 0xC000_0000), (0x1_0000_0000, 0x4000_0000))))["SRAT"]
    found = list(entries(srat, 48))
    assert [(e[3], e[2]) for e in found if e[0] == 0] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [struct.unpack_from("<I", e, 2) + struct.unpack_from("<QQ", e, 8) for e in found if e[0] == 1] == [
        (0, 0, 0x8000_0000),
        (1, 0x8000_0000, 0x4000_0000),
        (1, 0x1_0000_0000, 0x4000_0000),
    ]


def test_one_node_needs_no_table_and_hpet_is_told_when_asked_for():
    assert set(tables(built())) == {"FACP", "APIC", "DSDT"}
    hpet = tables(built(hpet=True))["HPET"]
    assert len(hpet) == 56
    assert struct.unpack_from("<Q", hpet, 44) == (0xFED0_0000,)


def test_dsdt_names_power_off_and_devices():
    dsdt = tables(built(mmio=(MmioDevice(0xD000_0200, 0x200, 17),)))["DSDT"]
    assert b"\x08_S5_\x12\x0a\x04\x0a\x00\x0a\x00\x0a\x00\x0a\x00" in dsdt
    assert b"\x08_HID\x0c\x41\xd0\x05\x01" in dsdt  # PNP0501
    assert b"\x47\x01\xf8\x03\xf8\x03\x01\x08\x22\x10\x00\x79\x00" in dsdt  # its ports and interrupt 4
    assert b"\x08_HID\x0dLNRO0005\x00" in dsdt
    assert b"\x86\x09\x00\x01" + struct.pack("<II", 0xD000_0200, 0x200) in dsdt
    assert b"\x89\x06\x00\x01\x01" + struct.pack("<I", 17) in dsdt


def package_end(data, at):
    """Where the package whose length field is at ``at`` ends (ACPI 6.5, 20.2.4)."""
    lead = data[at]
    extra = lead >> 6
    if not extra:
        return at + (lead & 0x3F)
    return at + (lead & 0xF | int.from_bytes(data[at + 1 : at + 1 + extra], "little") << 4)


@pytest.mark.parametrize("devices", [0, 1, 40])
def test_package_lengths_fit_small_and_large_scopes(devices):
    dsdt = tables(built(mmio=tuple(MmioDevice(0xD000_0000 + 0x200 * i, 0x200, 16) for i in range(devices))))["DSDT"]
    scope = dsdt.index(b"\x10")
    assert dsdt[package_end(dsdt, scope + 1) :].startswith(b"\x08_S5_")
    at = scope
    for _ in range(2 + devices):
        at = dsdt.index(b"\x5b\x82", at)
        end = package_end(dsdt, at + 2)
        assert dsdt[end : end + 2] == b"\x5b\x82" or dsdt[end : end + 5] == b"\x08_S5_"
        at += 1


def test_mp_tables():
    memory = built(apic_ids=(0, 1))
    floating = memory.read(0xF0000, 16)
    assert floating[:4] == b"_MP_"
    assert sum(floating) & 0xFF == 0
    at = struct.unpack_from("<I", floating, 4)[0]
    length = memory.read_u(at + 4, 2)
    data = memory.read(at, length)
    assert data[:4] == b"PCMP"
    assert sum(data) & 0xFF == 0
    assert struct.unpack_from("<I", data, 36) == (0xFEE0_0000,)
    count, at, found = memory.read_u(at + 34, 2), 44, []
    while at < length:
        size = 20 if data[at] == 0 else 8
        found.append(data[at : at + size])
        at += size
    assert len(found) == count
    assert [(e[1], e[3]) for e in found if e[0] == 0] == [(0, 3), (1, 1)]
    assert {e[5]: e[7] for e in found if e[0] == 3} == {i: i or 2 for i in range(16) if i != 2}
    assert [(e[1], e[7]) for e in found if e[0] == 4] == [(3, 0), (1, 1)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="8 NUMA nodes for 4 CPUs"):
        built(nodes=8)
    with pytest.raises(ConfigError, match="do not fit"):
        built(mmio=tuple(MmioDevice(0xD000_0000, 0x200, 16) for _ in range(1200)))
