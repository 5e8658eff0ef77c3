"""The clock's heap against a sorted list, alarms against their deadlines, budgets against plain arithmetic."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from aiovm.clock import FOREVER, Alarm, VirtualClock
from aiovm.loop import run

DEADLINES = st.integers(-5, 50)


@given(st.lists(st.tuples(DEADLINES, st.booleans())))
def test_calls_come_sorted_by_deadline_and_serial(arms):
    clock, seen = VirtualClock(), []
    timers = [
        clock.call_at(deadline, lambda n=n: seen.append((n, clock.now()))) for n, (deadline, _) in enumerate(arms)
    ]
    for timer, (_, cancelled) in zip(timers, arms, strict=True):
        if cancelled:
            timer.cancel()
    while clock.step():
        pass
    kept = [(max(deadline, 0), n) for n, (deadline, cancelled) in enumerate(arms) if not cancelled]
    assert seen == [(n, deadline) for deadline, n in sorted(kept)]


@given(st.lists(st.tuples(DEADLINES, DEADLINES), max_size=20))
def test_what_callbacks_arm_is_ordered_too_and_time_never_goes_back(arms):
    clock, seen = VirtualClock(), []
    for first, second in arms:
        clock.call_at(first, lambda second=second: clock.call_at(second, lambda: seen.append(clock.now())))
    times = []
    while clock.step():
        times.append(clock.now())
    assert times == sorted(times)
    assert sorted(seen) == sorted(max(first, second, 0) for first, second in arms)


@given(st.lists(st.tuples(st.integers(0, 1_000), st.booleans())), st.integers(0, 100))
def test_horizon_is_the_least_live_deadline_plus_the_lookahead(arms, lookahead):
    clock = VirtualClock(lookahead=lookahead)
    for deadline, cancelled in arms:
        timer = clock.call_at(deadline, print)
        if cancelled:
            timer.cancel()
    live = [deadline for deadline, cancelled in arms if not cancelled]
    assert clock.horizon() == (min(live) + lookahead if live else FOREVER)


@given(st.lists(st.one_of(st.tuples(st.just("arm"), DEADLINES), st.tuples(st.just("advance"), DEADLINES))))
def test_advancing_never_passes_a_deadline(steps):
    clock = VirtualClock()
    fired = []
    armed = []
    for what, when in steps:
        before = clock.now()
        if what == "arm":
            armed.append(max(when, before))
            clock.call_at(when, lambda at=armed[-1]: fired.append((at, clock.now())))
        elif clock.try_advance(when):
            assert clock.now() == max(when, before)
            assert all(at > when for at in armed)
        else:
            assert any(at <= when for at in armed)
            assert clock.now() == before
    while clock.step():
        pass
    assert fired == [(at, at) for at in sorted(armed)]


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=5))
def test_tasks_on_alarms_wake_at_the_sum_of_their_waits(lives):
    async def main():
        clock = asyncio.get_running_loop().clock
        seen = []

        async def life(name, waits):
            alarm = Alarm(clock)
            for wait in waits:
                await alarm.until(clock.now() + wait)
                seen.append((clock.now(), name))

        async with asyncio.TaskGroup() as group:
            for name, waits in enumerate(lives):
                group.create_task(life(name, waits))
        return seen

    seen = run(main())
    assert [t for t, _ in seen] == sorted(t for t, _ in seen)
    expected = []
    for name, waits in enumerate(lives):
        now = 0
        for wait in waits:
            now += wait
            expected.append((now, name))
    assert sorted(seen) == sorted(expected)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ring"), st.integers(0, 40)),
            st.tuples(st.just("cancel"), st.just(0)),
            st.tuples(st.just("disarm"), st.just(0)),
        ),
        max_size=6,
    ),
    st.integers(50, 60),
)
def test_whatever_happens_to_an_alarm_its_next_wait_is_true(events, deadline):
    """A task waits again and again; rings, cancellations and disarmings come; a fresh timed wait is never early."""

    async def main():
        clock = asyncio.get_running_loop().clock
        alarm = Alarm(clock)
        quiet = asyncio.Event()

        async def life():
            while not quiet.is_set():
                try:
                    await alarm
                except asyncio.CancelledError:
                    if quiet.is_set():
                        break

        task = asyncio.create_task(life())
        other = Alarm(clock)
        for number, (what, delay) in enumerate(events):
            await other.until(number * 3)
            if what == "ring":
                alarm.ring_at(clock.now() + delay)
            elif what == "cancel":
                task.cancel()
            else:
                alarm.disarm()
        await other.until(45)
        quiet.set()
        task.cancel()
        await task
        alarm.disarm()
        await alarm.until(deadline)
        return clock.now()

    assert run(main()) == deadline
