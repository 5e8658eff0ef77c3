"""The thread of a machine's slices: its results, its errors, its end."""

import asyncio
import gc
import threading
import time

import pytest

from aiovm.clock import WallClock
from aiovm.slice_thread import SliceThread

pytestmark = pytest.mark.wall


def make():
    return SliceThread("slices", asyncio.get_running_loop(), WallClock())


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "slices"]


async def test_a_result_comes_back_from_another_thread():
    thread = make()
    for number in range(3):
        assert await thread.call(lambda n: (n, threading.get_ident()), number, int) == (number, alive()[0].ident)
    thread.close()
    assert alive() == []


async def test_an_error_comes_back_and_the_thread_goes_on():
    thread = make()
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda n: 1 // n, 0, int)
    assert await thread.call(lambda n: n, 7, int) == 7
    thread.close()


async def test_who_is_cancelled_hurries_the_call_and_waits_for_its_end():
    thread = make()
    hurried, ended = threading.Event(), []

    def wait(_):
        hurried.wait(60)
        ended.append(1)

    task = asyncio.create_task(thread.call(wait, 0, hurried.set))
    await asyncio.sleep(0.01)
    assert ended == []
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [1]
    assert await thread.call(lambda n: n, 3, int) == 3
    thread.close()


async def test_without_a_call_there_is_no_thread_and_forgotten_it_ends():
    thread = make()
    assert alive() == []
    await thread.call(lambda n: n, 0, int)
    (worker,) = alive()
    del thread
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


async def test_the_loop_turns_while_a_call_is_made():
    thread = make()
    turns = 0
    task = asyncio.create_task(thread.call(lambda _: time.sleep(0.05), 0, int))
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    thread.close()
    assert turns > 1
