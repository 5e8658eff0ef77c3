"""Port 0x92."""

from aiovm.devices.port92 import Port92


def make():
    events = []
    return Port92(lambda: events.append("reset"), lambda on: events.append(on)), events


def test_a20_is_told_when_it_changes():
    port, events = make()
    assert port.read(0, 1, 0) == 2
    port.write(0, 1, 2, 0)
    assert events == []
    port.write(0, 1, 0, 0)
    port.write(0, 1, 0xFE, 0)
    assert events == [False, True]
    assert port.read(0, 1, 0) == 2


def test_reset_at_the_rise_of_bit_0():
    port, events = make()
    port.write(0, 1, 3, 0)
    port.write(0, 1, 3, 0)
    assert events == ["reset"]
    assert port.read(0, 1, 0) == 3


def test_save_restore_reset():
    port, events = make()
    port.write(0, 1, 0, 0)
    saved = port.save()
    port.reset()
    assert port.read(0, 1, 0) == 2
    port.restore(saved)
    assert port.read(0, 1, 0) == 0
    assert events == [False, True, False]
