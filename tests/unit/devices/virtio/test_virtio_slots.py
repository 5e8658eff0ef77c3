"""Where virtio devices lie on the PC."""

import pytest

from aiovm.devices.virtio.slots import virtio_slots
from aiovm.errors import ConfigError


def test_places_do_not_overlap_and_have_their_own_interrupts():
    slots = virtio_slots(8)
    assert [slot.base for slot in slots[:2]] == [0xD000_0000, 0xD000_1000]
    assert [slot.gsi for slot in slots] == list(range(16, 24))
    assert {slot.length for slot in slots} == {0x200}


@pytest.mark.parametrize("count", [-1, 9])
def test_there_are_eight(count):
    with pytest.raises(ConfigError):
        virtio_slots(count)
    assert virtio_slots(0) == ()
