"""What others ask of a vCPU: the request bits, and the mode that says whether it must be interrupted to see them.

A request is a bit. Whoever wants something from a vCPU makes the data visible, sets the bit, then kicks; the vCPU looks
at the word before every entry into the guest and serves what it finds. The owner's own requests need no kick.

Rules (``virt/kvm/kvm_main.c``, ``include/linux/kvm_host.h`` of Linux 6.16):

* ``check_request`` clears first and reports then, so a request made while its handler runs is not lost. Handlers are
  idempotent: two makes may become one.
* A handler that leaves to the embedding program lets later bits stand; they are served at the next entry.
* A bit without a handler keeps the vCPU out of the guest as long as it is set (MCLOCK_INPROGRESS lives by that).
* Requests alone do not end a sleep; only the wake conditions and UNBLOCK do.
* Only the edge IN_GUEST to EXITING is made by others; all other moves are the vCPU's own.

Modelled: every request number of 6.16 on x86, its flags, the order of service. Folded, so numbered here but absent
from ``PROCESSING_ORDER``: everything about shadow page tables, APICv, copies of the timer and the I/O APIC, the
performance counters, nested state, Hyper-V, dirty rings, MSR filters and protected guests, because an emulated CPU has
no such second copy to bring up to date.
"""

from __future__ import annotations

import enum

__all__ = [
    "MODE_TRANSITIONS",
    "OUTSIDE_GUEST_MODE",
    "PROCESSING_ORDER",
    "REQUEST_FLAGS",
    "ModeEvent",
    "Reach",
    "Request",
    "RequestFlag",
    "Requests",
    "VcpuMode",
    "needs_ipi",
    "reach",
]


class Request(enum.IntEnum):
    """``KVM_REQ_*`` of 6.16: the value is the bit's number."""

    TLB_FLUSH = 0
    VM_DEAD = 1
    UNBLOCK = 2
    DIRTY_RING_SOFT_FULL = 3
    MIGRATE_TIMER = 8
    REPORT_TPR_ACCESS = 9
    TRIPLE_FAULT = 10
    MMU_SYNC = 11
    CLOCK_UPDATE = 12
    LOAD_MMU_PGD = 13
    EVENT = 14
    APF_HALT = 15
    STEAL_UPDATE = 16
    NMI = 17
    PMU = 18
    PMI = 19
    SMI = 20
    MASTERCLOCK_UPDATE = 21
    MCLOCK_INPROGRESS = 22
    SCAN_IOAPIC = 23
    GLOBAL_CLOCK_UPDATE = 24
    APIC_PAGE_RELOAD = 25
    HV_CRASH = 26
    IOAPIC_EOI_EXIT = 27
    HV_RESET = 28
    HV_EXIT = 29
    HV_STIMER = 30
    LOAD_EOI_EXITMAP = 31
    GET_NESTED_STATE_PAGES = 32
    APICV_UPDATE = 33
    TLB_FLUSH_CURRENT = 34
    TLB_FLUSH_GUEST = 35
    APF_READY = 36
    MSR_FILTER_CHANGED = 37
    UPDATE_CPU_DIRTY_LOGGING = 38
    MMU_FREE_OBSOLETE_ROOTS = 39
    HV_TLB_FLUSH = 40
    UPDATE_PROTECTED_GUEST_STATE = 42


class RequestFlag(enum.IntFlag):
    """``KVM_REQUEST_*``: how a broadcast of the request treats its targets."""

    NONE = 0
    #: A sleeping vCPU is not woken; it sees the bit when it next runs.
    NO_WAKEUP = 1 << 8
    #: The sender waits until every target that was not outside has left the guest.
    WAIT = 1 << 9
    #: Nothing is logged, only the exit is forced.
    NO_ACTION = 1 << 10


_QUIET = RequestFlag.WAIT | RequestFlag.NO_WAKEUP

#: The flags of the requests that have any.
REQUEST_FLAGS: dict[Request, RequestFlag] = {
    Request.TLB_FLUSH: _QUIET,
    Request.VM_DEAD: _QUIET,
    Request.MCLOCK_INPROGRESS: _QUIET,
    Request.SCAN_IOAPIC: _QUIET,
    Request.APIC_PAGE_RELOAD: _QUIET,
    Request.APICV_UPDATE: _QUIET,
    Request.TLB_FLUSH_GUEST: _QUIET,
    Request.UPDATE_CPU_DIRTY_LOGGING: _QUIET,
    Request.MMU_FREE_OBSOLETE_ROOTS: _QUIET,
    Request.HV_TLB_FLUSH: _QUIET,
    Request.UPDATE_PROTECTED_GUEST_STATE: RequestFlag.WAIT,
}

#: ``KVM_REQ_OUTSIDE_GUEST_MODE`` has no bit: a broadcast with these flags only forces everybody out of the guest.
OUTSIDE_GUEST_MODE = RequestFlag.NO_ACTION | _QUIET

