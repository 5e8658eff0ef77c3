"""The tour's programs and commands print what stands below them."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from aiovm.costs import Costs
from aiovm.errors import ConfigError
from aiovm.policy import POLICIES
from aiovm.sim.scenario import load_scenario, parse_scenario

ROOT = Path(__file__).parent.parent
TOUR = (ROOT / "docs" / "tour.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", TOUR, re.DOTALL)
SESSIONS = re.findall(r"```console\n(.*?)```", TOUR, re.DOTALL)


def test_the_tour_has_something_to_run():
    assert len(PROGRAMS) == TOUR.count("```python")
    assert PROGRAMS
    assert SESSIONS


@pytest.mark.parametrize(("program", "output"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_program(program, output):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == output


@pytest.mark.parametrize("session", SESSIONS, ids=range(len(SESSIONS)))
def test_session(session):
    commands = [line[2:] for line in session.splitlines() if line.startswith("$ ")]
    output = "".join(line + "\n" for line in session.splitlines() if not line.startswith("$ "))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", "\n".join(commands)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
    )
    assert done.stdout + done.stderr == output


def test_the_laboratorys_page_shows_its_example():
    text = (ROOT / "docs" / "laboratory.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert parse_scenario(shown) == load_scenario(ROOT / "examples" / "laboratory.toml")
    (error,) = re.findall(r"^    (scenario.toml: .*)$", text, re.MULTILINE)
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}$"):
        parse_scenario(shown.replace("pcpus = 8", "pcpus = 0"), name="scenario.toml")


def test_the_timing_model_has_every_cost_with_its_default():
    text = (ROOT / "docs" / "timing-model.md").read_text()
    rows = dict(re.findall(r"^\|[^|]+\| `(\w+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert rows == {field.name: f"{field.default:,}" for field in fields(Costs)}


def test_every_policy_is_explained():
    text = (ROOT / "docs" / "directed-yield.md").read_text()
    named = {
        name for row in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for name in re.findall("`([^`]+)`", row)
    }
    assert named - {"module:Class"} == set(POLICIES)


def test_what_shows_a_claim_exists():
    text = (ROOT / "docs" / "claims.md").read_text()
    tests = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", text)
    assert tests
    for path, name in tests:
        assert (ROOT / path).exists(), path
        assert not name or re.search(rf"def {name}\b", (ROOT / path).read_text()), name
    targets = re.findall(r"`make (\w+)`", text)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    named = [name for words in re.findall(r"`python -m benchmarks ([^`]+)`", text) for name in words.split()]
    assert named
    assert set(named) <= benchmarks


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
