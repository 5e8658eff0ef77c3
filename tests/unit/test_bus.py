"""Who claims an access: ranges, widths, straddling, overlaps."""

import pytest

from aiovm.bus import Bus
from aiovm.errors import ConfigError


class Echo:
    """Answers all ones shifted by the offset, and notes everything."""

    def __init__(self):
        self.seen = []

    def read(self, offset, size, now):
        self.seen.append(("r", offset, size, now))
        return 0x1122_3344_5566_7788_99

    def write(self, offset, size, value, now):
        self.seen.append(("w", offset, size, value, now))


def test_a_device_sees_offsets():
    bus, device = Bus("port", 16), Echo()
    bus.register(0x3F8, 8, device)
    bus.read(0x3FD, 1, 77)
    assert bus.write(0x3F8, 1, 0x41, 78) is True
    assert device.seen == [("r", 5, 1, 77), ("w", 0, 1, 0x41, 78)]


@pytest.mark.parametrize(("size", "value"), [(1, 0x99), (2, 0x8899), (4, 0x66778899), (8, 0x2233445566778899)])
def test_an_answer_is_cut_to_the_access(size, value):
    bus = Bus("MMIO", 52)
    bus.register(0x1000, 0x1000, Echo())
    assert bus.read(0x1000, size, 0) == value


@pytest.mark.parametrize(("address", "size"), [(0x3F7, 1), (0x400, 1), (0x3F7, 2), (0x3FF, 2), (0x3FE, 4), (0, 1)])
def test_nobody_claims_what_is_outside_or_straddles(address, size):
    bus, device = Bus("port", 16), Echo()
    bus.register(0x3F8, 8, device)
    assert bus.read(address, size, 0) is None
    assert bus.write(address, size, 0, 0) is False
    assert bus.find(address, size) is None
    assert device.seen == []


def test_neighbours_may_touch_but_an_access_belongs_to_one():
    bus, low, high = Bus("port", 16), Echo(), Echo()
    bus.register(0x10, 4, low)
    bus.register(0x14, 4, high)
    assert bus.find(0x13, 1) == (low, 3)
    assert bus.find(0x14, 4) == (high, 0)
    assert bus.find(0x13, 2) is None


@pytest.mark.parametrize(("base", "length"), [(0x10, 4), (0x0F, 2), (0x13, 1), (0x08, 0x20), (0x11, 2)])
def test_overlap_is_refused(base, length):
    bus = Bus("port", 16)
    bus.register(0x10, 4, Echo())
    bus.register(0x100, 4, Echo())
    with pytest.raises(ConfigError, match="overlaps Echo at 0x10"):
        bus.register(base, length, Echo())
    assert len(bus.devices) == 2


def test_overlap_with_a_later_range_is_refused():
    bus = Bus("port", 16)
    bus.register(0x10, 4, Echo())
    bus.register(0x40, 4, Echo())
    with pytest.raises(ConfigError, match="overlaps Echo at 0x40"):
        bus.register(0x20, 0x40, Echo())


@pytest.mark.parametrize(("base", "length"), [(0, 0), (0xFFFF, 2), (-1, 4), (0x1_0000, 1), (5, -1)])
def test_a_range_must_fit_the_bus(base, length):
    with pytest.raises(ConfigError, match="does not fit the bus"):
        Bus("port", 16).register(base, length, Echo())


def test_the_last_byte_of_the_bus_can_be_claimed():
    bus = Bus("port", 16)
    bus.register(0xFFFF, 1, Echo())
    assert bus.read(0xFFFF, 1, 0) == 0x99


def test_unregister_frees_the_range():
    bus = Bus("port", 16)
    bus.register(0x10, 4, Echo())
    bus.unregister(0x10)
    assert bus.read(0x10, 1, 0) is None
    bus.register(0x12, 4, Echo())
    with pytest.raises(ConfigError, match="no port range starts at 0x10"):
        bus.unregister(0x10)


def test_devices_are_listed_once_in_address_order():
    bus, first, second = Bus("port", 16), Echo(), Echo()
    bus.register(0x20, 2, second)
    bus.register(0xA0, 2, second)
    bus.register(0x10, 2, first)
    assert bus.devices == (first, second)
