"""A guest may store anything anywhere: devices answer, never raise, and go on the same after save and restore."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovm.devices.acpi_pm import AcpiPm
from aiovm.devices.cmos_rtc import CmosRtc
from aiovm.devices.fw_cfg import FwCfg
from aiovm.devices.hpet import Hpet
from aiovm.devices.i8042 import I8042
from aiovm.devices.ioapic import IoApic
from aiovm.devices.pc_testdev import PcTestdev
from aiovm.devices.pic8259 import Pic8259
from aiovm.devices.pit8254 import Pit8254
from aiovm.devices.port92 import Port92
from aiovm.devices.reset_control import ResetControl
from aiovm.devices.uart16550 import Uart16550
from aiovm.irq import IrqLine
from aiovm.lapic import Lapic
from aiovm.memory import GuestMemory


def nothing(*args):
    return None


def fw_cfg():
    memory = GuestMemory()
    memory.set_region(0, 0, 0x1000)
    device = FwCfg(cpus=2, ram_bytes=4096, files={"etc/x": b"abc"}, memory=memory)
    return device, [(12, device)]


def pic():
    chip = Pic8259(IrqLine())
    return chip, [(2, chip.ports[0]), (2, chip.ports[1]), (2, chip.elcr)]


def pit():
    chip = Pit8254(IrqLine(), reinject=True)
    return chip, [(4, chip), (1, chip.speaker)]


def i8042():
    chip = I8042(IrqLine(), nothing, nothing)
    return chip, [(1, chip.data), (1, chip.control)]


def pc_testdev():
    dev = PcTestdev([IrqLine() for _ in range(24)])
    return dev, [(12, dev.ports), (24, dev.irqs), (0x10000, dev.memory)]


def single(device):
    return device, [(device.LENGTH, device)]


MAKERS = {
    "acpi_pm": lambda: single(AcpiPm(IrqLine(), nothing)),
    "cmos_rtc": lambda: single(CmosRtc(IrqLine(), boot_wall_ns=1_700_000_000_000_000_000)),
    "fw_cfg": fw_cfg,
    "hpet": lambda: single(Hpet([IrqLine() for _ in range(24)])),
    "i8042": i8042,
    "ioapic": lambda: single(IoApic(lambda message: 1)),
    "pc_testdev": pc_testdev,
    "pic8259": pic,
    "pit8254": pit,
    "port92": lambda: single(Port92(nothing, nothing)),
    "reset_control": lambda: single(ResetControl(nothing)),
    "uart16550": lambda: single(Uart16550(IrqLine(), lambda byte: byte != 0)),
}

VALUES = st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.sampled_from([0, (1 << 64) - 1]))
ACCESSES = st.lists(
    st.tuples(
        st.booleans(), st.integers(0, 1 << 16), st.sampled_from([1, 2, 4, 8]), VALUES, st.integers(0, 3_000_000_000)
    ),
    max_size=40,
)


def run(device, windows, accesses, now):
    """Every answer, and when the next thing is due after it."""
    seen = []
    for is_write, where, size, value, passes in accesses:
        now += passes
        length, window = windows[where % len(windows)]
        offset = where // len(windows) % length
        if offset + size > length:
            continue
        if is_write:
            window.write(offset, size, value & (1 << (8 * size)) - 1, now)
        else:
            answer = window.read(offset, size, now)
            assert answer is not None
            assert answer >= 0
            seen.append(answer & (1 << (8 * size)) - 1)
        if hasattr(device, "next_deadline"):
            deadline = device.next_deadline()
            assert deadline is None or deadline < 1 << 63
            device.advance(now)
            deadline = device.next_deadline()
            assert deadline is None or deadline > now
            seen.append(deadline)
    return seen


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None)
@given(before=ACCESSES, after=ACCESSES)
def test_device_takes_anything_and_moves(name, before, after):
    device, windows = MAKERS[name]()
    run(device, windows, before, 0)
    now = 200 * 3_000_000_000
    if hasattr(device, "advance"):
        device.advance(now)
    other, other_windows = MAKERS[name]()
    other.restore(device.save())
    assert other.save() == device.save()
    assert run(device, windows, after, now) == run(other, other_windows, after, now)
    device.reset()
    other.reset()
    assert other.save() == device.save()


LAPIC_ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["mmio", "msr", "base", "deadline"]),
        st.booleans(),
        st.integers(0, 0xFF),
        st.sampled_from([1, 2, 4, 8]),
        VALUES,
        st.integers(0, 3_000_000_000),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(accesses=LAPIC_ACCESSES, x2apic=st.booleans())
def test_lapic_takes_anything(accesses, x2apic):
    lapic = Lapic(3, bsp=True)
    if x2apic:
        lapic.set_apic_base(0xFEE0_0D00)
    now = 0
    for kind, is_write, index, size, value, passes in accesses:
        now += passes
        match kind, is_write:
            case "mmio", True:
                lapic.mmio_write(index << 4, size, value & (1 << (8 * size)) - 1, now)
            case "mmio", False:
                assert 0 <= lapic.mmio_read(index << 4 | value & 0xF, size, now) < 1 << (8 * size)
            case "msr", True:
                lapic.msr_write(0x800 | index, value, now)
            case "msr", False:
                answer = lapic.msr_read(0x800 | index, now)
                assert answer is None or 0 <= answer < 1 << 64
            case "base", _:
                lapic.set_apic_base(value & 0xD00 | 0xFEE0_0000)
            case _:
                lapic.write_deadline(value, value, now)
        lapic.timer.advance(now)
        deadline = lapic.timer.next_deadline()
        assert deadline is None or now < deadline < 1 << 63
        lapic.inject_timer()
        lapic.acknowledge()
        copy = Lapic(3, bsp=True)
        copy.restore(lapic.save())
        assert copy.to_page(now) == lapic.to_page(now)
        assert copy.ppr == lapic.ppr
        assert copy.enabled is lapic.enabled
