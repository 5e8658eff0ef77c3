"""The proof of the core's layout, and the paths taken with it and without."""

import pytest
from core_machine import Machine, code

from aiovm.engine.unicorn import budget, proof
from aiovm.engine.unicorn import lib as unicorn_lib
from aiovm.errors import ConfigError
from aiovm.exits import Hlt


def test_the_layout_holds_for_this_build():
    assert proof.layout_holds.__wrapped__() is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CPU_TO_ENV", proof.CPU_TO_ENV + 8),
        ("ENV_END", proof.ENV_END + 8),
        ("CONTEXT_PAYLOAD", proof.CONTEXT_PAYLOAD + 8),
        ("_PROBES", ((proof._PROBES[0][0], proof._PROBES[0][1] + 8),)),
    ],
)
def test_another_layout_is_noticed(monkeypatch, name, value):
    monkeypatch.setattr(proof, name, value)
    assert proof.layout_holds.__wrapped__() is False


def test_another_version_is_not_trusted(monkeypatch):
    monkeypatch.setattr(unicorn_lib, "VERSION", (2, 1, 5))
    assert proof.layout_holds.__wrapped__() is False


def test_without_the_proof_the_public_path_is_taken(monkeypatch):
    monkeypatch.setattr(proof, "layout_holds", lambda: False)
    m = Machine(code("b80d000000 0fa2 f4"))
    assert m.engine.pointers is False
    assert m.run() == Hlt(False)
    assert m.gpr[3] == 0x22


def test_with_the_proof_pointers_are_used():
    m = Machine()
    assert m.engine.pointers is True
    assert m.engine.native is budget.NATIVE


def test_asking_for_the_hook_that_was_not_built(monkeypatch):
    monkeypatch.setattr(budget, "_budget", None)
    with pytest.raises(ConfigError, match="not built"):
        Machine(native=True)
    assert Machine(code("f4"), native=False).run() == Hlt(False)
