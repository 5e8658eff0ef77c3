"""The doorbell: rung often, answered once, at the machine's time."""

import asyncio

from backend_bench import Bench

from aiovm.backends.base import Doorbell
from aiovm.loop import run


def test_a_bell_rung_often_is_answered_once_after_the_latency():
    async def main():
        bench = Bench()
        answers = []
        bell = Doorbell(bench, lambda: answers.append(bench.clock.now()), latency_ns=500)
        bell.ring()
        bell.ring()
        await asyncio.sleep(0.000_002)
        assert answers == [500]
        bell.ring()
        await asyncio.sleep(0.000_002)
        assert answers == [500, 2500]

    run(main())


def test_news_during_the_service_rings_again():
    async def main():
        bench = Bench()
        answers = []

        def service():
            answers.append(bench.clock.now())
            if len(answers) < 3:
                bell.ring()

        bell = Doorbell(bench, service)
        bell.ring()
        await asyncio.sleep(0.000_001)
        assert answers == [0, 0, 0]

    run(main())
