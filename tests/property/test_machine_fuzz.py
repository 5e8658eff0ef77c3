"""Hostile guests from fixed seeds: nothing escapes, nothing beside the slots is written, every run ends, and again."""

import pytest
from machine_fuzz import play

_CASES, _PER_TEST = 80, 20


@pytest.mark.parametrize("first", range(0, _CASES, _PER_TEST))
def test_hostile_guests_break_nothing(first):
    for seed in range(first, first + _PER_TEST):
        played = play(seed)
        assert played.now <= 400_000


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_the_same_seed_leaves_the_same_trace_registers_and_memory(seed):
    """Also through the Python twin of the block hook."""
    assert play(seed) == play(seed) == play(seed, native=False)
