"""The same inputs and seed give the same bytes: in fresh processes, whatever Python's hashes, on every engine path."""

import json
import os
import subprocess
import sys

import pytest

from aiovm import guests
from aiovm.engine.unicorn.budget import NATIVE
from aiovm.loop import Host, run
from aiovm.trace import HashSink, Tracer
from aiovm.vm import Vm

HASH_SEEDS = ["0", "1", "random"]

MEASURE = """
import sys
from aiovm.locks.runner import Experiment, Workload, measure, report
lock, pcpus, policy, native, seed = sys.argv[1:]
workload = Workload(duration_ns=5_000_000, warmup_ns=1_000_000, spin=100)
experiment = Experiment(lock, 4, int(pcpus), workload, policy=policy, slice_ns=500_000, seed=int(seed),
                        native={"default": None, "C": True, "Python": False}[native])
found = measure(experiment)
sys.stdout.buffer.write(report([found], {lock: found}).to_json())
"""

RUN = """
import sys
from aiovm import guests
from aiovm.loop import Host, run
from aiovm.trace import HashSink, Tracer
from aiovm.vm import Vm
name, cmdline = sys.argv[1:]
async def main():
    tracer, digest = Tracer(), HashSink()
    tracer.add(digest)
    said = bytearray()
    async with Vm(Host(2, trace=tracer), vcpus=3, console=said.extend) as vm:
        vm.load(guests.path(name).read_bytes(), cmdline=cmdline)
        outcome = await vm.run()
    tracer.flush()
    print(outcome, said.decode(), digest.hexdigest())
run(main())
"""


def fresh(program, *args, hash_seed="0"):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args],
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.mark.parametrize(("lock", "policy"), [("pvqspinlock", "fair"), ("tas", "random")])
def test_whatever_the_hash_seed(lock, policy):
    first, *others = (fresh(MEASURE, lock, "2", policy, "default", "7", hash_seed=seed) for seed in HASH_SEEDS)
    assert json.loads(first)["rows"][0]["throughput_ops_per_s"] > 0
    assert others == [first, first]


@pytest.mark.skipif(not NATIVE, reason="the C hook is not built: there is the Python twin only")
@pytest.mark.parametrize("lock", ["ticket", "pvticket"])
def test_the_block_hook_in_c_and_its_python_twin(lock):
    in_c = fresh(MEASURE, lock, "2", "fair", "C", "3")
    assert fresh(MEASURE, lock, "2", "fair", "Python", "3", hash_seed="1") == in_c


def trace_of(cmdline, **options):
    """How a run of the bench guest ended, at what time, what it said, and the trace's hash."""

    async def main():
        tracer, digest = Tracer(), HashSink()
        tracer.add(digest)
        said = bytearray()
        async with Vm(Host(2, trace=tracer), vcpus=2, ple=False, console=said.extend, **options) as vm:
            vm.load(guests.path("bench").read_bytes(), cmdline=cmdline)
            outcome = await vm.run()
        tracer.flush()
        return outcome, bytes(said), digest.hexdigest()

    return run(main())


@pytest.mark.skipif(not NATIVE, reason="the C hook is not built: there is the Python twin only")
@pytest.mark.parametrize(
    "loop",
    ["cpuid", "msr", "wrmsr", "port", "in", "mmio", "store", "hypercall", "rdtsc", "pause", "fault", "timer", "ipi"],
)
def test_an_exit_in_c_and_in_python(loop):
    """Carried by C or not: the same answers at the same times."""
    in_c = trace_of(f"loop={loop} n=40", native=True)
    assert in_c[0].status == 1
    assert trace_of(f"loop={loop} n=40", native=False) == in_c


@pytest.mark.skipif(not NATIVE, reason="the C hook is not built: there is the Python twin only")
def test_faults_that_c_delivers_by_itself():
    """Where nobody traces: the same memory at the same time, and the same words for people."""

    async def main(native):
        said = bytearray()
        async with Vm(Host(1), console=said.extend, native=native) as vm:
            vm.load(guests.path("bench").read_bytes(), cmdline="loop=fault n=40")
            await vm.run()
            memory = b"".join(bytes(slot.bytes_) for slot in vm.memory.map.slots)
            return bytes(said), vm.clock.now(), hash(memory), vm.describe()

    in_c = run(main(True))
    assert b"fault: 40 rounds" in in_c[0]
    assert in_c[3].count("#14") > 4
    assert run(main(False)) == in_c


def test_different_seeds_differ():
    """In the trace of the same lock, whose think times and slices follow the seed."""
    found = [json.loads(fresh(MEASURE, "tas", "2", "fair", "default", str(seed))) for seed in range(3)]
    assert len({one["trace_hash"] for one in found}) == 3
    assert len({one["rows"][0]["throughput_ops_per_s"] for one in found}) > 1


@pytest.mark.parametrize(
    ("guest", "cmdline"), [("hello", ""), ("ipi", "cpus=3 rounds=20"), ("ticks", "mode=deadline n=3 period=200")]
)
def test_a_guest_in_fresh_processes(guest, cmdline):
    first, other = (fresh(RUN, guest, cmdline, hash_seed=seed) for seed in ("1", "random"))
    assert b"debug-exit" in first
    assert other == first
