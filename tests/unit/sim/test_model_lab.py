"""Runs of scenarios: what is measured adds up, history's switches do something, the same seed gives the same JSON."""

import json
import os
import subprocess
import sys

import msgspec
import pytest
from msgspec.structs import replace

from aiovm.errors import ConfigError
from aiovm.locks.runner import measure
from aiovm.sim.jobs import run_jobs
from aiovm.sim.lab import simulate
from aiovm.sim.meter import Meter
from aiovm.sim.paper import ROWS, Row, judge, run_paper, select, vary
from aiovm.sim.paper.real import as_result, experiment, run_real
from aiovm.sim.paper.row import Verdict
from aiovm.sim.plot import plot_sim, plot_sweep
from aiovm.sim.scenario import (
    Dbench,
    Ebizzy,
    Features,
    HostSpec,
    KernelBuild,
    LockBound,
    Ns,
    Scenario,
    TcpRr,
    VmSpec,
)
from aiovm.sim.sweep import points, run_sweep
from aiovm.trace import ListSink, Tracer

MS = 1_000_000


def scenario(workload=None, *, vms=1, vcpus=4, pcpus=4, duration=10, warmup=2, policy="fair", **features):
    return Scenario(
        duration=Ns(duration * MS),
        warmup=Ns(warmup * MS),
        host=HostSpec(pcpus=pcpus, policy=policy),
        features=Features(**features),
        vm=[VmSpec(count=vms, vcpus=vcpus, workload=workload or LockBound())],
    )


@pytest.mark.parametrize(
    "workload",
    [
        LockBound(lock="pvqspinlock", locks=3, hold_dist="uniform"),
        KernelBuild(),
        Dbench(lock="pvticket"),
        TcpRr(ticks=250),
        Ebizzy(),
        Ebizzy(mutex=False, flush_every=3, pv_flush=True, pv_yield=True),
    ],
)
def test_every_workload_runs_and_its_shares_are_shares(workload):
    result = simulate(scenario(workload, vms=2))
    assert result.throughput > 0
    assert 0 < result.busy_share <= 1
    for vm in result.vms:
        assert 0 <= vm.spin_share <= 1
        assert vm.cpu_share + vm.steal_share <= 1 + 1e-12
        assert vm.wait_p50_ns <= vm.wait_p99_ns <= vm.wait_max_ns * 33 // 32 + 1


def test_cpu_bound_machines_share_exactly():
    result = simulate(scenario(LockBound(lock="tas"), vms=2, duration=20))
    assert result.busy_share == 1.0
    assert sum(vm.cpu_share for vm in result.vms) == pytest.approx(1.0, abs=1e-9)
    assert all(vm.cpu_share + vm.steal_share == pytest.approx(1.0, abs=1e-9) for vm in result.vms)


def test_a_pv_flush_spares_preempted_targets():
    asked = simulate(scenario(Ebizzy(mutex=False, user=Ns(50_000)), vms=2, ple=False, duration=40))
    spared = simulate(scenario(Ebizzy(mutex=False, user=Ns(50_000), pv_flush=True), vms=2, ple=False, duration=40))
    assert spared.throughput > 1.5 * asked.throughput


def test_directed_yield_saves_a_ticket_lock():
    none = simulate(scenario(vcpus=8, pcpus=2, duration=30, warmup=120, directed_yield=False))
    some = simulate(scenario(vcpus=8, pcpus=2, duration=30, warmup=120))
    assert some.throughput > 3 * none.throughput
    assert sum(vm.yields_won for vm in none.vms) == 0 < sum(vm.yields_won for vm in some.vms)


def test_strict_gang_of_four_and_two_on_four_idles_a_quarter():
    row = next(row for row in ROWS if row.row == "11")
    assert simulate(row.scenarios["4+2"]).busy_share == 0.75


