"""Model CPUs: what an operation costs, what a kick cuts, and what a spin loop sees."""

import pytest

from aiovm.costs import Costs
from aiovm.engine.model import Cell
from aiovm.errors import ConfigError, StateError
from aiovm.loop import Host, run
from aiovm.sim.machine import SimMachine
from aiovm.trace import Kind, ListSink, Tracer

#: A dispatch takes 1,500 ns, an exit 600, a turn of a spin loop 74: 70 for PAUSE and 16 bytes at 0.25 ns.
SWITCH, EXIT, TURN = 1500, 600, 74


def lab(programs, *, pcpus=None, handlers=None, trace=None, costs=None, **options):
    """Run one program a CPU to the end; the machine, afterwards."""

    async def main():
        host = Host(pcpus or len(programs), seed=1, trace=trace, costs=costs)
        machine = SimMachine(host, vcpus=len(programs), **{"ple": False, **options})
        machine.handlers.update(handlers or {})
        for index, program in enumerate(programs):
            machine.start(index, program)
        await machine.run()
        return machine

    return run(main())


def test_computing_takes_its_time():
    seen = []

    def program(cpu):
        seen.append(cpu.now())
        yield 1000
        seen.append(cpu.now())
        yield 0
        seen.append(cpu.now())

    lab([program])
    assert seen == [SWITCH, SWITCH + 1000, SWITCH + 1000]


def test_a_spinner_sees_a_store_at_the_next_turn_of_its_loop():
    cell, seen = Cell(), []

    def writer(_):
        yield 1000
        cell.store(1)

    def spinner(cpu):
        got = yield cpu.spin(cell, 1)
        seen.append((got, cpu.now(), cpu.spin_ns, cpu.pauses))

    lab([writer, spinner])
    # 1000 ns are 13.5 turns: the 14th sees it, 1,036 ns after the loop began.
    assert seen == [(True, SWITCH + 14 * TURN, 14 * TURN, 14)]


def test_a_value_that_is_there_ends_the_loop_before_it_begins():
    cell, seen = Cell(5), []

    def spinner(cpu):
        got = yield cpu.spin(cell, 5)
        seen.append((got, cpu.now()))

    lab([spinner])
    assert seen == [(True, SWITCH)]


def test_a_spin_loop_gives_up_after_its_turns():
    seen = []

    def spinner(cpu):
        got = yield cpu.spin(Cell(), 1, 10)
        seen.append((got, cpu.now() - SWITCH, cpu.pauses))

    lab([spinner])
    assert seen == [(False, 10 * TURN, 10)]


def test_of_two_spinners_the_earlier_poller_wins_and_the_other_goes_on():
    cell, order = Cell(1), []

    def writer(_):
        yield 500
        cell.store(0)
        yield 1000
        cell.store(0)

    def taker(delay):
        def program(cpu):
            yield delay
            while cell.value:
                yield cpu.spin(cell, 0)
            cell.store(1)
            order.append((cpu.index, cpu.now() - SWITCH))

        return program

    # Polls at 10 + 74k and at 40 + 74k: after 500 the first are at 528 and 558; after 1,500 at 1,520.
    lab([writer, taker(10), taker(40)])
    assert order == [(1, 528), (2, 1520)]


def test_a_kick_cuts_an_operation_and_none_of_it_is_lost():
    times = []

    def program(cpu):
        yield 10_000
        times.append(cpu.now())

    async def main():
        host = Host(1)
        machine = SimMachine(host, vcpus=1, ple=False)
        machine.start(0, program)
        for at in (2000, 3333, 7000):
            host.clock.call_at(at, machine.vcpus[0].kick)
        await machine.run()
        return machine.vcpus[0].stat.exits

    assert run(main()) == 4  # three kicks and the end
    assert times == [SWITCH + 10_000]


def test_an_interrupt_runs_its_handler_and_the_program_goes_on():
    log = []

    def sender(cpu):
        yield 1000
        yield cpu.send_ipis([1], 0x40)

    def receiver(cpu):
        yield cpu.enable_interrupts()
        yield 5000
        log.append(("done", cpu.now()))

    def handler(cpu):
        log.append(("in", cpu.now(), cpu.rflags & 0x200))
        yield 250
        log.append(("out", cpu.now()))

    lab([sender, receiver], handlers={0x40: handler})
    at = SWITCH + 1000 + 500  # the IPI's way; delivery costs 100
    assert log == [("in", at + 100, 0), ("out", at + 350), ("done", SWITCH + 5000 + 350)]


