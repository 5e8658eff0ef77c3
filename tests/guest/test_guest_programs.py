"""The guest programs on the engine, in virtual time."""

import pytest

from aiovm import guests
from aiovm.locks.layout import LOCKS, PV_LOCKS, LockLayout
from aiovm.loop import Host, run
from aiovm.paravirt import DEFAULT_FEATURES, KvmFeature
from aiovm.vm import Vm

OK, FAILED, REFUSED = 1, 3, 5  # process statuses of 0, 1 and 2 at the debug-exit port


def play(name, cmdline="", *, vcpus=1, pcpus=None, look=lambda vm: None, **options):
    """Run a guest: its process status, the lines that it printed, and what ``look`` saw at the end."""
    printed = bytearray()

    async def main():
        host = Host(vcpus if pcpus is None else pcpus)
        async with Vm(host, vcpus=vcpus, memory=16 << 20, console=printed.extend, **options) as vm:
            vm.load(guests.path(name).read_bytes(), name=name, cmdline=cmdline)
            outcome = await vm.run()
            return outcome.status, look(vm)

    status, seen = run(main())
    return status, printed.decode().split("\r\n")[:-1], seen


def play_locks(cmdline, *, vcpus=4, pcpus=2, **options):
    layout = LockLayout.from_elf(guests.path("locks").read_bytes())
    status, lines, results = play(
        "locks",
        f"cpus={vcpus} {cmdline}",
        vcpus=vcpus,
        pcpus=pcpus,
        look=lambda vm: layout.read(vm.memory.read),
        **options,
    )
    assert lines[-1].endswith(f"{results.lost} lost")
    return status, results


def test_hello_from_each_vcpu_in_turn():
    status, lines, _ = play("hello", vcpus=3)
    assert status == OK
    assert lines == [f"hello from vCPU {cpu} of 3" for cpu in range(3)]


def test_hello_reports_a_vcpu_that_does_not_answer():
    status, lines, _ = play("hello", "cpus=2")
    assert status == FAILED
    assert lines[-1] == "no answer from vCPU 1"


@pytest.mark.parametrize("mode", ["oneshot", "periodic", "deadline"])
def test_ticks_come_a_period_apart(mode):
    status, lines, _ = play("ticks", f"mode={mode} n=4 period=500")
    assert status == OK
    times = [int(line.split()[3]) for line in lines]
    assert len(times) == 4
    for at, time in enumerate(times, start=1):
        assert 500 * at - 5 <= time <= 500 * at + 10 * at


@pytest.mark.parametrize("mode", ["ring", "all"])
@pytest.mark.parametrize("pcpus", [1, 3])
def test_every_vcpu_receives_one_interrupt_a_round(mode, pcpus):
    status, lines, _ = play("ipi", f"mode={mode} cpus=3 rounds=40", vcpus=3, pcpus=pcpus)
    assert status == OK
    assert lines == [f"vCPU {cpu} received 40" for cpu in range(3)]


@pytest.mark.parametrize("pcpus", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_kick_is_lost_wherever_it_falls(pcpus, seed):
    status, lines, _ = play("kickrace", f"rounds=300 seed={seed}", vcpus=2, pcpus=pcpus)
    assert status == OK
    words = lines[-1].split()
    halts, early = int(words[3]), int(words[5])
    assert halts > 100
    assert early > 20


LOOPS = "alu mem call cpuid msr wrmsr port in mmio store hypercall rdtsc pause fault timer ipi wake"


@pytest.mark.parametrize("loop", LOOPS.split())
def test_bench_runs_each_loop(loop):
    status, lines, _ = play("bench", f"loop={loop} n=100", vcpus=2)
    assert status == OK
    assert lines[-1].startswith(f"{loop}: 100 rounds, ")


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock != "broken"])
@pytest.mark.parametrize("pcpus", [2, 4])
def test_lock_excludes(lock, pcpus):
    status, results = play_locks(f"lock={lock} duration=1000000 think=2000 spin=50", pcpus=pcpus)
    assert (status, results.lost) == (OK, 0)
    assert results.params.lock_name == lock
    assert results.operations > 100
    assert results.operations == sum(results.done) == results.waits.total
    assert all(cpu.ops_total > 0 for cpu in results.cpus)


def test_broken_lock_is_caught():
    status, results = play_locks("lock=broken duration=1000000 think=2000")
    assert status == FAILED
    assert results.lost > 0


@pytest.mark.parametrize("lock", sorted(PV_LOCKS))
def test_paravirtual_waiters_halt_and_are_kicked(lock):
    _, results = play_locks(f"lock={lock} duration=1000000 think=2000 spin=20")
    halts = sum(cpu.halts for cpu in results.cpus)
    kicks = sum(cpu.kicks for cpu in results.cpus)
    assert halts > 10
    assert 10 < kicks <= halts
    assert 0 < sum(cpu.acquired_after_halt for cpu in results.cpus) <= halts


@pytest.mark.parametrize("lock", sorted(PV_LOCKS))
def test_paravirtual_locks_want_the_kick(lock):
    status, lines, _ = play("locks", f"lock={lock} cpus=1", features=DEFAULT_FEATURES & ~KvmFeature.PV_UNHALT)
    assert status == REFUSED
    assert lines == [f"this machine has no KVM_FEATURE_PV_UNHALT, needed by {lock}"]


def test_operations_of_the_warm_up_are_checked_but_not_measured():
    _, results = play_locks("duration=500000 warmup=500000 think=2000", vcpus=2)
    assert sum(results.counted) == sum(cpu.ops_total for cpu in results.cpus)
    assert 0.3 < results.operations / sum(results.done) < 0.7


def test_operations_spread_over_the_locks():
    _, results = play_locks("nlocks=4 duration=1000000 think=1000", vcpus=2)
    assert len(results.done) == 4
    assert min(results.done) > sum(results.done) / 8


@pytest.mark.parametrize("distribution", ["exp", "uniform"])
def test_distributions_have_the_mean_that_was_asked_for(distribution):
    """A lone CPU that only thinks does as many operations as with fixed thinking: 5000 draws, 3 sigma = 4 %."""
    common = "hold=0 think=20000 duration=100000000"
    _, fixed = play_locks(f"{common} think_dist=fixed", vcpus=1, pcpus=1)
    _, drawn = play_locks(f"{common} think_dist={distribution}", vcpus=1, pcpus=1)
    assert drawn.operations == pytest.approx(fixed.operations, rel=0.04)


@pytest.mark.parametrize(
    ("cmdline", "complaint"),
    [
        ("lok=tas", "unknown option: lok=tas"),
        ("lock=spin", "not a choice: spin"),
        ("cpus=4x", "not a number: 4x"),
        ("cpus=", "not a number: "),
        ("cpus=256", "out of range: cpus"),
        ("spin=0", "out of range: spin"),
        ("nlocks=0x41", "out of range: nlocks"),
    ],
)
def test_bad_options_are_refused(cmdline, complaint):
    status, lines, _ = play("locks", cmdline)
    assert (status, lines) == (REFUSED, [complaint])
