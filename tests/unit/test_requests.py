"""Request bits, their flags, the order of service, modes and kicks (``virt/kvm/kvm_main.c``; kvm_host.h of 6.16)."""

import pytest

from aiovm.requests import (
    MODE_TRANSITIONS,
    OUTSIDE_GUEST_MODE,
    PROCESSING_ORDER,
    REQUEST_FLAGS,
    ModeEvent,
    Reach,
    Request,
    RequestFlag,
    Requests,
    VcpuMode,
    needs_ipi,
    reach,
)

NUMBERS = {
    "TLB_FLUSH": 0,
    "VM_DEAD": 1,
    "UNBLOCK": 2,
    "DIRTY_RING_SOFT_FULL": 3,
    "MIGRATE_TIMER": 8,
    "REPORT_TPR_ACCESS": 9,
    "TRIPLE_FAULT": 10,
    "MMU_SYNC": 11,
    "CLOCK_UPDATE": 12,
    "LOAD_MMU_PGD": 13,
    "EVENT": 14,
    "APF_HALT": 15,
    "STEAL_UPDATE": 16,
    "NMI": 17,
    "PMU": 18,
    "PMI": 19,
    "SMI": 20,
    "MASTERCLOCK_UPDATE": 21,
    "MCLOCK_INPROGRESS": 22,
    "SCAN_IOAPIC": 23,
    "GLOBAL_CLOCK_UPDATE": 24,
    "APIC_PAGE_RELOAD": 25,
    "HV_CRASH": 26,
    "IOAPIC_EOI_EXIT": 27,
    "HV_RESET": 28,
    "HV_EXIT": 29,
    "HV_STIMER": 30,
    "LOAD_EOI_EXITMAP": 31,
    "GET_NESTED_STATE_PAGES": 32,
    "APICV_UPDATE": 33,
    "TLB_FLUSH_CURRENT": 34,
    "TLB_FLUSH_GUEST": 35,
    "APF_READY": 36,
    "MSR_FILTER_CHANGED": 37,
    "UPDATE_CPU_DIRTY_LOGGING": 38,
    "MMU_FREE_OBSOLETE_ROOTS": 39,
    "HV_TLB_FLUSH": 40,
    "UPDATE_PROTECTED_GUEST_STATE": 42,
}


def test_numbers_are_those_of_6_16():
    assert {r.name: r.value for r in Request} == NUMBERS


def test_flag_bits():
    assert (RequestFlag.NO_WAKEUP, RequestFlag.WAIT, RequestFlag.NO_ACTION) == (0x100, 0x200, 0x400)
    assert OUTSIDE_GUEST_MODE == 0x700


@pytest.mark.parametrize("number", [0, 1, 22, 23, 25, 33, 35, 38, 39, 40])
def test_requests_that_wait_and_do_not_wake(number):
    assert REQUEST_FLAGS[Request(number)] == 0x300


def test_the_other_flags():
    assert REQUEST_FLAGS[Request(42)] == 0x200
    assert len(REQUEST_FLAGS) == 11


def test_make_test_check_clear():
    requests = Requests()
    assert not requests.pending
    requests.make_request(Request.EVENT)
    requests.make_request(Request.EVENT)  # two makes are one
    assert requests.bits == 1 << 14
    assert requests.pending
    assert requests.test_request(Request.EVENT)
    assert requests.test_request(Request.EVENT)
    assert not requests.test_request(Request.NMI)
    assert requests.check_request(Request.EVENT)
    assert not requests.check_request(Request.EVENT)
    requests.make_request(Request.APF_READY)
    requests.make_request(Request.TLB_FLUSH)
    requests.clear_request(Request.APF_READY)
    requests.clear_request(Request.NMI)  # was not set
    assert requests.bits == 1


def test_check_clears_before_the_handler_works():
    """A request made during its own handler is served again."""
    requests = Requests(1 << 12)
    assert requests.check_request(Request.CLOCK_UPDATE)
    requests.make_request(Request.CLOCK_UPDATE)
    assert requests.bits == 1 << 12


def test_repr_names_the_bits():
    assert repr(Requests(1 << 14 | 1 << 2)) == "Requests(UNBLOCK, EVENT)"


@pytest.mark.parametrize("request_", [Request.MCLOCK_INPROGRESS, Request.UNBLOCK])
def test_requests_without_a_handler_are_not_in_the_order(request_):
    assert request_ not in PROCESSING_ORDER


def test_every_mode_has_a_row_and_answers_a_kick():
    assert set(MODE_TRANSITIONS) == set(VcpuMode)
    kicked = {mode.value: row[ModeEvent.KICK].value for mode, row in MODE_TRANSITIONS.items()}
    assert kicked == {0: 0, 1: 2, 2: 2, 3: 3}


def test_moves_of_the_owner():
    moves = {
        (mode.value, event.name, after.value)
        for mode, row in MODE_TRANSITIONS.items()
        for event, after in row.items()
        if event is not ModeEvent.KICK
    }
    assert moves == {(0, "ENTER", 1), (1, "LEAVE", 0), (2, "LEAVE", 0), (0, "WALK_BEGIN", 3), (3, "WALK_END", 0)}


@pytest.mark.parametrize(
    ("mode", "without_wait", "with_wait"), [(0, False, False), (1, True, True), (2, False, True), (3, False, True)]
)
def test_who_needs_an_ipi(mode, without_wait, with_wait):
    assert needs_ipi(VcpuMode(mode), False) is without_wait
    assert needs_ipi(VcpuMode(mode), True) is with_wait


def test_two_kicks_send_one_ipi():
    """Two kicks, one IPI."""
    mode, sent = VcpuMode.IN_GUEST, 0
    for _ in range(2):
        sent += needs_ipi(mode, False)
        mode = MODE_TRANSITIONS[mode][ModeEvent.KICK]
    assert sent == 1


def test_a_broadcast_wakes_or_interrupts_but_not_both():
    plain = RequestFlag.NONE
    quiet = RequestFlag(0x300)
    assert reach(plain, VcpuMode.OUTSIDE, blocking=True) is Reach.WAKE
    assert reach(quiet, VcpuMode.OUTSIDE, blocking=True) is Reach.NOTHING  # interleaving F
    assert reach(plain, VcpuMode.IN_GUEST, blocking=False) is Reach.IPI
    assert reach(plain, VcpuMode.EXITING, blocking=False) is Reach.NOTHING
    assert reach(quiet, VcpuMode.EXITING, blocking=False) is Reach.IPI
    assert reach(RequestFlag.WAIT, VcpuMode.OUTSIDE, blocking=True) is Reach.WAKE
    assert reach(OUTSIDE_GUEST_MODE, VcpuMode.READING_SHADOW_PAGE_TABLES, blocking=False) is Reach.IPI
