"""The heap of deadlines, the slice's limit, alarms: when is the next thing due."""

import asyncio
import sys
import time

import pytest

from aiovm.clock import FOREVER, Alarm, VirtualClock, WallClock, new_cells
from aiovm.loop import VirtualLoop, run, run_wall


def drain(clock):
    while clock.step():
        pass


# ---- the heap --------------------------------------------------------------------------------------------------


def test_calls_come_in_order_of_deadline_then_of_arming():
    clock, seen = VirtualClock(), []
    for deadline, name in ((30, "c"), (10, "a"), (30, "d"), (20, "b"), (10, "a2")):
        clock.call_at(deadline, lambda name=name: seen.append((name, clock.now())))
    drain(clock)
    assert seen == [("a", 10), ("a2", 10), ("b", 20), ("c", 30), ("d", 30)]


def test_a_deadline_in_the_past_runs_at_the_present():
    clock, seen = VirtualClock(), []
    clock.call_at(100, lambda: clock.call_at(40, lambda: seen.append(clock.now())))
    drain(clock)
    assert seen == [100]


def test_what_is_armed_now_runs_after_what_was_armed_for_now():
    clock, seen = VirtualClock(), []

    def first():
        clock.call_at(50, lambda: seen.append("armed late"))
        seen.append("first")

    clock.call_at(50, first)
    clock.call_at(50, lambda: seen.append("second"))
    drain(clock)
    assert seen == ["first", "second", "armed late"]


def test_the_last_call_sees_that_nothing_else_can_happen():
    clock, seen = VirtualClock(), []
    clock.call_at(10, lambda: seen.append(clock.is_idle))
    clock.call_at(20, lambda: seen.append(clock.is_idle))
    clock.call_at(30, lambda: None).cancel()
    drain(clock)
    assert seen == [False, True]


def test_a_cancelled_call_does_not_happen_and_moves_no_time():
    clock, seen = VirtualClock(), []
    timer = clock.call_at(1_000, lambda: seen.append("late"))
    clock.call_at(10, lambda: seen.append("early"))
    timer.cancel()
    timer.cancel()
    drain(clock)
    assert seen == ["early"]
    assert clock.now() == 10


def test_cancelling_after_the_call_is_harmless():
    clock, seen = VirtualClock(), []
    timer = clock.call_at(5, lambda: seen.append(1))
    drain(clock)
    timer.cancel()
    timer()
    assert seen == [1]
    assert timer.deadline == 5


def test_step_makes_one_call_and_says_when_there_is_none():
    clock, seen = VirtualClock(), []
    clock.call_at(1, lambda: seen.append(1))
    clock.call_at(2, lambda: seen.append(2))
    assert clock.step() is True
    assert (seen, clock.now()) == ([1], 1)
    assert clock.step() is True
    assert clock.step() is False
    assert clock.now() == 2


def test_time_starts_at_zero_and_is_virtual():
    clock = VirtualClock()
    assert (clock.now(), clock.is_virtual) == (0, True)


# ---- limits ------------------------------------------------------------------------------------------------------


def test_horizon_is_the_next_deadline_plus_the_lookahead():
    clock = VirtualClock(lookahead=2_000)
    assert clock.horizon() == FOREVER == 1 << 62
    late = clock.call_at(9_000, print)
    early = clock.call_at(5_000, print)
    assert clock.horizon() == 7_000
    early.cancel()
    assert clock.horizon() == 11_000
    late.cancel()
    assert clock.horizon() == 1 << 62


def test_arming_inside_a_slice_lowers_its_limit():
    clock = VirtualClock(lookahead=100)
    clock.cells[1] = 10_000
    clock.call_at(5_000, print)
    assert clock.cells[1] == 5_100
    clock.call_at(8_000, print)
    assert clock.cells[1] == 5_100


def test_lower_limit_never_raises_it():
    clock = VirtualClock()
    clock.cells[1] = 500
    clock.lower_limit(900)
    assert clock.cells[1] == 500
    clock.lower_limit(200)
    assert clock.cells[1] == 200


def test_a_step_forgets_the_limit_of_the_last_slice():
    clock = VirtualClock()
    clock.lower_limit(1)
    clock.call_at(5, print)
    assert clock.step()
    assert clock.cells[1] == 1 << 62


def test_now_is_the_running_slices_time():
    clock, seen = VirtualClock(), []
    clock.cells[0] = 700  # the block hook moved on
    clock.call_at(600, lambda: seen.append(clock.now()))
    assert clock.now() == 700
    clock.cells[0] = 0  # the slice is over: back to the loop's time
    clock.step()
    assert seen == [700]


def test_cells_are_a_pair_of_writable_64_bit_words():
    cells = new_cells()
    assert (cells.format, len(cells), cells.readonly) == ("q", 2, False)
    cells[0], cells[1] = -(1 << 63), (1 << 63) - 1
    assert list(cells) == [-(1 << 63), (1 << 63) - 1]


