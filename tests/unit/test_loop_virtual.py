"""asyncio on virtual time: order, exact times, stalls that are told, work outside the loop."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiovm.clock import VirtualClock
from aiovm.errors import DeadlockError, StallError, StateError
from aiovm.loop import VirtualLoop, run, run_wall


def ns():
    return asyncio.get_running_loop().clock.now()


def test_sleepers_wake_in_order_at_exact_times():
    async def main():
        seen = []

        async def sleeper(name, seconds):
            await asyncio.sleep(seconds)
            seen.append((name, ns()))

        async with asyncio.TaskGroup() as group:
            for name, seconds in (("c", 0.3), ("a", 0.1), ("b", 0.2), ("a2", 0.1)):
                group.create_task(sleeper(name, seconds))
        return seen

    assert run(main()) == [("a", 100_000_000), ("a2", 100_000_000), ("b", 200_000_000), ("c", 300_000_000)]


def test_a_thousand_seconds_pass_at_once():
    async def main():
        for _ in range(10):
            await asyncio.sleep(100)
        return ns(), asyncio.get_running_loop().time()

    assert run(main()) == (1_000_000_000_000, 1000.0)


def test_short_sleeps_add_up_without_drift():
    async def main():
        for _ in range(1_000):
            await asyncio.sleep(0.000_000_1)
        return ns()

    assert run(main()) == 100_000


def test_sleep_zero_gives_others_a_turn_and_takes_no_time():
    async def main():
        seen = []

        async def count(name):
            for n in range(2):
                seen.append(f"{name}{n}")
                await asyncio.sleep(0)

        await asyncio.gather(count("a"), count("b"))
        return seen, ns()

    assert run(main()) == (["a0", "b0", "a1", "b1"], 0)


def test_a_negative_delay_is_now():
    async def main():
        seen = asyncio.Event()
        asyncio.get_running_loop().call_later(-5, seen.set)
        await seen.wait()
        return ns()

    assert run(main()) == 0


def test_a_timeout_strikes_at_its_time():
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(10), 0.25)
        first = ns()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.Event().wait()
        return first, ns()

    assert run(main()) == (250_000_000, 1_250_000_000)


def test_a_timeout_that_was_not_needed_moves_no_time():
    async def main():
        assert await asyncio.wait_for(asyncio.sleep(1, "done"), 500) == "done"
        await asyncio.to_thread(lambda: None)
        return ns()

    assert run(main()) == 1_000_000_000


def test_call_at_takes_the_loops_seconds():
    async def main():
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        handle = loop.call_at(2.5, seen.set)
        assert handle.when() == 2.5
        loop.call_at(1.5, pytest.fail).cancel()
        await seen.wait()
        return ns()

    assert run(main()) == 2_500_000_000


def test_a_callback_that_raises_goes_to_the_exception_handler():
    async def main():
        loop, seen = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _loop, context: seen.append(type(context["exception"])))
        loop.call_later(1, lambda: 1 // 0)
        await asyncio.sleep(2)
        return seen

    assert run(main()) == [ZeroDivisionError]


def test_a_stall_is_told_and_names_who_waits():
    async def main():
        asyncio.get_running_loop().describe = lambda: "vCPU 0 halted; vCPU 1 halted"
        await asyncio.sleep(0.000_001)
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="at 1000 ns: vCPU 0 halted; vCPU 1 halted") as info:
        run(main())
    assert isinstance(info.value, StallError)


def test_a_stall_without_a_machine():
    async def main():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError, match="no machine"):
        run(main())


def test_a_cancelled_deadline_does_not_hide_a_stall():
    async def main():
        asyncio.get_running_loop().call_later(1_000, print).cancel()
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match="at 0 ns"):
        run(main())


def test_the_tasks_of_a_stalled_run_are_cancelled():
    seen = []

    async def waiter():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(waiter())
            group.create_task(waiter())

    with pytest.raises(DeadlockError):
        run(main())
    assert seen == ["cancelled", "cancelled"]


def test_an_executors_job_is_waited_for():
    async def main():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:
            values = [await loop.run_in_executor(pool, pow, 2, n) for n in range(5)]
        return values, await asyncio.to_thread(str, 7), ns()

    assert run(main()) == ([1, 2, 4, 8, 16], "7", 0)


def test_an_executors_error_comes_back():
    async def main():
        await asyncio.to_thread(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_an_executor_that_refuses_leaves_nothing_to_wait_for():
    async def main():
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop().run_in_executor(pool, print)
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        run(main())


def test_after_an_executors_job_a_stall_is_told_again():
    async def main():
        await asyncio.to_thread(lambda: None)
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        run(main())


def test_sockets_work():
    async def main():
        left, right = socket.socketpair()
        left.setblocking(False)
        right.setblocking(False)
        with left, right:
            loop = asyncio.get_running_loop()
            reading = asyncio.create_task(loop.sock_recv(right, 16))
            await asyncio.sleep(0)
            await loop.sock_sendall(left, b"hello")
            return await reading

    assert run(main()) == b"hello"


def test_a_task_groups_error_comes_out_and_its_siblings_are_cancelled():
    seen = []

    async def bad():
        await asyncio.sleep(1)
        raise ValueError("bad")

    async def slow():
        try:
            await asyncio.sleep(100)
        finally:
            seen.append(ns())

    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(slow())
            group.create_task(bad())

    with pytest.raises(ExceptionGroup) as info:
        run(main())
    assert [type(e) for e in info.value.exceptions] == [ValueError]
    assert seen == [1_000_000_000]


def test_the_clocks_own_calls_and_asyncios_share_one_order():
    async def main():
        loop, seen = asyncio.get_running_loop(), []
        loop.clock.call_at(2_000, lambda: seen.append("clock 2"))
        loop.call_later(0.000_002, seen.append, "loop 2")
        loop.clock.call_at(1_000, lambda: seen.append("clock 1"))
        loop.call_later(0.000_003, seen.append, "loop 3")
        await asyncio.sleep(0.000_004)
        return seen

    assert run(main()) == ["clock 1", "clock 2", "loop 2", "loop 3"]


def test_the_loop_begins_at_its_clocks_time():
    clock = VirtualClock()
    clock.try_advance(5_000_000_000)

    async def main():
        await asyncio.sleep(1)
        return ns()

    assert run(main(), clock=clock) == 6_000_000_000


def test_a_loop_may_be_used_by_hand():
    loop = VirtualLoop()
    try:
        assert loop.run_until_complete(asyncio.sleep(3, "x")) == "x"
        assert loop.time() == 3.0
    finally:
        loop.close()


@pytest.mark.wall
def test_run_wall_runs_on_a_real_loop():
    async def main():
        await asyncio.sleep(0)
        return isinstance(asyncio.get_running_loop(), VirtualLoop)

    assert run_wall(main()) is False


@pytest.mark.parametrize("start", [run, run_wall])
def test_a_loop_in_a_loop_is_refused(start):
    """With no coroutine left over that nobody awaited."""

    async def inner():
        raise AssertionError

    async def main():
        with pytest.raises(StateError, match="an event loop runs here already"):
            start(inner())

    run(main())
