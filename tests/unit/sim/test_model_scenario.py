"""Scenario files: what is accepted, and how what is wrong is named."""

import pytest

from aiovm.errors import ConfigError
from aiovm.sim.scenario import Ebizzy, LockBound, Scenario, build, load_scenario, parse_scenario, to_toml_tree

GOOD = """
name = "two"
seed = 9
duration = "20ms"
warmup = "1.5us"

[host]
pcpus = 4
policy = "gang"
slice = "3ms"
jitter = 0

[features]
ple = false
halt_poll = "0ns"

[costs]
exit_ns = 1000

[[vm]]
name = "a"
count = 2
vcpus = 3
[vm.workload]
kind = "lock-bound"
lock = "mcs"
hold = "1us"

[[vm]]
[vm.workload]
kind = "ebizzy"
"""


def test_everything_is_read():
    s = parse_scenario(GOOD)
    assert (s.name, s.seed, s.duration, s.warmup) == ("two", 9, 20_000_000, 1500)
    assert (s.host.pcpus, s.host.policy, s.host.slice, s.host.jitter) == (4, "gang", 3_000_000, 0)
    assert (s.features.ple, s.features.halt_poll, s.costs) == (False, 0, {"exit_ns": 1000})
    a, b = s.vm
    assert (a.name, a.count, a.vcpus) == ("a", 2, 3)
    assert a.workload == LockBound(lock="mcs", hold=1000)
    assert isinstance(b.workload, Ebizzy)
    assert b.vcpus == 8


def test_a_scenario_survives_being_written():
    s = parse_scenario(GOOD)
    assert build(to_toml_tree(s), "", "again") == s
    assert build(to_toml_tree(Scenario()), "", "default") == Scenario()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[host]\npcpus = 0\n", r"line 2: host\.pcpus: Expected `int` >= 1"),
        ("\n[host]\npcpu = 1\n", r"line 3: host\.pcpu: Object contains unknown field"),
        ('[host]\nslice = "6"\n', r"line 2: host\.slice: bad duration '6'"),
        ("[host]\nslice = 6\n", r"line 2: host\.slice: 6 has no unit"),
        ('[[vm]]\n[[vm]]\n[vm.workload]\nkind = "lock-bound"\nhold = "1x"\n', r"line 5: vm\[1\]\.workload\.hold: bad"),
        ('[[vm]]\n[vm.workload]\nkind = "nope"\n', r"line 3: vm\[0\]\.workload\.kind: Invalid value 'nope'"),
        ('[[vm]]\n[vm.workload]\nkind = "dbench"\nlock = "foo"\n', r"line 4: vm\[0\]\.workload\.lock"),
        ("[costs]\nexit = 1\n", r"line 2: costs\.exit: .* is not known; there are code_rate"),
        ("[costs]\nipi_ns = 5\nexit_ns = -1\n", r"line 3: costs\.exit_ns: exit_ns: -1 is not a whole number"),
        ('[host]\npolicy = "nope"\n', r"line 2: host\.policy: no policy is called 'nope'"),
        ("[host]\n[host.options]\nx = 1\n", r"line 1: host\.policy: policy 'fair' has no option 'x'"),
        ('[host]\npcpus = 2\nslice = "0ms"\n', r"line 3: host\.slice: .* below 1ns"),
        ("vm = []\n", r"line 1: vm: Expected `array` of length >= 1"),
        ('duration = "1us"\n', r"line 1: duration: .* below 1ms"),
        ("x", r"scenario: Expected '='"),
        ("seed = -1\n", r"line 1: seed"),
        ("[host]\njitter = 1000\n", r"line 2: host\.jitter"),
    ],
)
def test_mistakes_are_named_with_line_and_key(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_scenario(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_scenario(tmp_path / "none.toml")
