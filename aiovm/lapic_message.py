"""Interrupt messages: what travels between local APICs, from the I/O APIC and as MSI, and what a local APIC answers.

Values only. The bits are the interrupt command register's (SDM vol. 3A, 10.6.1) and the message address and data
registers' (10.11).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["Accepted", "DeliveryMode", "IpiMessage", "Shorthand", "decode_icr", "decode_msi"]


class DeliveryMode(enum.IntEnum):
    """Bits 10:8 of ICR, LVT, redirection entry and MSI data."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    #: Reserved by Intel (once "remote read"); KVM's paravirtual kick uses it.
    REMOTE_READ = 3
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Shorthand(enum.IntEnum):
    """ICR bits 19:18."""

    NONE = 0
    SELF = 1
    ALL = 2
    OTHERS = 3


class Accepted(enum.Enum):
    """What a local APIC did with a message, so what its vCPU is owed. All but DROPPED: KVM's answer 1.

    EVENT and all below it ask for the event request and a kick; NMI and SMI for theirs. UNHALT also grants the
    paravirtual unhalt token. INIT and STARTUP are already latched in the chip.
    """

    DROPPED = 0
    EVENT = 1
    NMI = 2
    SMI = 3
    INIT = 4
    STARTUP = 5
    UNHALT = 6


class IpiMessage(NamedTuple):
    """One message. ``level``: asserted. ``trigger_level``: level-triggered. ``redirection_hint``: MSI's "to one"."""

    vector: int
    mode: DeliveryMode
    logical: bool
    level: bool
    trigger_level: bool
    shorthand: Shorthand
    dest: int
    redirection_hint: bool = False


_MODES = tuple(DeliveryMode)
_SHORTHANDS = tuple(Shorthand)


def decode_icr(low: int, dest: int) -> IpiMessage:
    """The message that writing ``low`` to the ICR sends to destination field ``dest``."""
    return IpiMessage(
        low & 0xFF,
        _MODES[low >> 8 & 7],
        low & 0x800 != 0,
        low & 0x4000 != 0,
        low & 0x8000 != 0,
        _SHORTHANDS[low >> 18 & 3],
        dest,
    )


def decode_msi(address: int, data: int) -> IpiMessage:
    """The message of an MSI; address bits 11:5 extend the destination to 15 bits (6.16)."""
    return IpiMessage(
        data & 0xFF,
        _MODES[data >> 8 & 7],
        address & 4 != 0,
        True,
        data & 0x8000 != 0,
        Shorthand.NONE,
        address >> 12 & 0xFF | (address >> 5 & 0x7F) << 8,
        address & 8 != 0,
    )