#: The order in which an entry serves requests (``vcpu_enter_guest``; here :mod:`aiovm.vcpu_requests`). The clock
#: requests cascade within one pass, the TLB is flushed before guest code can run, SMI and NMI queue what EVENT injects,
#: and EVENT is last. MCLOCK_INPROGRESS (a barrier) and UNBLOCK (consumed by the block) have no handler.
PROCESSING_ORDER: tuple[Request, ...] = (
    Request.VM_DEAD,
    Request.MASTERCLOCK_UPDATE,
    Request.GLOBAL_CLOCK_UPDATE,
    Request.CLOCK_UPDATE,
    Request.TLB_FLUSH,
    Request.TLB_FLUSH_GUEST,
    Request.REPORT_TPR_ACCESS,
    Request.TRIPLE_FAULT,
    Request.APF_HALT,
    Request.STEAL_UPDATE,
    Request.SMI,
    Request.NMI,
    Request.APF_READY,
    Request.EVENT,
)


class Requests:
    """One vCPU's request word. ``bits`` is its whole state; before an entry, ``if requests.bits:`` is the check."""

    __slots__ = ("bits",)

    def __init__(self, bits: int = 0) -> None:
        self.bits = bits

    @property
    def pending(self) -> bool:
        """Whether anything is asked."""
        return self.bits != 0

    def make_request(self, request: Request) -> None:
        """Set the bit. What the handler will look at was stored before; a kick comes after."""
        self.bits |= 1 << request

    def test_request(self, request: Request) -> bool:
        """Whether the bit is set; it stays."""
        return bool(self.bits >> request & 1)

    def check_request(self, request: Request) -> bool:
        """Whether the bit was set; it is clear afterwards, before the caller does the work."""
        bit = 1 << request
        if self.bits & bit:
            self.bits &= ~bit
            return True
        return False

    def clear_request(self, request: Request) -> None:
        """Clear the bit."""
        self.bits &= ~(1 << request)

    def __repr__(self) -> str:
        return f"Requests({', '.join(r.name for r in Request if self.bits >> r & 1)})"


class VcpuMode(enum.Enum):
    """``vcpu->mode``: where the vCPU is, for those who wonder whether it will look at its requests by itself."""

    OUTSIDE = 0
    IN_GUEST = 1
    EXITING = 2
    READING_SHADOW_PAGE_TABLES = 3


class ModeEvent(enum.Enum):
    """What moves a vCPU's mode."""

    #: The owner goes in. Its last look at the requests comes after this.
    ENTER = 0
    #: The owner is out again.
    LEAVE = 1
    #: Anybody asks it to come out (``kvm_vcpu_exiting_guest_mode``).
    KICK = 2
    #: The owner walks page tables that others may free.
    WALK_BEGIN = 3
    WALK_END = 4


#: Every allowed move. What is missing is a bug of the caller's.
MODE_TRANSITIONS: dict[VcpuMode, dict[ModeEvent, VcpuMode]] = {
    VcpuMode.OUTSIDE: {
        ModeEvent.ENTER: VcpuMode.IN_GUEST,
        ModeEvent.KICK: VcpuMode.OUTSIDE,
        ModeEvent.WALK_BEGIN: VcpuMode.READING_SHADOW_PAGE_TABLES,
    },
    VcpuMode.IN_GUEST: {
        ModeEvent.LEAVE: VcpuMode.OUTSIDE,
        ModeEvent.KICK: VcpuMode.EXITING,
    },
    VcpuMode.EXITING: {
        ModeEvent.LEAVE: VcpuMode.OUTSIDE,
        ModeEvent.KICK: VcpuMode.EXITING,
    },
    VcpuMode.READING_SHADOW_PAGE_TABLES: {
        ModeEvent.KICK: VcpuMode.READING_SHADOW_PAGE_TABLES,
        ModeEvent.WALK_END: VcpuMode.OUTSIDE,
    },
}


def needs_ipi(mode: VcpuMode, wait: bool) -> bool:
    """Whether a vCPU that was found in ``mode`` must be interrupted to see a request.

    A sender that does not wait leaves EXITING alone, as somebody has interrupted it already; one that waits needs an
    answer from everybody who is not outside.
    """
    return mode is not VcpuMode.OUTSIDE if wait else mode is VcpuMode.IN_GUEST


class Reach(enum.Enum):
    """How a broadcast reaches one target."""

    NOTHING = 0
    WAKE = 1
    IPI = 2


def reach(flags: RequestFlag, mode: VcpuMode, *, blocking: bool) -> Reach:
    """How a broadcast with ``flags`` reaches a vCPU; one that was woken is not interrupted as well."""
    if blocking and not flags & RequestFlag.NO_WAKEUP:
        return Reach.WAKE
    return Reach.IPI if needs_ipi(mode, bool(flags & RequestFlag.WAIT)) else Reach.NOTHING