def test_halt_polling_saves_a_switch():
    waits = {
        ns: simulate(scenario(TcpRr(), vcpus=1, pcpus=1, halt_poll=Ns(ns), duration=50, warmup=10)).vms[0].wait_p50_ns
        for ns in (0, 200_000)
    }
    assert waits[0] - waits[200_000] == pytest.approx(1500, abs=800)


def test_the_same_seed_gives_the_same_json_in_any_process():
    code = (
        "import msgspec; from aiovm.sim.lab import simulate; from aiovm.sim.scenario import *;"
        "print(msgspec.json.encode(simulate(Scenario(duration=Ns(5_000_000), warmup=Ns(1_000_000),"
        "host=HostSpec(pcpus=4), vm=[VmSpec(count=2, workload=Ebizzy())]), seed=5)).decode())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert msgspec.json.decode(outputs.pop())["seed"] == 5


def test_another_seed_gives_another_run():
    assert simulate(scenario(), seed=1).vms != simulate(scenario(), seed=2).vms


def test_a_policy_that_does_not_exist():
    with pytest.raises(ConfigError, match="no policy is called"):
        simulate(scenario(policy="nice"))


# ---- meter -----------------------------------------------------------------------------------------------------


def test_waits_are_kept_to_a_thirty_second():
    meter = Meter(1)
    for wait in (0, 31, 1000, 1_000_000):
        meter.waited(wait)
    assert [meter.percentile(p) for p in (25, 50, 75)] == [0, 31, 992]
    assert 1_000_000 * 31 // 32 <= meter.percentile(100) <= 1_000_000
    assert meter.longest == 1_000_000
    assert meter.share_below(1000) == 0.75
    meter.reset()
    assert (meter.percentile(50), meter.longest, meter.share_below(1)) == (0, 0, 1.0)


# ---- sweeps ----------------------------------------------------------------------------------------------------


def test_a_sweep_covers_every_combination():
    todo = points(Scenario(), ["pcpus=1..3", "vm.workload.hold=1us,2us"], 2)
    assert len(todo) == 12
    assert [p.scenario.host.pcpus for p in todo[::4]] == [1, 2, 3]
    assert todo[2].scenario.vm[0].workload.hold == 2000
    assert len({p.name for p in todo}) == 12


@pytest.mark.parametrize(
    "setting",
    ["pcpus", "pcpus=", "=1", "pcpus=0", "pcpus=3..1", "nothing=1", "host.x=1", "vm.workload.hold=3", "a.b=1"],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError):
        points(Scenario(), [setting], 1)


def test_a_sweep_goes_on_where_it_was(tmp_path):
    todo = points(scenario(duration=2, warmup=1), ["pcpus=1,2"], 2)
    first = dict(enumerate(run_sweep(todo[:2], tmp_path)))
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(times) == len(first) == 2
    results = {p.name: r for p, r in run_sweep(todo, tmp_path)}
    assert len(results) == 4
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in times.items())
    assert results[todo[0].name] == simulate(todo[0].scenario, seed=1)
    stored = tmp_path / todo[0].name
    other = json.loads(stored.read_bytes()) | {"program": "00" * 12}
    stored.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="of another version of aiovm"):
        list(run_sweep(todo, tmp_path))
    stored.write_text("{")
    with pytest.raises(ConfigError, match="not a result"):
        list(run_sweep(todo, tmp_path))


def test_unknown_executors_are_refused():
    with pytest.raises(ConfigError, match="no executor"):
        list(run_jobs([], executor="threads"))


# ---- the paper table -------------------------------------------------------------------------------------------


def test_every_row_of_the_table_has_what_it_says():
    assert [row.row for row in ROWS] == [*map(str, range(1, 13)), "A", "B", "C", "D"]
    assert all(row.source and row.expected and row.gate and row.scenarios for row in ROWS)


def test_rows_are_chosen_by_name():
    assert [row.row for row in select("a, 1")] == ["A", "1"]
    with pytest.raises(ConfigError, match="no row is called '13'"):
        select("13")


