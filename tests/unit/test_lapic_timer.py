"""The local APIC timer's arithmetic (SDM vol. 3A, 10.5.4)."""

import pytest

from aiovm.lapic_timer import LapicTimer, TimerMode, divisor_of


def make(mode=TimerMode.ONE_SHOT, tdcr=0xB, **kw):
    timer = LapicTimer(**kw)
    timer.set_mode(mode)
    timer.write_tdcr(tdcr, 0)
    return timer


@pytest.mark.parametrize(
    ("tdcr", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1), (4, 2), (0xF, 1)]
)
def test_divide_configuration(tdcr, divisor):
    assert divisor_of(tdcr) == divisor


def test_one_shot_fires_once_after_a_millisecond():
    timer = make()
    timer.write_tmict(1_000_000, 500)
    assert timer.next_deadline() == 1_000_500
    assert not timer.advance(1_000_499)
    assert timer.advance(1_000_500)
    assert timer.pending
    assert timer.next_deadline() is None
    assert not timer.advance(9_000_000)


def test_bus_cycle_scales_the_count():
    timer = make(tdcr=0, bus_cycle_ns=25)
    timer.write_tmict(1000, 0)
    assert timer.next_deadline() == 50_000


def test_longest_period():
    timer = make(tdcr=0xA)
    timer.write_tmict(0xFFFF_FFFF, 0)
    assert timer.next_deadline() == 549_755_813_760


def test_periodic_is_at_least_200_us_and_steps_from_its_deadline():
    timer = make(TimerMode.PERIODIC, tdcr=0)
    timer.write_tmict(50_000, 0)
    assert timer.next_deadline() == 200_000
    assert timer.advance(200_070)
    assert timer.next_deadline() == 400_000


def test_ten_missed_periods_make_one_pending():
    timer = make(TimerMode.PERIODIC)
    timer.write_tmict(1_000_000, 0)
    assert timer.advance(10_500_000)
    assert not timer.advance(10_600_000)
    assert timer.next_deadline() == 11_000_000
    assert not timer.advance(11_000_000)
    assert timer.next_deadline() == 12_000_000
    timer.delivered()
    assert not timer.pending
    assert timer.advance(12_000_000)


def test_switch_to_periodic_keeps_running_and_clamps():
    timer = make(tdcr=0xB)
    timer.write_tmict(100_000, 0)
    timer.set_mode(TimerMode.PERIODIC)
    assert timer.next_deadline() == 100_000
    assert timer.advance(100_000)
    assert timer.next_deadline() == 300_000


def test_zero_count_stops_and_clears_pending():
    timer = make()
    timer.write_tmict(1000, 0)
    timer.advance(1000)
    timer.write_tmict(0, 2000)
    assert not timer.pending
    assert timer.next_deadline() is None
    assert timer.read_tmcct(2000) == 0


def test_current_count():
    timer = make(tdcr=3)
    timer.write_tmict(1000, 0)
    assert timer.read_tmcct(0) == 1000
    assert timer.read_tmcct(1600) == 900
    assert timer.read_tmcct(15_999) == 0
    assert timer.read_tmcct(16_001) == 0


def test_divider_write_rescales_what_remains():
    timer = make(tdcr=0)
    timer.write_tmict(1_000_000, 0)
    timer.write_tdcr(0xA, 500_000)
    assert timer.next_deadline() == 500_000 + 1_500_000 * 64
    timer.write_tdcr(0x4, 500_000)
    assert timer.state.tdcr == 0
    assert timer.next_deadline() == 2_000_000


def test_divider_write_changes_the_periodic_period():
    timer = make(TimerMode.PERIODIC, tdcr=0xB)
    timer.write_tmict(300_000, 0)
    timer.write_tdcr(0, 100_000)
    assert timer.next_deadline() == 100_000 + 400_000
    timer.advance(500_000)
    assert timer.next_deadline() == 1_100_000


def test_divider_write_does_not_revive_an_expired_one_shot():
    timer = make()
    timer.write_tmict(1000, 0)
    timer.advance(1000)
    timer.delivered()
    timer.write_tdcr(0, 2000)
    assert timer.next_deadline() is None


def test_deadline_mode():
    timer = make(TimerMode.TSC_DEADLINE)
    timer.write_tmict(1000, 0)
    assert timer.state.tmict == 0
    assert timer.next_deadline() is None
    timer.write_deadline(0x1234_5678_9ABC, 7000, 10)
    assert timer.next_deadline() == 7000
    assert timer.read_tmcct(10) == 0
    assert timer.advance(7000)
    assert timer.read_deadline() == 0x1234_5678_9ABC, "reads back until delivery"
    timer.delivered()
    assert timer.read_deadline() == 0


def test_deadline_in_the_past_is_due_at_once():
    timer = make(TimerMode.TSC_DEADLINE)
    timer.write_deadline(5, -100, 1000)
    assert timer.next_deadline() == 1000
    assert timer.advance(1000)
    assert timer.read_deadline() == 5


def test_deadline_zero_disarms():
    timer = make(TimerMode.TSC_DEADLINE)
    timer.write_deadline(5, 5000, 0)
    timer.write_deadline(0, 0, 0)
    assert timer.next_deadline() is None


def test_deadline_beyond_all_clocks_arms_nothing():
    timer = make(TimerMode.TSC_DEADLINE)
    timer.write_deadline((1 << 64) - 1, 1 << 62, 0)
    assert timer.next_deadline() is None
    assert timer.read_deadline() == (1 << 64) - 1


def test_deadline_is_ignored_outside_its_mode():
    timer = make()
    timer.write_deadline(5, 5000, 0)
    assert timer.read_deadline() == 0
    assert timer.next_deadline() is None


def test_crossing_deadline_mode_cancels():
    timer = make()
    timer.write_tmict(1000, 0)
    timer.set_mode(TimerMode.TSC_DEADLINE)
    assert timer.next_deadline() is None
    assert timer.state.tmict == 0
    timer.write_deadline(5, 5000, 0)
    timer.advance(5000)
    timer.set_mode(TimerMode.PERIODIC)
    assert not timer.pending
    assert timer.state.tsc_deadline == 0


def test_reserved_mode_never_starts():
    timer = make(TimerMode.RESERVED)
    timer.write_tmict(1000, 0)
    assert timer.next_deadline() is None


@pytest.mark.parametrize(
    ("mode", "count", "deadline"),
    [
        (TimerMode.ONE_SHOT, 400_000, 400_000),
        (TimerMode.ONE_SHOT, 0, 0),
        (TimerMode.ONE_SHOT, 2_000_000, 1_000_000),
        (TimerMode.PERIODIC, 0, 1_000_000),
        (TimerMode.TSC_DEADLINE, 400_000, None),
    ],
)
def test_start_at_count(mode, count, deadline):
    timer = make(mode)
    timer.write_tmict(1_000_000, 0)
    timer.start_at_count(count, 0)
    assert timer.next_deadline() == deadline


def test_save_restore_reset():
    timer = make(tdcr=3)
    timer.write_tmict(1000, 0)
    saved = timer.save()
    timer.reset()
    assert timer.next_deadline() is None
    assert timer.state.tdcr == 0
    timer.restore(saved)
    assert timer.next_deadline() == 16_000
    assert timer.read_tmcct(1600) == 900
    saved.target_ns = 1
    assert timer.next_deadline() == 16_000


def test_drop_pending():
    timer = make()
    timer.write_tmict(1000, 0)
    timer.advance(1000)
    timer.drop_pending()
    assert not timer.pending