def test_an_interrupt_waits_for_sti():
    log = []

    def sender(cpu):
        yield cpu.send_ipis([1], 0x40)

    def receiver(cpu):
        yield 3000
        log.append("before")
        yield cpu.enable_interrupts()
        log.append("after")
        yield 1

    def handler(_):
        log.append("irq")
        yield 1

    lab([sender, receiver], handlers={0x40: handler})
    assert log == ["before", "irq", "after"]


def test_higher_vectors_come_first_and_both_get_an_eoi():
    log = []

    def sender(cpu):
        yield cpu.send_ipis([1], 0x40)
        yield cpu.send_ipis([1], 0x50)

    def receiver(cpu):
        yield 5000
        yield cpu.enable_interrupts()
        yield 1

    def handler(name):
        def body(_):
            log.append(name)
            yield 1

        return body

    machine = lab([sender, receiver], handlers={0x40: handler("low"), 0x50: handler("high")})
    assert log == ["high", "low"]
    assert machine.vcpus[1].apic.highest_isr() == -1


@pytest.mark.parametrize("late", [0, 10_000])
def test_a_kick_before_or_after_hlt_wakes(late):
    woken = []

    def waker(cpu):
        yield late
        yield cpu.kick(1)

    def sleeper(cpu):
        yield 5000
        yield cpu.halt()
        woken.append(cpu.now())

    machine = lab([waker, sleeper])
    assert machine.vcpus[1].stat.kicks == 1
    if late:
        assert woken == [SWITCH + late + SWITCH]
    else:  # the token was there: HLT is only its exit
        assert woken == [SWITCH + 5000 + EXIT]


def test_the_deadline_timer_ends_a_sleep():
    woken = []

    def program(cpu):
        yield cpu.arm_timer(50_000, 0xEC)
        yield cpu.wait_for_interrupt()
        woken.append(cpu.now())

    lab([program])
    assert woken == [50_000 + SWITCH + 100]


def test_pause_loop_exits_double_their_window():
    cell = Cell()
    tracer, records = Tracer(), ListSink()
    tracer.add(records)

    def spinner(cpu):
        yield cpu.spin(cell, 1)

    def writer(_):
        yield 20_000
        cell.store(1)

    machine = lab([spinner, writer], trace=tracer, ple=True)
    tracer.flush()
    # 4,096, 8,192, 16,384 cycles of a 2 GHz TSC, and an exit after each.
    assert [r.b for r in records.of(Kind.PLE)] == [2048, 4096, 8192]
    assert machine.vcpus[0].stat.pause_exits == 3


def test_user_code_has_no_pause_loop_exits():
    def spinner(cpu):
        cpu.user()
        yield cpu.spin(Cell(), 1, 1000)

    assert lab([spinner], ple=True).vcpus[0].stat.pause_exits == 0


def test_two_cpus_share_one_and_nothing_is_lost():
    done = []

    def program(cpu):
        for _ in range(10):
            yield 1_000_000
        done.append(cpu.index)

    machine = lab([program, program], pcpus=1)
    assert sorted(done) == [0, 1]
    host = machine.host
    assert sum(t.ran_ns for t in host.threads) == host.pcpus[0].busy_ns
    assert host.pcpus[0].busy_ns == 20_000_000 + host.pcpus[0].switches * SWITCH


def test_costs_may_be_changed():
    seen = []

    def program(cpu):
        yield cpu.spin(Cell(), 1, 1)
        seen.append(cpu.now())

    lab([program], costs=Costs(context_switch_ns=0, pause_ns=96))
    assert seen == [100]


def test_bad_machines_are_refused():
    async def main():
        host = Host(1)
        with pytest.raises(ConfigError, match="not 0"):
            SimMachine(host, vcpus=0)
        with pytest.raises(ConfigError, match="not 1025"):
            SimMachine(host, vcpus=1025)
        with pytest.raises(StateError):
            SimMachine(host, vcpus=1).contexts[0].run(1)

    run(main())


@pytest.mark.parametrize(("spinners", "late"), [(1, 100), (3, 300)])
def test_a_line_that_many_fetch_changes_hands_late(spinners, late):
    """Half the spinners' fetches of 200 ns come first; a turn takes 74 ns, so the store at 7400 is seen at once."""
    word = Cell(0, line_ns=200)
    seen = []

    def spin(cpu):
        got = yield cpu.spin(word, 1)
        seen.append((cpu.now(), got))

    def writer(cpu):
        yield 74 * 100
        word.store(1)

    lab([spin] * spinners + [writer])
    assert seen[0] == (SWITCH + 7400 + late, True)
