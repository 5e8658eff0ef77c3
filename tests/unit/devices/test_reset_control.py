"""Port 0xCF9."""

from aiovm.devices.reset_control import ResetControl


def test_bit_2_resets():
    count = []
    port = ResetControl(lambda: count.append(1))
    port.write(0, 1, 0x02, 0)
    assert count == []
    assert port.read(0, 1, 0) == 0x02
    port.write(0, 1, 0x06, 0)
    port.write(0, 1, 0x06, 0)
    assert len(count) == 2
    assert port.read(0, 1, 0) == 0x02


def test_save_restore_reset():
    port = ResetControl(lambda: None)
    port.write(0, 1, 0xFA, 0)
    saved = port.save()
    port.reset()
    assert port.read(0, 1, 0) == 0
    port.restore(saved)
    assert port.read(0, 1, 0) == 0x0A
