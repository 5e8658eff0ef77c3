"""What an entry into the guest does first: it serves the requests (``vcpu_enter_guest`` of Linux 6.16).

Rules:

* The order is :data:`~aiovm.requests.PROCESSING_ORDER`; a handler may make a later request, which is served in the same
  pass, or an earlier one, which waits for the next. The bit is cleared before its handler works.
* A handler that leaves lets later bits stand.
* Bits without a handler are folded into these: a pass that came to its end clears them, as one left set would keep the
  vCPU out of the guest for ever.
* Requests about records in guest memory are served from inside a slice, too, as the guest looks at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiovm.exits import Exit, Shutdown, TprAccess
from aiovm.kvm_structs import MpState
from aiovm.lapic_message import DeliveryMode
from aiovm.requests import PROCESSING_ORDER, Request, Requests

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.engine.base import Context
    from aiovm.events import EventQueue
    from aiovm.lapic import Lapic
    from aiovm.machine import Machine
    from aiovm.paravirt import Paravirt
    from aiovm.port import VcpuPort
    from aiovm.tsc import GuestTsc

__all__ = ["VcpuRequests"]


class VcpuRequests:
    """What :class:`aiovm.vcpu.Vcpu` inherits."""

    vm: Machine
    requests: Requests
    context: Context
    events: EventQueue
    apic: Lapic
    port: VcpuPort
    pv: Paravirt
    tsc: GuestTsc
    mp_state: MpState
    #: What the embedding program is told of an access to the TPR.
    tpr_access: TprAccess | None

    if TYPE_CHECKING:

        def make_request(self, request: Request) -> None: ...
        def kick(self, source: int = -1) -> None: ...
        def process_nmi(self) -> None: ...
        def _accept_apic_events(self) -> None: ...
        def _record_steal_time(self) -> None: ...

    def service_requests(self) -> Exit | None:
        """Before an entry; an exit when one of them leaves."""
        leaving = self._serve(_ALL)
        if leaving is None:
            self.requests.bits &= _SERVED
        return leaving

    def service_paravirt(self) -> None:
        """The requests about records in guest memory."""
        self._serve(_RECORDS)

    def _serve(self, which: int) -> Exit | None:
        requests = self.requests
        for bit, handler in _SERVICE:
            if requests.bits & which & bit:
                requests.bits &= ~bit
                leaving = handler(self)
                if leaving is not None:
                    return leaving
        return None

    # ---- the handlers, in the order of service ---------------------------------------------------------------------

    def _vm_dead(self) -> Exit:
        return Shutdown("the machine is dead")

    def _masterclock_update(self) -> None:
        now = self.vm.clock.now()
        self.vm.kvmclock.update_masterclock(now)
        for vcpu in self.vm.vcpus:
            vcpu.make_request(Request.CLOCK_UPDATE)
            if vcpu is not self:
                self.vm.post(now, vcpu.kick)

    def _global_clock_update(self) -> None:
        self.make_request(Request.CLOCK_UPDATE)

    def _clock_update(self) -> None:
        snapshot = self.vm.kvmclock.snapshot(self.vm.clock.now())
        self.vm.read_tsc()  # nobody's TSC may be behind a published timestamp
        self.pv.clock.update(snapshot, self.tsc.read(snapshot.host_tsc), self.tsc.scale(self.vm.tsc_khz))

    def _tlb_flush(self) -> None:
        self.context.flush_tlb()

    def _report_tpr_access(self) -> Exit | None:
        return self.tpr_access

    def _triple_fault(self) -> Exit:
        return Shutdown()

    def _apf_halt(self) -> None:
        self.pv.apf.halt()

    def _steal_update(self) -> None:
        self._record_steal_time()

    def _smi(self) -> None:
        self.events.queue_smi()

    def _nmi(self) -> None:
        self.process_nmi()

    def _apf_ready(self) -> None:
        ready = self.pv.apf.check_completion(lapic_enabled=self.apic.enabled)
        if ready.vector >= 0:
            self.apic.accept(DeliveryMode.FIXED, ready.vector)
            self.make_request(Request.EVENT)

    def _event(self) -> None:
        self._accept_apic_events()
        if self.mp_state is MpState.RUNNABLE:
            self.port.inject_pending()


_HANDLERS: Final[dict[Request, Callable[[VcpuRequests], Exit | None]]] = {
    Request.VM_DEAD: VcpuRequests._vm_dead,
    Request.MASTERCLOCK_UPDATE: VcpuRequests._masterclock_update,
    Request.GLOBAL_CLOCK_UPDATE: VcpuRequests._global_clock_update,
    Request.CLOCK_UPDATE: VcpuRequests._clock_update,
    Request.TLB_FLUSH: VcpuRequests._tlb_flush,
    Request.TLB_FLUSH_GUEST: VcpuRequests._tlb_flush,
    Request.REPORT_TPR_ACCESS: VcpuRequests._report_tpr_access,
    Request.TRIPLE_FAULT: VcpuRequests._triple_fault,
    Request.APF_HALT: VcpuRequests._apf_halt,
    Request.STEAL_UPDATE: VcpuRequests._steal_update,
    Request.SMI: VcpuRequests._smi,
    Request.NMI: VcpuRequests._nmi,
    Request.APF_READY: VcpuRequests._apf_ready,
    Request.EVENT: VcpuRequests._event,
}
_SERVICE: Final = tuple((1 << request, _HANDLERS[request]) for request in PROCESSING_ORDER)
_ALL: Final = -1
_SERVED: Final = sum(1 << request for request in PROCESSING_ORDER)
_RECORDS: Final = sum(
    1 << request
    for request in (
        Request.MASTERCLOCK_UPDATE,
        Request.GLOBAL_CLOCK_UPDATE,
        Request.CLOCK_UPDATE,
        Request.STEAL_UPDATE,
        Request.APF_READY,
    )
)