def test_undercommit_does_nothing():
    row = select("D")[0]
    brief = {k: replace(v, duration=Ns(3 * MS), warmup=Ns(MS)) for k, v in row.scenarios.items()}
    verdict = row.judge({label: [simulate(spec, seed=1)] for label, spec in brief.items()})
    assert verdict.passed
    assert verdict.measured == 0


def test_a_row_is_judged_on_all_its_seeds():
    def judge(runs):
        return Verdict([float(r.seed) for r in runs["only"]], {"never": False}, "said")

    row = Row(
        "X", "title", "expected", "gate", "figure", "source", {"only": scenario(duration=1, warmup=0)}, judge, "why"
    )
    seen = []
    (outcome,) = run_paper([row], seeds=3, progress=lambda *counts: seen.append(counts))
    assert (outcome.measured, outcome.low, outcome.high) == (2.0, 1.0, 3.0)
    assert outcome.detail == "said; does not hold: never (why)"
    assert msgspec.json.decode(msgspec.json.encode(outcome))["pass"] is False
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_table_that_was_interrupted_goes_on_where_it_was(tmp_path):
    def row(name, pcpus):
        only = {"only": scenario(duration=1, warmup=0, pcpus=pcpus)}
        judge = lambda runs: Verdict([r.throughput for r in runs["only"]], {}, "")  # noqa: E731
        return Row(name, "title", "expected", "gate", "figure", "source", only, judge)

    rows = [row("X", 1), row("Y", 2)]
    stored = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}  # noqa: E731
    first = run_paper(rows, seeds=1, out=tmp_path, executor="process")
    outcome = next(first)
    first.close()
    before = stored()
    assert before
    whole = list(run_paper(rows, seeds=1, out=tmp_path))
    assert whole[0] == outcome
    assert whole == list(run_paper(rows, seeds=1))
    assert len(stored()) == 2
    assert before.items() <= stored().items()


def test_an_assumption_can_be_varied():
    (row,) = vary(select("3"), ["vm.workload.line=0ns", "pcpus=16"])
    assert {(s.vm[0].workload.line, s.host.pcpus) for s in row.scenarios.values()} == {(0, 16)}
    assert {s.vm[0].workload.line for s in select("3")[0].scenarios.values()} == {100}
    for bad in ("x", "=1", "pcpus=", "host.nothing=1"):
        with pytest.raises(ConfigError):
            vary(select("3"), [bad])


def test_machine_code_runs_what_a_row_says():
    two = select("2")[0]
    e = experiment(two.scenarios["3:1"], 7)
    assert (e.lock, e.vcpus, e.pcpus, e.policy, e.ple, e.seed) == ("ticket", 6, 2, "round-robin", False, 7)
    assert (e.workload.hold_ns, e.workload.think_ns, e.workload.think_dist, e.slice_ns) == (2000, 20_000, "exp", 6 * MS)
    with pytest.raises(ConfigError, match="row 3 has no counterpart"):
        next(run_real(select("3")))


def test_row_1_has_the_same_verdict_on_machine_code():
    row = select("1")[0]
    kinds = ("tas", "ticket", "pvqspinlock")
    runs = {kind: [as_result(kind, measure(experiment(row.scenarios[kind], 1, 6 * MS)))] for kind in kinds}
    assert judge(row, runs).passed


# ---- pictures --------------------------------------------------------------------------------------------------


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    tracer, records = Tracer(), ListSink()
    tracer.add(records)
    result = simulate(scenario(vms=2, duration=20), trace=tracer)
    tracer.flush()
    plot_sim(result, records.records, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"waits.png", "time.png", "timeline.png"}
    plot_sweep({"a": [result], "b": [result]}, tmp_path / "sweep.png")
    with pytest.raises(ConfigError):
        plot_sweep({"a": [result]}, tmp_path / "sweep.nonsense")
