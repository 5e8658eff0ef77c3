"""Halt polling: how long a halted vCPU stays on its CPU, awake, before it sleeps; adapted after each halt.

A short halt that polling would have caught makes the window grow, a long one makes it shrink. Sleeping and waking cost
more than a short poll, and a long poll takes the CPU from others; so the window has a limit, and 0 turns polling off.

Rule, first match, with window P, limit M and block time B (polling included):

    invalid wake-up   shrink
    M == 0            P = 0
    B <= P            keep: the poll caught it
    P > 0 and B > M   shrink
    P < M and B < M   grow
    else              keep

Source: ``virt/kvm/kvm_main.c`` of Linux 4.6, 4.19 and 6.16 (``kvm_vcpu_block``, ``kvm_vcpu_halt``).
A guest that cleared bit 0 of MSR_KVM_POLL_CONTROL is neither polled for nor adapted.

Modelled: the rule in both forms, with their defaults. Not modelled: the poll itself, which is the vCPU's waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LINUX_4_6", "LINUX_4_19", "LINUX_6_16", "HaltPollParams", "adapt", "begin"]


@dataclass(frozen=True, slots=True)
class HaltPollParams:
    """``kvm``'s ``halt_poll_*`` parameters; times in ns.

    ``capped`` is the form of 4.4 to 4.19: growth stops at the limit, ``grow_start_ns`` is only the first step, and a
    growth factor of 0 clears the window. Otherwise the form of 6.16: no window is below ``grow_start_ns``, a factor of
    0 means no growth, and the limit is applied when the next halt begins (:func:`begin`).
    """

    grow: int
    shrink: int
    limit_ns: int
    grow_start_ns: int = 10_000
    capped: bool = False


LINUX_4_6 = HaltPollParams(grow=2, shrink=0, limit_ns=400_000, capped=True)
LINUX_4_19 = HaltPollParams(grow=2, shrink=0, limit_ns=200_000, capped=True)
LINUX_6_16 = HaltPollParams(grow=2, shrink=2, limit_ns=200_000)


def begin(window: int, limit: int) -> int:
    """The window with which a halt begins, and which it keeps for the adaptation afterwards."""
    return min(window, limit)


def adapt(
    window: int, block_ns: int, limit: int, params: HaltPollParams = LINUX_6_16, *, valid_wakeup: bool = True
) -> int:
    """The window after a halt that lasted ``block_ns``."""
    if not valid_wakeup:
        return _shrink(window, params)
    if limit == 0:
        return 0
    if block_ns <= window:
        return window
    if window > 0 and block_ns > limit:
        return _shrink(window, params)
    if window < limit and block_ns < limit:
        return _grow(window, limit, params)
    return window


def _grow(window: int, limit: int, params: HaltPollParams) -> int:
    if params.capped:
        grown = window * params.grow if window else params.grow_start_ns if params.grow else 0
        return min(grown, limit)
    return max(window * params.grow, params.grow_start_ns) if params.grow else window


def _shrink(window: int, params: HaltPollParams) -> int:
    shrunk = window // params.shrink if params.shrink else 0
    return shrunk if params.capped or shrunk >= params.grow_start_ns else 0