# ---- try_advance ---------------------------------------------------------------------------------------------------


def test_time_passes_at_once_when_nothing_is_due():
    clock = VirtualClock()
    clock.call_at(1_000, print)
    assert clock.try_advance(999) is True
    assert clock.now() == 999
    assert clock.try_advance(1_000) is False
    assert clock.now() == 999


def test_a_cancelled_deadline_does_not_hold_time():
    clock = VirtualClock()
    clock.call_at(1_000, print).cancel()
    assert clock.try_advance(5_000) is True
    assert clock.now() == 5_000


def test_ready_callbacks_hold_time():
    clock = VirtualClock()
    clock.ready.append(object())
    assert clock.try_advance(10) is False
    clock.ready.clear()
    assert clock.try_advance(10) is True


def test_after_512_advances_in_a_row_the_loop_gets_a_turn():
    clock = VirtualClock()
    answers = [clock.try_advance(n) for n in range(1, 1 + 513)]
    assert answers == [True] * 512 + [False]
    assert clock.try_advance(600) is True


def test_time_never_goes_back():
    clock = VirtualClock()
    assert clock.try_advance(100)
    assert clock.try_advance(40) is True
    assert clock.now() == 100


# ---- alarms --------------------------------------------------------------------------------------------------------


def test_until_returns_at_its_time_and_an_alarm_is_reusable():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, seen = Alarm(clock), []
        for deadline in (10, 10, 25, 7):
            await alarm.until(deadline)
            seen.append(clock.now())
        return seen

    assert run(main()) == [10, 10, 25, 25]


def test_a_parked_alarm_waits_until_somebody_rings():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm = Alarm(clock)
        clock.call_at(100, lambda: alarm.ring_at(150))
        await alarm
        return clock.now()

    assert run(main()) == 150


def test_ringing_again_replaces_the_earlier_time():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm = Alarm(clock)
        clock.call_at(10, lambda: alarm.ring_at(400))
        clock.call_at(20, lambda: alarm.ring_at(60))
        await alarm.until(500)
        first = clock.now()
        await alarm.until(1_000)
        return first, clock.now()

    assert run(main()) == (60, 1_000)


def test_a_ring_before_anybody_listens_is_kept_once():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, other = Alarm(clock), Alarm(clock)
        alarm.ring_at(10)
        await other.until(50)
        await alarm
        first = clock.now()
        clock.call_at(80, lambda: alarm.ring_at(90))
        await alarm
        return first, clock.now()

    assert run(main()) == (50, 90)


def test_a_kept_ring_is_forgotten_by_the_next_arming():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, other = Alarm(clock), Alarm(clock)
        alarm.ring_at(10)
        await other.until(50)
        await alarm.until(70)
        return clock.now()

    assert run(main()) == 70


def test_a_disarmed_alarm_does_not_ring():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, other = Alarm(clock), Alarm(clock)
        alarm.ring_at(10)
        alarm.disarm()
        await other.until(50)  # armed and disarmed: nothing is kept
        alarm.ring_at(60)
        await other.until(65)
        alarm.disarm()  # rung, and forgotten
        clock.call_at(80, lambda: alarm.ring_at(90))
        await alarm
        return clock.now()

    assert run(main()) == 90


@pytest.mark.parametrize("timed", [False, True])
def test_a_waiting_task_can_be_cancelled(timed):
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, seen = Alarm(clock), []

        async def wait():
            try:
                await (alarm.until(1_000) if timed else alarm)
            except asyncio.CancelledError:
                seen.append(clock.now())
                raise

        task = asyncio.create_task(wait())
        await Alarm(clock).until(300)
        assert task.cancel() is True
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.001)
        return seen, clock.now()

    assert run(main()) == ([300], 1_000_300)


def test_an_alarm_is_reusable_after_a_cancellation():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, seen = Alarm(clock), []

        async def wait():
            for deadline in (1_000, 500):
                try:
                    await alarm.until(deadline)
                except asyncio.CancelledError:
                    seen.append("cancelled")
                seen.append(clock.now())

        task = asyncio.create_task(wait())
        await Alarm(clock).until(300)
        task.cancel()
        await task
        return seen

    assert run(main()) == ["cancelled", 300, 500]


def test_two_cancellations_in_one_turn_are_one():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, seen = Alarm(clock), []

        async def wait():
            try:
                await alarm
            except asyncio.CancelledError:
                seen.append("cancelled")
            await alarm.until(900)
            seen.append(clock.now())

        task = asyncio.create_task(wait())
        await Alarm(clock).until(300)
        task.cancel()
        task.cancel()
        await task
        return seen

    assert run(main()) == ["cancelled", 900]


