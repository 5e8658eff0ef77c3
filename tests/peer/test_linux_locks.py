"""``aiovm linux-locks`` on Debian's kernel; needs what ``make guests`` leaves in out/guests."""

import json
from functools import partial

import pytest
from linux_guests import GUESTS, needs

from aiovm import guests
from aiovm.loaders import Module
from aiovm.loaders.cpio import Archive
from aiovm.loop import Host, run
from aiovm.paravirt.steal import StealTime
from aiovm.trace import Kind, ListSink, Tracer
from aiovm.vm import Vm


def linux(test):
    """A test that boots the kernel."""
    return pytest.mark.peer(pytest.mark.timeout(600)(needs("vmlinuz")(test)))


@pytest.fixture
def linux_locks(aiovm):
    return partial(aiovm, "linux-locks")


@linux
def test_pv_spinlocks_halt_and_kick_where_others_spin(linux_locks, tmp_path):
    rows, trace = tmp_path / "rows.json", tmp_path / "t.jsonl"
    status, out, lines = linux_locks(
        *("--kernel", str(GUESTS / "vmlinuz"), "--vcpus", "2", "--pcpus", "1", "--no-ple", "--jobs", "1"),
        # Until a waiter is preempted for the first time all is well; that falls into the warm-up, ten slices.
        *("--seed", "1", "--warmup", "60ms", "--duration", "60ms", "--json", str(rows), "--trace", str(trace)),
    )
    assert (status, lines) == (0, [])
    assert "directory: 2 on 1 CPUs, PLE off" in out
    paravirtual, native = json.loads(rows.read_bytes())["rows"]
    assert (paravirtual["lock"], native["lock"]) == ("pvqspinlock", "qspinlock")
    for row in (paravirtual, native):
        assert 60_000_000 <= row["elapsed_ns"] < 120_000_000
        assert 0.4 < row["steal_share"] < 0.6  # two that never rest, on one CPU
        assert row["ple_exits"] == 0
    # A waiter for a spinning queue gets the lock when its owner's turn comes: once a slice of 6 ms or so.
    assert native["calls"] < 100
    assert (native["kicks"], native["halts"]) == (0, 0)
    assert paravirtual["calls"] > 1000
    assert paravirtual["halts"] >= paravirtual["kicks"] > 0

    def seen(mark):
        records = map(json.loads, (tmp_path / f"t.{mark}-2on1-nople.jsonl").read_text().splitlines())
        return [r for r in records if r["kind"] in ("hypercall", "sched_in")]

    kicks = [r for r in seen("pvqspinlock") if r["kind"] == "hypercall" and r["number"] == 5]  # KVM_HC_KICK_CPU
    assert len(kicks) >= paravirtual["kicks"]
    assert not [r for r in seen("qspinlock") if r["kind"] == "hypercall"]
    assert any(r["kind"] == "sched_in" and r["run_delay_ns"] > 1_000_000 for r in seen("qspinlock"))


@linux
def test_flushing_tlbs_takes_one_ipi_for_those_that_run_and_none_for_the_others(monkeypatch):
    """``kvm_flush_tlb_multi``: a preempted vCPU gets a flag; the others a single hypercall (Linux 6.1, kvm.c)."""
    flushed = []
    update = StealTime.update

    def watched(self, run_delay):
        flushed.append(update(self, run_delay))
        return flushed[-1]

    monkeypatch.setattr(StealTime, "update", watched)
    initrd = Archive()
    initrd.add("init", 0o100755, guests.linux_path("contend").read_bytes())
    cmdline = "console=ttyS0 quiet contend=memory workers=4 warmup=1 duration=20"
    records, trace = ListSink(), Tracer()

    class Started:
        """Port 0x580: record between the words at +0 and +4; the one at +8 ends."""

        length = 12

        def read(self, offset, size, now):
            return 0

        def write(self, offset, size, value, now):
            if offset == 0:
                flushed.clear()
                trace.add(records)
            elif offset == 8:
                vm.end("done", 0)

    async def main():
        nonlocal vm
        async with Vm(Host(3, trace=trace), vcpus=4, memory=128 << 20) as vm:
            vm.ports.register(0x580, 12, Started())
            kernel = (GUESTS / "vmlinuz").read_bytes()
            vm.load(kernel, name="vmlinuz", cmdline=cmdline, modules=[Module(initrd.packed())])
            assert (await vm.run()).reason == "done"

    vm = None
    run(main())
    trace.close()
    # KVM_HC_SEND_IPI's result is how many CPUs it reached: the two that ran beside the caller.
    hypercalls = [(r.a, r.b) for r in records.of(Kind.HYPERCALL)]
    assert (10, 2) in hypercalls
    assert any(flushed)


def test_what_it_cannot_begin_with(linux_locks, tmp_path, monkeypatch):
    monkeypatch.delenv("AIOVM_GUESTS", raising=False)
    monkeypatch.chdir(tmp_path)
    none = "aiovm: no Linux kernel at out/guests/vmlinuz: make guests fetches one, or name yours with --kernel"
    assert linux_locks() == (2, "", [none])
    assert linux_locks("--kernel", "none") == (2, "", ["aiovm: no Linux kernel at none"])
    (tmp_path / "kernel").write_bytes(b"x")
    for option, value, says in (
        ("--seed", str(1 << 63), "bad seed"),
        ("--jobs", "-1", "bad number of processes -1"),
        ("--policy", "fare", "no policy is called 'fare'"),
        ("--pcpus", "2,many", "bad number of physical CPUs 'many'"),
        ("--json", "/", "cannot write /: Is a directory"),
        ("--trace", "t.txt", "ends in .pftrace, .json or .jsonl"),
        ("--clock", "sun", "'sun'"),
    ):
        status, out, lines = linux_locks("--kernel", "kernel", option, value)
        assert (status, out, len(lines)) == (2, "", 1)
        assert says in lines[0]
