"""QEMU's firmware configuration device (docs/specs/fw_cfg.rst)."""

import struct

import pytest

from aiovm.devices.fw_cfg import FwCfg
from aiovm.errors import ConfigError
from aiovm.memory import GuestMemory

FILES = {"opt/b": b"second", "etc/a": b"first file"}


def make(**kw):
    return FwCfg(cpus=4, ram_bytes=0x400_0000, files=FILES, **kw)


def with_memory():
    memory = GuestMemory()
    memory.set_region(0, 0, 0x2_0000)
    return make(memory=memory), memory


def item(dev, key, length):
    dev.write(0, 2, key, 0)
    return bytes(dev.read(1, 1, 0) for _ in range(length))


def dma(dev, memory, control, length=0, address=0, at=0x1000):
    memory.write(at, struct.pack(">IIQ", control, length, address))
    dev.write(8, 4, int.from_bytes(struct.pack(">I", at), "little"), 0)
    return int.from_bytes(memory.read(at, 4), "big")


def test_signature_and_numbers():
    dev = make()
    assert item(dev, 0, 6) == b"QEMU\0\0"
    assert item(dev, 1, 4) == b"\1\0\0\0"
    assert item(dev, 3, 8) == (0x400_0000).to_bytes(8, "little")
    assert item(dev, 5, 2) == b"\4\0"
    assert item(dev, 0x4005, 2) == b"\4\0"
    assert item(dev, 0xF, 2) == b"\4\0"
    assert item(dev, 0x77, 2) == b"\0\0"


def test_directory_lists_files_by_name():
    dev = make()
    raw = item(dev, 0x19, 4 + 2 * 64)
    assert raw[:4] == b"\0\0\0\2"
    entries = [struct.unpack(">IHH56s", raw[4 + 64 * i : 68 + 64 * i]) for i in range(2)]
    assert [(size, key, name.rstrip(b"\0")) for size, key, _, name in entries] == [
        (10, 0x20, b"etc/a"),
        (6, 0x21, b"opt/b"),
    ]
    assert item(dev, 0x20, 10) == b"first file"
    assert item(dev, 0x21, 6) == b"second"


def test_selecting_starts_over_and_wide_reads_take_more():
    dev = make()
    assert item(dev, 0x20, 3) == b"fir"
    dev.write(0, 2, 0x20, 0)
    assert dev.read(1, 2, 0) == int.from_bytes(b"fi", "little")
    dev.write(1, 1, 0x55, 0)
    assert dev.read(1, 1, 0) == ord("r")
    dev.write(0, 1, 0x21, 0)
    assert dev.read(1, 1, 0) == ord("s"), "a byte does not select"


def test_without_dma():
    dev = make()
    assert dev.read(4, 4, 0) == 0xFFFF_FFFF
    assert dev.read(0, 2, 0) == 0xFFFF
    dev.write(8, 4, 0, 0)


def test_dma_signature_and_feature():
    dev, _ = with_memory()
    assert dev.read(4, 8, 0) == int.from_bytes(b"QEMU CFG", "little")
    assert dev.read(8, 4, 0) == int.from_bytes(b" CFG", "little")
    assert item(dev, 1, 1) == b"\3"


def test_dma_read_and_skip():
    dev, memory = with_memory()
    assert dma(dev, memory, 0x20 << 16 | 0x0A, 5, 0x2000) == 0
    assert memory.read(0x2000, 6) == b"first\0"
    assert dma(dev, memory, 0x04, 1) == 0
    assert dma(dev, memory, 0x02, 6, 0x2000) == 0
    assert memory.read(0x2000, 6) == b"file\0\0"


def test_dma_address_in_two_halves_or_at_once():
    dev, memory = with_memory()
    memory.write(0x1000, struct.pack(">IIQ", 0x20 << 16 | 0x0A, 5, 0x2000))
    dev.write(4, 4, 0, 0)
    dev.write(8, 4, 0x0010_0000, 0)
    assert memory.read(0x2000, 5) == b"first"
    memory.write(0x1000, struct.pack(">IIQ", 0x21 << 16 | 0x0A, 5, 0x2000))
    dev.write(4, 8, 0x0010_0000_0000_0000, 0)
    assert memory.read(0x2000, 5) == b"secon"
    dev.write(4, 4, 0x0100_0000, 0)
    memory.write(0x1000, struct.pack(">IIQ", 0x20 << 16 | 0x0A, 5, 0x2000))
    dev.write(8, 4, 0x0010_0000, 0)
    assert memory.read(0x2000, 5) == b"secon", "the high half was not 0: no memory there"


def test_dma_errors():
    dev, memory = with_memory()
    assert dma(dev, memory, 0x10, 5, 0x2000) == 1
    assert dma(dev, memory, 0x02, 5, 0xFFFF_0000) == 1
    assert dma(dev, memory, 0x02, 0xFFFF_FFFF, 0x4000) == 1
    dev.write(8, 4, 0xFFFF_FFFF, 0)


def test_dma_answer_into_nowhere():
    dev, memory = with_memory()
    memory.set_region(1, 0x10_0000, 0x1000, flags=memory.map.slots[0].flags.READONLY)
    memory.load_rom(0x10_0000, struct.pack(">IIQ", 0x20 << 16 | 0x0A, 5, 0x2000))
    dev.write(8, 4, int.from_bytes(struct.pack(">I", 0x10_0000), "little"), 0)
    assert memory.read(0x2000, 5) == b"first"


def test_save_restore_reset():
    dev = make()
    item(dev, 0x20, 3)
    saved = dev.save()
    dev.reset()
    assert dev.read(1, 1, 0) == ord("Q")
    dev.restore(saved)
    assert dev.read(1, 1, 0) == ord("s")


def test_bad_configuration():
    with pytest.raises(ConfigError):
        FwCfg(cpus=1, ram_bytes=0, files={"x" * 56: b""})
    with pytest.raises(ConfigError):
        FwCfg(cpus=70_000, ram_bytes=0)
