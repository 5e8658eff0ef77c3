"""Model locks: mutual exclusion, order, halting and kicking, and what preempted holders do to each kind."""

import pytest

from aiovm.engine.model import locks
from aiovm.engine.model.pvlocks import PvQueued, PvTicket
from aiovm.loop import Host, run
from aiovm.policy import by_name
from aiovm.sim.machine import SimMachine

KINDS = {
    "tas": locks.TestAndSet,
    "ticket": locks.Ticket,
    "pticket": locks.PreemptableTicket,
    "mcs": locks.Mcs,
    "qspinlock": locks.Queued,
    "pvticket": lambda: PvTicket(8),
    "pvqspinlock": lambda: PvQueued(8),
    "pvqspinlock, no stealing": lambda: PvQueued(8, steal=False),
    "pvqspinlock, no early wait": lambda: PvQueued(600, wait_early=False),
}
FIFO = ("ticket", "mcs", "pvticket", "pvqspinlock, no stealing")


def contend(kind, *, vcpus=6, pcpus=2, rounds=40, hold=3000, think=4000, slice_ns=50_000, ple=False):
    """Everybody takes the lock ``rounds`` times; who held it in which order, and the machine."""
    owners, inside = [], []

    async def main():
        host = Host(pcpus, seed=7, policy=by_name("fair", slice_ns=slice_ns))
        machine = SimMachine(host, vcpus=vcpus, ple=ple)
        lock = KINDS[kind]()

        def program(cpu):
            for _ in range(rounds):
                yield cpu.random.randrange(think)
                yield from lock.lock(cpu)
                inside.append(cpu.index)
                assert len(inside) == 1
                owners.append(cpu.index)
                yield hold
                assert inside.pop() == cpu.index
                yield from lock.unlock(cpu)

        for index in range(vcpus):
            machine.start(index, program)
        await machine.run()
        return machine

    return owners, run(main())


@pytest.mark.parametrize("ple", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_owner_at_a_time_and_everybody_gets_it(kind, ple):
    owners, _ = contend(kind, ple=ple)
    assert [owners.count(i) for i in range(6)] == [40] * 6


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("pv")])
def test_paravirtual_waiters_halt_and_are_kicked(kind):
    _, machine = contend(kind)
    assert sum(v.stat.halt_exits for v in machine.vcpus) > 0
    assert sum(v.stat.kicks for v in machine.vcpus) > 0


@pytest.mark.parametrize("kind", FIFO)
def test_fifo_locks_are_taken_in_the_order_of_arrival(kind):
    order = []

    async def main():
        machine = SimMachine(Host(5, seed=1), vcpus=5, ple=False)
        lock = KINDS[kind]()

        def program(cpu):
            yield 1000 * (cpu.index * 3 % 5) + 1
            yield from lock.lock(cpu)
            order.append(cpu.index)
            yield 20_000
            yield from lock.unlock(cpu)

        for index in range(5):
            machine.start(index, program)
        await machine.run()

    run(main())
    assert order == [0, 2, 4, 1, 3]


def test_the_second_waiter_of_a_qspinlock_is_the_pending_one():
    async def main():
        machine = SimMachine(Host(3, seed=1), vcpus=3, ple=False)
        lock = locks.Queued()
        seen = []

        def program(cpu):
            yield 1 + 1000 * cpu.index
            yield from lock.lock(cpu)
            yield 10_000
            seen.append((lock.locked.value, lock.pending.value, len(lock.queue)))
            yield from lock.unlock(cpu)

        for index in range(3):
            machine.start(index, program)
        await machine.run()
        return seen

    # Each owner's end: locked, one pending, one in the queue; then that one at the head; then nobody.
    assert run(main()) == [(1, 1, 1), (1, 0, 1), (1, 0, 0)]


def test_a_preemptable_ticket_lock_passes_a_sleeping_waiter():
    """Two waiters; the first does not run. A ticket lock waits for it, the preemptable one does not."""

    def second_waits(kind):
        got = {}

        async def main():
            machine = SimMachine(Host(2, seed=1), vcpus=3, ple=False)
            lock = KINDS[kind]()

            def holder(cpu):
                yield from lock.lock(cpu)
                yield 30_000
                yield from lock.unlock(cpu)
                yield 20_000_000

            def waiter(cpu):
                yield 1000
                yield from lock.lock(cpu)
                got[cpu.index] = cpu.now()
                yield from lock.unlock(cpu)

            machine.start(0, holder)
            machine.start(1, waiter)
            machine.start(2, waiter)
            await machine.run()

        run(main())
        return got

    assert set(second_waits("pticket")) == {1, 2}
    assert max(second_waits("pticket").values()) <= max(second_waits("ticket").values())


def test_a_ticket_lock_collapses_where_a_paravirtual_one_does_not():
    ticket = contend("ticket", rounds=60)[1].host.clock.now()
    pv = contend("pvqspinlock", rounds=60)[1].host.clock.now()
    assert ticket > 1.5 * pv