def test_a_ring_between_cancelling_and_waking_does_not_wake_the_next_wait():
    async def main():
        clock = asyncio.get_running_loop().clock
        alarm, seen = Alarm(clock), []

        async def wait():
            try:
                await alarm
            except asyncio.CancelledError:
                seen.append("cancelled")
            await alarm.until(900)
            seen.append(clock.now())

        task = asyncio.create_task(wait())
        await Alarm(clock).until(300)
        task.cancel()
        alarm.ring_at(400)
        await task
        return seen

    assert run(main()) == ["cancelled", 900]


def test_cancelling_an_alarm_that_nobody_awaits_says_so():
    async def main():
        return Alarm(asyncio.get_running_loop().clock).cancel()

    assert run(main()) is False


def test_the_waiting_task_keeps_its_context():
    import contextvars

    name = contextvars.ContextVar("name", default="nobody")

    async def main():
        clock = asyncio.get_running_loop().clock
        seen = []

        async def wait(who, deadline):
            name.set(who)
            await Alarm(clock).until(deadline)
            seen.append((name.get(), asyncio.current_task().get_name()))

        async with asyncio.TaskGroup() as group:
            group.create_task(wait("a", 20), name="task a")
            group.create_task(wait("b", 10), name="task b")
        return seen

    assert run(main()) == [("b", "task b"), ("a", "task a")]


def test_alarms_wake_in_order_of_deadline_then_of_arming():
    async def main():
        clock = asyncio.get_running_loop().clock
        seen = []

        async def wait(who, deadline):
            await Alarm(clock).until(deadline)
            seen.append(who)

        async with asyncio.TaskGroup() as group:
            for who, deadline in (("a", 20), ("b", 10), ("c", 20), ("d", 10)):
                group.create_task(wait(who, deadline))
        return seen

    assert run(main()) == ["b", "d", "a", "c"]


# ---- the wall clock ------------------------------------------------------------------------------------------------


@pytest.mark.wall
async def test_wall_calls_come_in_order_and_never_early():
    clock, seen, done = WallClock(), [], asyncio.Event()

    def note(name, deadline):
        seen.append((name, clock.now() >= deadline))
        if len(seen) == 3:
            done.set()

    start = clock.now()
    for name, delay in (("c", 3_000_000), ("a", 1_000_000), ("b", 2_000_000)):
        clock.call_at(start + delay, lambda name=name, at=start + delay: note(name, at))
    clock.call_at(start + 1_500_000, lambda: seen.append("never")).cancel()
    async with asyncio.timeout(5):
        await done.wait()
    assert seen == [("a", True), ("b", True), ("c", True)]


@pytest.mark.wall
async def test_wall_deadlines_in_the_past_run_soon_and_other_threads_may_arm():
    clock, done = WallClock(), asyncio.Event()
    async with asyncio.timeout(5):
        clock.call_at(-1, done.set)
        await done.wait()
        done.clear()
        await asyncio.to_thread(clock.call_at, clock.now(), done.set)
        await done.wait()


@pytest.mark.wall
@pytest.mark.skipif(sys.platform != "linux", reason="timerfd_create is Linux's")
def test_who_waits_less_than_a_millisecond_sleeps():
    """uvloop rounds 0.4 ms to nothing: whoever looked again and again would compute for all of the time."""

    async def main():
        clock = WallClock()
        alarm = Alarm(clock)
        began, computed = clock.now(), time.thread_time_ns()
        for _ in range(100):
            await alarm.until(clock.now() + 400_000)
        return (time.thread_time_ns() - computed) / (clock.now() - began)

    assert run_wall(main()) < 0.5


@pytest.mark.wall
async def test_without_linuxs_timer_the_loops_is_taken(monkeypatch):
    def out_of_descriptors(_loop, _due):
        raise OSError

    monkeypatch.setattr("aiovm.clock._LinuxTimer", out_of_descriptors)
    clock = WallClock()
    seen, done = [], asyncio.Event()
    start = clock.now()
    clock.call_at(start + 2_000_000, lambda: (seen.append(clock.now() - start), done.set()))
    clock.call_at(start + 1_000_000, lambda: seen.append(clock.now() - start))
    async with asyncio.timeout(5):
        await done.wait()
    assert len(seen) == 2
    assert seen[0] >= 1_000_000
    assert seen[1] >= 2_000_000


@pytest.mark.wall
async def test_wall_slices_have_no_horizon():
    clock = WallClock()
    assert (clock.is_virtual, clock.horizon()) == (False, 1 << 62)
    clock.lower_limit(0)
    assert clock.cells[1] == 1 << 62
    assert clock.try_advance(clock.now()) is True
    assert clock.try_advance(clock.now() + 10**12) is False


@pytest.mark.wall
async def test_an_alarm_on_the_wall_clock():
    clock = WallClock()
    alarm = Alarm(clock)
    deadline = clock.now() + 1_000_000
    async with asyncio.timeout(5):
        await alarm.until(deadline)
    assert clock.now() >= deadline


def test_a_loop_may_be_given_its_clock():
    clock = VirtualClock(lookahead=7)

    async def main():
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return loop.clock

    assert run(main(), clock=clock) is clock
