"""QEMU's pc-testdev."""

from aiovm.devices.pc_testdev import PcTestdev
from aiovm.irq import IrqLine


def make():
    lines = [IrqLine() for _ in range(24)]
    return PcTestdev(lines), lines


def test_register_at_any_width():
    dev, _ = make()
    dev.ports.write(0, 4, 0x1234_5678, 0)
    assert dev.ports.read(0, 4, 0) == 0x1234_5678
    assert dev.ports.read(1, 1, 0) == 0x56
    assert dev.ports.read(2, 2, 0) == 0x1234
    dev.ports.write(3, 1, 0x1AB, 0)
    dev.ports.write(8, 2, 0xCDEF, 0)
    assert dev.ports.read(0, 4, 0) == 0xAB34_CDEF
    assert dev.ports.read(8, 4, 0) == 0xAB34_CDEF
    assert dev.ports.length == 12


def test_flush_is_swallowed():
    dev, _ = make()
    dev.ports.write(4, 4, 0xDEAD_0000, 0)
    assert dev.ports.read(4, 4, 0) == 0xFFFF_FFFF
    assert dev.ports.read(0, 4, 0) == 0


def test_interrupt_lines():
    dev, lines = make()
    assert dev.irqs.length == 24
    dev.irqs.write(14, 1, 1, 0)
    dev.irqs.write(23, 1, 0x80, 0)
    assert [i for i, line in enumerate(lines) if line.level] == [14, 23]
    dev.irqs.write(14, 1, 0, 0)
    assert not lines[14].level
    dev.irqs.write(1, 4, 0x0100_FF00, 0)  # a byte for each line
    assert [i for i, line in enumerate(lines) if line.level] == [2, 4, 23]
    dev.irqs.write(22, 2, 0, 0)
    assert not lines[23].level
    assert dev.irqs.read(0, 1, 0) == 0xFF


def test_memory():
    dev, _ = make()
    assert dev.memory.length == 0x10000
    dev.memory.write(0xFFF8, 8, 0x1122_3344_5566_7788, 0)
    assert dev.memory.read(0xFFF9, 2, 0) == 0x6677
    dev.memory.write(0, 1, 0x1FF, 0)
    assert dev.memory.read(0, 4, 0) == 0xFF


def test_save_restore_reset():
    dev, _ = make()
    dev.ports.write(0, 4, 7, 0)
    dev.memory.write(5, 1, 9, 0)
    saved = dev.save()
    dev.reset()
    assert (dev.ports.read(0, 4, 0), dev.memory.read(5, 1, 0)) == (0, 0)
    dev.restore(saved)
    assert (dev.ports.read(0, 4, 0), dev.memory.read(5, 1, 0)) == (7, 9)
    saved.memory[5] = 0
    assert dev.memory.read(5, 1, 0) == 9
