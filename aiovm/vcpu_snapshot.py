"""One vCPU as a value: all that it is between two calls of ``Vcpu.run``.

More than KVM's structures (:mod:`aiovm.vcpu_state`) can say: the engine's own bytes, requests and hints that decide
what the scheduler does next, and accounts. :mod:`aiovm.snapshot` makes a machine of these.
"""

# ruff: noqa: TC001  (msgspec reads the annotations)

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from aiovm.engine.base import ContextState
from aiovm.errors import StateError
from aiovm.events import EventState
from aiovm.exits import TprAccess
from aiovm.guest_debug import DebugControl
from aiovm.kvm_structs import MpState
from aiovm.lapic_registers import LapicState
from aiovm.paravirt.msrs import ParavirtState
from aiovm.tsc import GuestTscState
from aiovm.vcpu import VcpuStat

if TYPE_CHECKING:
    from aiovm.vcpu import Vcpu

__all__ = ["ThreadAccount", "VcpuSnapshot", "restore_vcpu", "save_vcpu"]


@dataclass(frozen=True, slots=True)
class ThreadAccount:
    """A blocked thread, as the host's scheduler remembers it (:class:`aiovm.policy.thread.Thread`)."""

    pcpu_index: int
    ready_since: int
    run_delay: int
    ran_ns: int
    started: int
    slice_end: int
    ignored_yields: int
    vruntime: int


@dataclass(frozen=True, slots=True)
class VcpuSnapshot:
    """One vCPU; :class:`aiovm.vcpu.Vcpu` says what each is."""

    context: ContextState
    apic: LapicState
    events: EventState
    pv: ParavirtState
    tsc: GuestTscState
    thread: ThreadAccount
    stat: VcpuStat
    mp_state: MpState
    requests: int
    ple_window: int
    guest_debug: int
    guest_debug_dr: tuple[int, ...]
    tpr_access: TprAccess | None
    history: tuple[str, ...]
    cpu: int
    preempted: bool
    preempted_in_kernel: bool
    ready: bool
    in_spin_loop: bool
    dy_eligible: bool
    pv_unhalted: bool
    halt_poll_ns: int
    smbase: int
    ia32_misc_enable_msr: int
    spec_ctrl: int
    tpr_access_reporting: bool
    ipi_senders: int
    yielded: bool
    boosting: int
    held_hits: int
    owed: int


#: Attributes that are copied as they are.
_PLAIN: Final = (
    "cpu", "preempted", "preempted_in_kernel", "ready", "in_spin_loop", "dy_eligible", "pv_unhalted", "halt_poll_ns",
    "smbase", "ia32_misc_enable_msr", "spec_ctrl", "tpr_access_reporting", "ipi_senders", "mp_state", "guest_debug_dr",
    "yielded", "boosting", "held_hits",
)  # fmt: skip
_ACCOUNT: Final = tuple(field.name for field in fields(ThreadAccount))


def save_vcpu(vcpu: Vcpu) -> VcpuSnapshot:
    """A copy of everything. The vCPU is outside :meth:`~aiovm.vcpu.Vcpu.run`, and owes its program nothing."""
    if vcpu.mutex.locked():
        raise StateError(f"vCPU {vcpu.index} runs: pause the machine before it is saved")
    if vcpu.mmio.pending:
        raise StateError(f"vCPU {vcpu.index} waits for an answer: give it, and run() with immediate_exit")
    thread = vcpu.thread
    return VcpuSnapshot(
        context=vcpu.context.save(),
        apic=vcpu.apic.save(),
        events=vcpu.events.save(),
        pv=vcpu.pv.save(),
        tsc=vcpu.tsc.save(),
        thread=ThreadAccount(*(getattr(thread, name) for name in _ACCOUNT)),
        stat=replace(vcpu.stat),
        requests=vcpu.requests.bits,
        ple_window=vcpu.ple.window,
        guest_debug=int(vcpu.guest_debug),
        tpr_access=vcpu.tpr_access,
        history=tuple(vcpu.history),
        owed=vcpu.owed_ns,
        **{name: getattr(vcpu, name) for name in _PLAIN},
    )


def restore_vcpu(vcpu: Vcpu, saved: VcpuSnapshot, *, same_host: bool) -> None:
    """Take over a copy of everything; without ``same_host`` the scheduler knows the thread's wait, and no more."""
    vcpu.context.restore(saved.context)
    vcpu.apic.restore(saved.apic)
    vcpu.events.restore(saved.events)
    vcpu.pv.restore(saved.pv)
    vcpu.tsc.restore(saved.tsc)
    for name in _ACCOUNT if same_host else ("run_delay", "ran_ns", "ignored_yields"):
        setattr(vcpu.thread, name, getattr(saved.thread, name))
    vcpu.stat = replace(saved.stat)
    vcpu.ple.window = saved.ple_window
    vcpu.tpr_access = saved.tpr_access
    vcpu.history.clear()
    vcpu.history.extend(saved.history)
    vcpu.owed_ns = saved.owed
    for name in _PLAIN:
        setattr(vcpu, name, getattr(saved, name))
    vcpu.guest_debug = DebugControl(saved.guest_debug)
    vcpu.update_debug()
    vcpu.requests.bits = saved.requests
