"""QEMU's isa-debug-exit."""

from aiovm.devices.debug_exit import DebugExit


def test_status_is_twice_the_value_plus_one():
    seen = []
    port = DebugExit(seen.append)
    port.write(0, 1, 0, 0)
    port.write(0, 4, 0x10, 0)
    port.write(0, 1, 0x1FF, 0)
    assert seen == [1, 0x21, 0x1FF]
    assert port.read(0, 4, 0) == 0


def test_it_has_no_state():
    port = DebugExit(lambda status: None)
    port.restore(port.save())
    port.reset()
