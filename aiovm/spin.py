"""A vCPU spins: how long that may last (the PAUSE-loop window), and to whom it then gives its CPU.

**The window.** The CPU leaves the guest when a loop of PAUSEs has lasted longer than the window. The window doubles at
each such exit and snaps back when the vCPU is scheduled in, so one wait costs few exits and the next starts fresh.

**The choice** (``kvm_vcpu_on_spin``). Starting behind the vCPU that was boosted last, find one that is ready but not
running and could be what the spinner waits for. A vCPU that spins itself is a poor choice, but refusing it for ever
could starve the lock's next owner: so it is refused and accepted in turn. Asking toggles, and asking comes last, so
that only who passed the other questions is toggled.

Source: ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/vmx/vmx.c`` of Linux 6.16. Two things
differ: ``last_boosted_vcpu`` is a vCPU's index here (6.16.1 stores the loop's offset), and shrinking by subtraction
stops at the base where KVM's unsigned arithmetic could wrap.

Modelled: VMX's window with its parameters, every filter of 6.16, the eligibility toggle. Not modelled: the gap between
two PAUSEs, which is the engine's to judge; SVM's count of PAUSEs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PleParams", "PleWindow", "SpinCandidate", "SpinOptions", "SpinOutcome", "on_spin"]

#: So many vCPUs may refuse (a negative answer) before the spinner gives up.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class PleParams:
    """``kvm_intel``'s ``ple_*`` parameters; times in TSC cycles.

    A factor below 1 resets the window to its base, one below the base multiplies or divides, a larger one is added or
    subtracted.
    """

    gap: int = 128
    window: int = 4096
    grow: int = 2
    shrink: int = 0
    window_max: int = 0xFFFF_FFFF


_VMX = PleParams()


class PleWindow:
    """One vCPU's PAUSE-loop window, in TSC cycles; ``window`` is its whole state."""

    __slots__ = ("params", "window")

    def __init__(self, params: PleParams = _VMX) -> None:
        self.params = params
        self.window = params.window

    def grow(self) -> None:
        """A PAUSE-loop exit happened."""
        p = self.params
        if p.grow < 1:
            self.window = p.window
        else:
            grown = self.window * p.grow if p.grow < p.window else self.window + p.grow
            self.window = min(grown, p.window_max)

    def sched_in(self) -> None:
        """The vCPU got a CPU."""
        p = self.params
        if p.shrink < 1:
            self.window = p.window
        else:
            shrunk = self.window // p.shrink if p.shrink < p.window else self.window - p.shrink
            self.window = max(shrunk, p.window)


class SpinCandidate(Protocol):
    """A vCPU, as the choice sees it."""

    #: Wants a CPU: it was preempted, or it has been woken.
    @property
    def ready(self) -> bool: ...
    #: Lost its CPU while it still wanted it.
    @property
    def preempted(self) -> bool: ...
    #: It was at CPL 0 when it was preempted.
    @property
    def preempted_in_kernel(self) -> bool: ...
    #: Sleeps on its wait queue.
    @property
    def blocking(self) -> bool: ...

    in_spin_loop: bool
    dy_eligible: bool

    def dy_runnable(self) -> bool:
        """Asleep, but something has come that will end the sleep."""

    def dy_has_pending_interrupt(self) -> bool:
        """An interrupt waits for it."""

    def has_ipi_from(self, index: int) -> bool:
        """vCPU ``index`` has sent it an IPI since it lost its CPU."""


@dataclass(frozen=True, slots=True)
class SpinOptions:
    """What the choice looks at. All on: 6.16. Off for history's sake: the comments name when each came."""

    #: Yield to somebody at all (2.6.39, 2011); else the exit has no consequence.
    directed: bool = True
    #: Only who wants a CPU and has none is asked (3.10, 2013); else everybody who does not sleep.
    ready_filter: bool = True
    #: Three answers of "nobody else is ready" end the search (3.9, 2013).
    undercommit_check: bool = True
    #: 3.7, 2012.
    eligibility_filter: bool = True
    #: VMX's handler asks for it always, as PAUSE-loop exits happen at CPL 0 only (4.14, 2017).
    kernel_mode_filter: bool = True
    #: Who was merely woken, to take an interrupt, is a candidate too (5.3, 2019); else only who was preempted.
    boost_woken: bool = True
    #: Who was preempted at CPL 3 and has an interrupt waiting passes the kernel-mode filter (5.13, 2021); without it
    #: the spinner that waits for an IPI's answer loses its opportunity.
    boost_interrupted: bool = True
    #: Of those who were woken, and of those at CPL 3, only who was sent an IPI by the spinner while off its CPU
    #: (Ishiguro et al., VEE 2021; proposed again in 2025; in no release).
    ipi_aware: bool = False


class SpinOutcome(NamedTuple):
    """``target``: whom the CPU went to, or -1. ``tries``: how many were asked to take it, ``probes``: looked at."""

    target: int
    tries: int
    probes: int


_NOBODY = SpinOutcome(-1, 0, 0)
_DEFAULT = SpinOptions()


def _eligible(candidate: SpinCandidate) -> bool:
    """Whether to yield to it; a spinning one answers no and yes in turn."""
    if not candidate.in_spin_loop:
        return True
    eligible = candidate.dy_eligible
    candidate.dy_eligible = not eligible
    return eligible


def _may_matter(vcpu: SpinCandidate, me: int, options: SpinOptions) -> bool:
    """Whether the spinner could be waiting for what this one does: kernel code, or the answer to an IPI."""
    if options.ipi_aware:
        in_kernel = vcpu.preempted and (vcpu.preempted_in_kernel or not options.kernel_mode_filter)
        return in_kernel or vcpu.has_ipi_from(me)
    # Who was merely woken is taken as in the kernel.
    return (
        not options.kernel_mode_filter
        or not vcpu.preempted
        or vcpu.preempted_in_kernel
        or (options.boost_interrupted and vcpu.dy_has_pending_interrupt())
    )


def on_spin(
    vcpus: Sequence[SpinCandidate],
    me: int,
    last_boosted: int,
    yield_to: Callable[[int], int],
    options: SpinOptions = _DEFAULT,
) -> SpinOutcome:
    """vCPU ``me`` spins: offer its CPU around, starting behind ``last_boosted``.

    ``yield_to(index)`` answers positive when the CPU changed hands, 0 when that vCPU could not take it, negative when
    there is nothing to gain. A ``target`` that is not -1 is the new ``last_boosted``, once the spinner is back: KVM
    stores it behind ``yield_to``, which calls ``schedule``.
    """
    count = len(vcpus)
    if count < 2 or not options.directed:
        return _NOBODY
    spinner = vcpus[me]
    spinner.in_spin_loop = True
    target, tries, probes, refusals = -1, 0, 0, 0
    for step in range(1, count + 1):
        index = (last_boosted + step) % count
        if index == me:
            continue
        vcpu = vcpus[index]
        probes += 1
        wants_cpu = vcpu.ready if options.boost_woken else vcpu.preempted
        if (options.ready_filter and not wants_cpu) or (vcpu.blocking and not vcpu.dy_runnable()):
            continue
        if not _may_matter(vcpu, me, options):
            continue
        if options.eligibility_filter and not _eligible(vcpu):
            continue
        tries += 1
        answer = yield_to(index)
        if answer > 0:
            target = index
            break
        if answer < 0 and options.undercommit_check:
            refusals += 1
            if refusals == _TRIES:
                break
    spinner.in_spin_loop = False
    spinner.dy_eligible = False
    return SpinOutcome(target, tries, probes)
