"""Bits of interrupt messages (SDM vol. 3A, 10.6.1, 10.11)."""

import pytest

from aiovm.lapic_message import DeliveryMode, IpiMessage, Shorthand, decode_icr, decode_msi


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (0x0000_0031, IpiMessage(0x31, DeliveryMode.FIXED, False, False, False, Shorthand.NONE, 9)),
        (0x0000_49FF, IpiMessage(0xFF, DeliveryMode.LOWEST_PRIORITY, True, True, False, Shorthand.NONE, 9)),
        (0x0008_C500, IpiMessage(0, DeliveryMode.INIT, False, True, True, Shorthand.ALL, 9)),
        (0x000C_4608, IpiMessage(8, DeliveryMode.STARTUP, False, True, False, Shorthand.OTHERS, 9)),
        (0x0004_0400, IpiMessage(0, DeliveryMode.NMI, False, False, False, Shorthand.SELF, 9)),
        (0x0000_0300, IpiMessage(0, DeliveryMode.REMOTE_READ, False, False, False, Shorthand.NONE, 9)),
    ],
)
def test_icr(low, expected):
    assert decode_icr(low, 9) == expected


def test_msi():
    assert decode_msi(0xFEE1_200C, 0x8142) == IpiMessage(
        0x42, DeliveryMode.LOWEST_PRIORITY, True, True, True, Shorthand.NONE, 0x12, True
    )
    assert decode_msi(0xFEE0_1020, 0x0031).dest == 0x101
