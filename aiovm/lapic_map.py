"""Who receives an interrupt message: destination matching (SDM vol. 3A, 10.6.2; KVM's ``lapic.c``, ``irq_comm.c``).

Rules, from Linux 6.16:

* Physical: the id, or the broadcast 0xFF (xAPIC) / 0xFFFFFFFF (x2APIC). A chip in xAPIC mode also answers to its
  vCPU id when that is above 0xFF. A message that no local APIC sent (I/O APIC, MSI) means everyone by 0xFF.
* Logical xAPIC: flat or cluster model by DFR; x2APIC: cluster 31:16 equal and 15:0 intersect.
* A chip that hardware disabled is no target.
* Lowest priority, and MSI with the redirection hint: the (vector mod n)-th of the n software-enabled candidates, in
  vCPU order (KVM's vector hashing). A physical broadcast goes to all of them instead.

Not modelled: KVM's fast map, whose count of candidates includes absent CPUs; the arbitration counter's choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiovm.lapic_message import DeliveryMode, IpiMessage, Shorthand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiovm.lapic import Lapic

__all__ = ["ApicMap", "match_destination"]

_XAPIC_BROADCAST = 0xFF
_X2APIC_BROADCAST = 0xFFFF_FFFF
_FLAT = 0xFFFF_FFFF
_CLUSTER = 0x0FFF_FFFF
#: A guest may name 2³² destinations; the cache forgets them all at this many.
_CACHE_LIMIT = 1024


def _matches(target: Lapic, message: IpiMessage, is_ipi: bool) -> bool:
    """Whether ``target`` is named by the message's destination field."""
    dest = message.dest
    x2apic = target.x2apic
    if dest == _XAPIC_BROADCAST and x2apic and not is_ipi:
        return True
    if dest == (_X2APIC_BROADCAST if x2apic else _XAPIC_BROADCAST):
        return True
    if not message.logical:
        return dest == (target.apic_id if x2apic or dest <= 0xFF else target.vcpu_id)
    ldr = target.state.ldr
    if x2apic:
        return ldr >> 16 == dest >> 16 and ldr & dest & 0xFFFF != 0
    ldr >>= 24
    model = target.state.dfr
    if model == _FLAT:
        return ldr & dest != 0
    return model == _CLUSTER and ldr >> 4 == dest >> 4 and ldr & dest & 0xF != 0


def _candidates(lapics: Sequence[Lapic], message: IpiMessage, source_index: int | None) -> list[int]:
    shorthand = message.shorthand
    if shorthand is Shorthand.SELF:
        return [] if source_index is None else [source_index]
    present = [i for i, lapic in enumerate(lapics) if lapic.hw_enabled]
    if shorthand is Shorthand.ALL:
        return present
    if shorthand is Shorthand.OTHERS:
        return [i for i in present if i != source_index]
    return [i for i in present if _matches(lapics[i], message, source_index is not None)]


def _chosen(lapics: Sequence[Lapic], message: IpiMessage, candidates: Sequence[int]) -> Sequence[int]:
    """The candidates, or the one that a lowest-priority message goes to."""
    if message.mode is not DeliveryMode.LOWEST_PRIORITY and not message.redirection_hint:
        return candidates
    if message.shorthand is Shorthand.SELF:
        return candidates
    if not message.logical and message.dest == _XAPIC_BROADCAST:
        return candidates
    able = [i for i in candidates if lapics[i].enabled]
    return [able[message.vector % len(able)]] if able else []


def match_destination(lapics: Sequence[Lapic], message: IpiMessage, source_index: int | None) -> list[int]:
    """Indices of the chips that ``message`` goes to, ascending; ``source_index`` None: no local APIC sent it."""
    return list(_chosen(lapics, message, _candidates(lapics, message, source_index)))


class ApicMap:
    """:func:`match_destination` for one machine, with the answers kept until :meth:`recalculate`.

    Invariant: ``recalculate`` is called after every change of an id, LDR, DFR or enable bit
    (``LapicEffect.map_changed``, ``set_apic_base``, reset, restore).
    """

    __slots__ = ("_cache", "_lapics")

    def __init__(self, lapics: Sequence[Lapic]) -> None:
        self._lapics = lapics
        self._cache: dict[tuple[int, bool, int, int | None], tuple[int, ...]] = {}

    def recalculate(self) -> None:
        """Forget the answers."""
        self._cache.clear()

    def targets(self, message: IpiMessage, source_index: int | None) -> Sequence[int]:
        """Indices of the chips that ``message`` goes to, ascending."""
        key = (message.shorthand, message.logical, message.dest, source_index)
        candidates = self._cache.get(key)
        if candidates is None:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            candidates = self._cache[key] = tuple(_candidates(self._lapics, message, source_index))
        return _chosen(self._lapics, message, candidates)
