"""What is pending, what combines and what comes first (``arch/x86/kvm/x86.c`` of Linux 6.16)."""

from __future__ import annotations

import pytest

from aiovm.events import Event, EventKind, EventQueue, EventState, combine


@pytest.fixture
def queue():
    return EventQueue()


def choose(queue, *, interrupt_flag=True, shadow=False, vector=None):
    return queue.select(
        interrupt_flag=interrupt_flag, shadow=shadow, acknowledge=None if vector is None else lambda: vector
    )


BENIGN = (1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19)
CONTRIBUTORY = (0, 10, 11, 12, 13)


def test_combinations():
    for first in CONTRIBUTORY:
        assert {combine(first, second) for second in CONTRIBUTORY} == {8}
        assert combine(first, 14) == 14
        assert combine(14, first) == 8
        assert all(combine(first, second) == second for second in BENIGN)
    assert combine(14, 14) == 8
    for first in BENIGN:
        assert all(combine(first, second) == second for second in (*CONTRIBUTORY, *BENIGN, 14))
    assert all(combine(14, second) == second for second in BENIGN)
    assert {combine(8, second) for second in range(32)} == {None}


def test_numbers_of_the_kinds():
    kinds = ("EXTERNAL", "NMI", "EXCEPTION", "SOFT_INT", "ICEBP", "SOFT_EXC")
    assert [int(EventKind[name]) for name in kinds] == [0, 2, 3, 4, 5, 6]


def test_an_exception_and_its_error_code(queue):
    assert queue.queue_exception(13, 0x18)
    assert queue.any
    assert not queue.s.exception_injected
    assert choose(queue) == Event(EventKind.EXCEPTION, 13, 0x18)
    assert queue.s.exception_injected
    assert choose(queue) == Event(EventKind.EXCEPTION, 13, 0x18)
    queue.delivered()
    assert not queue.any
    assert choose(queue) is None


def test_error_codes_exist_in_protected_mode_only(queue):
    queue.queue_exception(13, 0x18, protected_mode=False)
    assert choose(queue) == Event(EventKind.EXCEPTION, 13, None)
    queue.delivered()
    queue.queue_exception(6)
    assert choose(queue) == Event(EventKind.EXCEPTION, 6, None)


def test_a_second_exception_replaces_or_doubles(queue):
    queue.queue_exception(6)
    assert queue.queue_exception(14, 2)
    assert choose(queue) == Event(EventKind.EXCEPTION, 14, 2)
    assert queue.queue_exception(13, 0x18)  # upon an injected one
    assert choose(queue) == Event(EventKind.EXCEPTION, 8, 0)
    assert not queue.s.triple_fault
    assert not queue.queue_exception(6)
    assert queue.s.triple_fault
    assert not queue.any


def test_reinjection_comes_before_everything_new(queue):
    queue.queue_nmi()
    assert choose(queue) == Event(EventKind.NMI, 2)
    queue.queue_exception(6)
    queue.queue_smi()
    assert choose(queue) == Event(EventKind.NMI, 2)
    queue.delivered()
    queue.queue_interrupt(0x31)
    assert choose(queue, interrupt_flag=False) == Event(EventKind.EXTERNAL, 0x31)
    queue.queue_interrupt(0x80, soft=True)
    assert choose(queue, shadow=True) == Event(EventKind.SOFT_INT, 0x80)
    queue.delivered()
    assert choose(queue) == Event(EventKind.EXCEPTION, 6)


def test_priority_of_new_events(queue):
    queue.queue_exception(6)
    queue.queue_smi()
    queue.queue_nmi()
    order = []
    for _ in range(4):
        event = choose(queue, vector=0x40)
        order.append(event.kind)
        queue.delivered()
        if event.kind is EventKind.SMI:
            queue.smm_done()
    assert order == [EventKind.EXCEPTION, EventKind.SMI, EventKind.NMI, EventKind.EXTERNAL]


def test_interrupts_need_if_and_no_shadow_and_are_acknowledged_only_then(queue):
    def never():
        raise AssertionError

    assert queue.select(interrupt_flag=False, shadow=False, acknowledge=never) is None
    assert queue.select(interrupt_flag=True, shadow=True, acknowledge=never) is None
    assert queue.select(interrupt_flag=True, shadow=False, acknowledge=lambda: None) is None
    assert choose(queue, vector=0x40) == Event(EventKind.EXTERNAL, 0x40)
    assert queue.s.interrupt_injected
    queue.queue_nmi()
    queue.delivered()
    assert queue.select(interrupt_flag=True, shadow=False, acknowledge=never) == Event(EventKind.NMI, 2)


def test_nmis_need_no_if_but_no_shadow_and_no_mask(queue):
    queue.queue_nmi()
    assert choose(queue, interrupt_flag=False, shadow=True) is None
    assert choose(queue, interrupt_flag=False) == Event(EventKind.NMI, 2)
    queue.delivered()
    queue.queue_nmi()
    assert choose(queue) is None
    queue.nmi_done()
    assert choose(queue) == Event(EventKind.NMI, 2)


def test_nmis_fold_to_two_or_to_one_while_masked(queue):
    for _ in range(5):
        queue.queue_nmi()
    assert queue.any
    queue.fold_nmi()
    assert (queue.s.nmi_pending, queue.s.nmi_queued) == (2, 0)
    assert choose(queue) == Event(EventKind.NMI, 2)
    assert (queue.s.nmi_pending, queue.s.nmi_masked) == (1, True)
    queue.queue_nmi()
    queue.fold_nmi()
    assert queue.s.nmi_pending == 1
    queue.delivered()
    queue.queue_nmi()
    queue.fold_nmi()
    assert queue.s.nmi_pending == 1


def test_smm_masks_smis_and_nmis(queue):
    queue.queue_smi()
    assert choose(queue, shadow=True) == Event(EventKind.SMI)
    queue.queue_smi()
    queue.queue_nmi()
    assert choose(queue) is None
    queue.smm_done()
    assert choose(queue) == Event(EventKind.SMI)
    queue.smm_done()
    assert choose(queue) == Event(EventKind.NMI, 2)


def test_an_smi_inside_an_nmi_leaves_it_masked(queue):
    queue.queue_nmi()
    choose(queue)
    queue.delivered()
    queue.queue_smi()
    assert choose(queue) == Event(EventKind.SMI)
    queue.smm_done()
    assert queue.s == EventState(nmi_masked=True)


def test_state_is_a_value(queue):
    queue.queue_exception(14, 4)
    queue.queue_nmi()
    saved = queue.save()
    assert saved == EventState(
        exception_pending=True, exception_nr=14, exception_has_error_code=True, exception_error_code=4, nmi_pending=1
    )
    choose(queue)
    assert saved.exception_pending
    queue.restore(saved)
    assert queue.s == saved
    assert queue.s is not saved
    queue.reset()
    assert queue.s == EventState()
