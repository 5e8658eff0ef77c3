"""What ``make guests`` leaves, for the tests that need it: without it CI fails, and others skip."""

import os
from pathlib import Path

import pytest

GUESTS = Path(os.environ.get("AIOVM_GUESTS") or Path(__file__).parents[1] / "out" / "guests")
HOW = f"{GUESTS} has no guests: run make guests"


def may_skip(name="initrd.gz"):
    """Whether ``name`` is missing, and that is no failure here."""
    return not (GUESTS / name).exists() and not os.environ.get("CI")


def needs(name="initrd.gz"):
    """The mark of a test that cannot do without ``name``."""
    return pytest.mark.skipif(may_skip(name), reason=HOW)
