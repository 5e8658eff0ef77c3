"""Each example prints exactly what stands beside it, in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from linux_guests import GUESTS, HOW, may_skip

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_every_example_has_its_output():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {path.stem for path in EXAMPLES.glob("*.out")}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_output(example):
    if "AIOVM_GUESTS" in example.read_text() and may_skip():
        pytest.skip(HOW)
    done = subprocess.run(
        [sys.executable, "-W", "error", example],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "AIOVM_GUESTS": str(GUESTS)},
    )
    assert done.stderr == ""
    assert done.stdout == example.with_suffix(".out").read_text()
    assert done.returncode == 0
