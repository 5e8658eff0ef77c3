"""The guest's time stamp counter: cycles and nanoseconds, offset, TSC_ADJUST, scaling.

    guest TSC = (host TSC * ratio >> 48) + offset          modulo 2^64, ratio 1 << 48 by default

*Host TSC* is the counter that all vCPUs of a machine share, ``ns_to_tsc(now, khz)``. Rules (``arch/x86/kvm/x86.c`` of
Linux 6.16; SDM vol. 3B, 17.17):

* A guest's store to IA32_TSC moves the offset, and TSC_ADJUST by the same amount.
* A guest's store to TSC_ADJUST moves the offset by the difference; a host's store only records the value.
* A TSC within 250 ppm of the host's is the host's; anything else is scaled.

Modelled: the above, with VMX's 48 fraction bits. Not modelled: the matching of nearly equal writes into one generation
(here every vCPU starts from the same counter, so all match), catching up without scaling, unstable host TSCs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aiovm.bits import mask, sign_extend
from aiovm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GuestTsc", "GuestTscState", "ns_to_tsc", "scaling_ratio", "tsc_to_ns"]

_KHZ_NS = 1_000_000  # cycles a nanosecond, times a million, is kHz
_FRACTION = 48
_UNSCALED = 1 << _FRACTION
_TOLERANCE_PPM = 250
_PPM = 1_000_000


def ns_to_tsc(ns: int, khz: int) -> int:
    """Whole cycles that have passed after ``ns``."""
    return ns * khz // _KHZ_NS


def tsc_to_ns(cycles: int, khz: int) -> int:
    """The first nanosecond at which ``cycles`` have passed: ``ns_to_tsc`` of it is at least ``cycles``, before it less.

    >>> tsc_to_ns(1, 2_400_000), tsc_to_ns(12, 2_400_000)
    (1, 5)
    """
    return -(-cycles * _KHZ_NS // khz)


def scaling_ratio(guest_khz: int, host_khz: int) -> int:
    """KVM_SET_TSC_KHZ: the ratio that gives a guest of this speed; ``guest_khz`` 0 asks for the host's."""
    lowest = host_khz * (_PPM - _TOLERANCE_PPM) // _PPM
    highest = host_khz * (_PPM + _TOLERANCE_PPM) // _PPM
    if guest_khz == 0 or lowest <= guest_khz <= highest:
        return _UNSCALED
    ratio = (guest_khz << _FRACTION) // host_khz if guest_khz > 0 else 0
    if not 0 < ratio < mask(64):
        raise ConfigError(f"a TSC of {guest_khz} kHz cannot be made from one of {host_khz} kHz (EINVAL)")
    return ratio


@dataclass(slots=True)
class GuestTscState:
    """``offset`` modulo 2^64; ``adjust`` is IA32_TSC_ADJUST, signed."""

    offset: int = 0
    adjust: int = 0
    ratio: int = _UNSCALED


class GuestTsc:
    """One vCPU's TSC. ``on_change(ratio, offset)``: how it is made from the host's, now and whenever that changes."""

    __slots__ = ("_on_change", "_s")

    def __init__(self, ratio: int = _UNSCALED, *, on_change: Callable[[int, int], object] | None = None) -> None:
        self._on_change = on_change
        self._s = GuestTscState(ratio=ratio)
        self._tell()

    def scale(self, host_tsc: int) -> int:
        """A host count or frequency, scaled."""
        return host_tsc * self._s.ratio >> _FRACTION

    def read(self, host_tsc: int) -> int:
        """RDTSC and IA32_TSC (0x10)."""
        return self.scale(host_tsc) + self._s.offset & mask(64)

    def reach(self, guest_tsc: int, host_tsc: int) -> int:
        """The first host count from ``host_tsc`` on at which :meth:`read` is at least ``guest_tsc``: a deadline."""
        ahead = guest_tsc - self.read(host_tsc)
        if ahead <= 0:
            return host_tsc
        return -(-(self.scale(host_tsc) + ahead << _FRACTION) // self._s.ratio)

    def write(self, value: int, host_tsc: int) -> None:
        """A guest's store to IA32_TSC."""
        moved = value - self.read(host_tsc)
        self._s.offset = self._s.offset + moved & mask(64)
        self._s.adjust = sign_extend(self._s.adjust + moved, 64)
        self._tell()

    def host_write(self, value: int, host_tsc: int) -> None:
        """The embedding program's store to IA32_TSC; TSC_ADJUST keeps."""
        self._s.offset = value - self.scale(host_tsc) & mask(64)
        self._tell()

    @property
    def adjust(self) -> int:
        """IA32_TSC_ADJUST (0x3B), as its 64 bits read."""
        return self._s.adjust & mask(64)

    def write_adjust(self, value: int, *, host_initiated: bool = False) -> None:
        """A store to IA32_TSC_ADJUST."""
        value = sign_extend(value, 64)
        if not host_initiated:
            self._s.offset = self._s.offset + value - self._s.adjust & mask(64)
        self._s.adjust = value
        self._tell()

    def save(self) -> GuestTscState:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: GuestTscState) -> None:
        """Take over a saved state."""
        self._s = replace(state)
        self._tell()

    def reset(self) -> None:
        """Power-on: the shared counter as it is. The ratio is the machine's and stays; INIT leaves all as it was."""
        self.restore(GuestTscState(ratio=self._s.ratio))

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self._s.ratio, self._s.offset)
