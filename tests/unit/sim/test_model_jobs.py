"""Executors and interruption: the same results wherever they are computed, and nothing that was stored is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from aiovm.errors import ConfigError, EngineError
from aiovm.sim.jobs import run_jobs
from aiovm.sim.scenario import HostSpec, Ns, Scenario, VmSpec, load_scenario
from aiovm.sim.sweep import points, run_sweep

SCENARIO = """
duration = "20ms"
warmup = "1ms"
[host]
pcpus = 2
[[vm]]
vcpus = 4
workload = { kind = "lock-bound", lock = "tas" }
"""


def stored(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def interrupted(command, reached):
    """Start ``command`` in a group of its own, Ctrl-C when it has ``reached`` something: its errors.

    The errors end when the last process that could write some is gone. Nothing is left running in any case.
    """
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while job.poll() is None and not reached():
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=60)
        return errors
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_dask_stores_the_same_bytes_as_processes(tmp_path):
    distributed = pytest.importorskip("distributed", reason="the extra aiovm[dask] is not installed")
    brief = Scenario(duration=Ns(2_000_000), warmup=Ns(0), host=HostSpec(pcpus=2), vm=[VmSpec(vcpus=4)])
    todo = points(brief, ["pcpus=1,2"], 1)
    list(run_sweep(todo[:1], tmp_path / "here"))
    list(run_sweep(todo[1:], tmp_path / "here"))
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        list(run_sweep(todo, tmp_path / "dask", executor=f"dask:{cluster.scheduler_address}"))
    assert len(stored(tmp_path / "dask")) == 2
    assert stored(tmp_path / "dask") == stored(tmp_path / "here")


def test_a_cluster_that_does_not_answer_is_an_error(tmp_path):
    pytest.importorskip("distributed", reason="the extra aiovm[dask] is not installed")
    with pytest.raises(ConfigError, match="no Dask scheduler answers at nonsense"):
        list(run_sweep(points(Scenario(), ["pcpus=1"], 1), tmp_path, executor="dask:nonsense"))


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    scenario, out = tmp_path / "s.toml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    command = [sys.executable, "-m", "aiovm", "sweep", str(scenario), "--set", "pcpus=1..4", "--out", str(out)]
    # Minutes of work, of which the second sweep wants eight runs; the first two of them come first.
    wanted = {point.name for point in points(load_scenario(scenario), ["pcpus=1..4"], 2)}
    errors = interrupted([*command, "--seeds", "1000"], lambda: any((out / name).exists() for name in wanted))
    assert b"aiovm: interrupted" in errors
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    names = {path.name for path in before}
    assert names & wanted
    assert wanted - names
    subprocess.run([*command, "--seeds", "2"], check=True, capture_output=True, timeout=60)
    assert {path.name for path in out.glob("*.json")} == names | wanted
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_a_sweep_that_is_killed_leaves_no_process(tmp_path):
    scenario, out = tmp_path / "s.toml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    command = [sys.executable, "-m", "aiovm", "sweep", str(scenario), "--set", "pcpus=1..4", "--out", str(out)]
    sweep = subprocess.Popen(
        [*command, "--seeds", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while sweep.poll() is None and not list(out.glob("*.json")):
            time.sleep(0.01)
        sweep.terminate()
        sweep.communicate(timeout=60)  # the end of what all of them write to
        assert sweep.returncode == -signal.SIGTERM
    finally:
        with suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)


def test_a_fault_in_a_users_policy_is_called_his_from_a_pool_too(tmp_path):
    module = "from aiovm.policy.base import Policy\nclass Bad(Policy):\n"
    module += "    def select_pcpu(self, thread, now):\n        return 1 // 0\n"
    (tmp_path / "faulty_run.py").write_text(module)
    (tmp_path / "s.toml").write_text(SCENARIO)
    command = [sys.executable, "-m", "aiovm", "sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--set", "policy=faulty_run:Bad", "--seeds", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"aiovm: {tmp_path}/faulty_run.py, line 4: ZeroDivisionError: ")


def test_an_interrupted_table_keeps_its_rows_and_runs(tmp_path):
    rows, out = tmp_path / "rows.json", tmp_path / "out"
    command = [sys.executable, "-m", "aiovm", "paper", "--rows", "12,3", "--json", str(rows)]
    command += ["--out", str(out), "--seeds", "3"]
    errors = interrupted(command, rows.exists)
    assert b"aiovm: interrupted" in errors
    assert [row["row"] for row in json.loads(rows.read_bytes())["rows"]] == ["12"]
    assert len(stored(out)) >= 18  # six scenarios, three seeds


def test_a_table_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    command = [sys.executable, "-m", "aiovm", "paper", "--rows", "3", "--json", str(tmp_path / "none" / "rows.json")]
    done = subprocess.run(command, capture_output=True, timeout=20)
    assert done.returncode != 0
    assert b"No such directory" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_dies_ends_the_sweep_and_hangs_nobody(number, tmp_path, monkeypatch):
    """Ctrl-C reaches the pool's processes too: they die at once, where an exception could leave a lock behind."""
    module = "import multiprocessing, signal\nfrom aiovm.policy.base import Policy\n"
    module += "class Dies(Policy):\n    def __init__(self, **options):\n        super().__init__(**options)\n"
    module += f"        if multiprocessing.parent_process():\n            signal.raise_signal({number})\n"
    (tmp_path / "deadly.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    scenario = Scenario(host=HostSpec(policy="deadly:Dies"))
    with pytest.raises(EngineError, match="killed from outside"):
        list(run_jobs([(scenario, 1), (scenario, 2)]))
