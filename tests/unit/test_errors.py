"""The exception tree: whose fault it is can be told from the class alone."""

import pytest

from aiovm import errors


@pytest.mark.parametrize(
    ("name", "parents"),
    [
        ("HostError", ("AiovmError",)),
        ("ConfigError", ("HostError", "AiovmError")),
        ("StateError", ("HostError", "AiovmError")),
        ("GuestError", ("AiovmError",)),
        ("TripleFault", ("GuestError", "AiovmError")),
        ("UnhandledExit", ("GuestError", "AiovmError")),
        ("StallError", ("AiovmError",)),
        ("DeadlockError", ("StallError", "AiovmError")),
        ("LivelockError", ("StallError", "AiovmError")),
        ("TimeoutExpired", ("AiovmError",)),
        ("EngineError", ("AiovmError",)),
        ("InternalError", ("AiovmError",)),
    ],
)
def test_the_tree(name, parents):
    class_ = getattr(errors, name)
    ours = [c.__name__ for c in class_.__mro__[1:] if c.__module__ == errors.__name__]
    assert tuple(ours) == parents


def test_the_docstring_draws_every_class():
    for name in errors.__all__:
        assert name in errors.__doc__


def test_bad_values_and_bad_moments_are_pythons_own_kinds_too():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.StateError, RuntimeError)
    assert not issubclass(errors.StateError, ValueError)


def test_a_guest_error_says_who_and_where():
    error = errors.TripleFault("triple fault", vcpu=3, rip=0xFFFF_8000, history=("#8", "hlt"))
    assert str(error) == "triple fault (vCPU 3, RIP 0xffff8000); last exits: #8, hlt"
    assert (error.vcpu, error.rip, error.history) == (3, 0xFFFF_8000, ("#8", "hlt"))


def test_a_guest_error_without_history():
    error = errors.UnhandledExit("nobody answers", vcpu=0, rip=0)
    assert str(error) == "nobody answers (vCPU 0, RIP 0x0)"
    assert error.history == ()
