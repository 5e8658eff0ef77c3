"""Exits are values, with KVM's numbers where KVM has some."""

import dataclasses
import typing

import pytest

from aiovm import exits
from aiovm.exits import BUDGET, Budget, Exit, ExitReason, Hlt, Hypercall, Mmio, Pio


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("UNKNOWN", 0),
        ("EXCEPTION", 1),
        ("IO", 2),
        ("HYPERCALL", 3),
        ("DEBUG", 4),
        ("HLT", 5),
        ("MMIO", 6),
        ("IRQ_WINDOW_OPEN", 7),
        ("SHUTDOWN", 8),
        ("FAIL_ENTRY", 9),
        ("INTR", 10),
        ("SET_TPR", 11),
        ("TPR_ACCESS", 12),
        ("NMI", 16),
        ("INTERNAL_ERROR", 17),
        ("SYSTEM_EVENT", 24),
        ("IOAPIC_EOI", 26),
        ("X86_RDMSR", 29),
        ("X86_WRMSR", 30),
    ],
)
def test_numbers_are_kvms(name, number):
    assert ExitReason[name] == number


def test_our_own_reasons_stay_clear_of_kvms():
    ours = [r for r in ExitReason if r > 30]
    assert min(ours) == 256
    assert len(set(ExitReason)) == len(ExitReason.__members__)


def test_every_exit_is_a_frozen_value():
    classes = typing.get_args(Exit)
    assert {c.__name__ for c in classes} == set(exits.__all__) - {"BUDGET", "Exit", "ExitReason"}
    for class_ in classes:
        assert dataclasses.is_dataclass(class_)
        assert class_.__dataclass_params__.frozen
        assert not hasattr(class_, "__dict__") or "__slots__" in vars(class_)


def test_equal_exits_are_equal():
    assert Hlt(True) == Hlt(interrupts_enabled=True) != Hlt(False)
    assert Pio(0x3F8, 1, True, b"A") == Pio(0x3F8, 1, is_write=True, data=b"A", count=1)
    assert Budget() == BUDGET
    assert hash(Mmio(0xFEE0_0000, 4, False, b"\0\0\0\0")) == hash(Mmio(0xFEE0_0000, 4, False, b"\0\0\0\0"))


def test_an_exit_cannot_be_changed():
    exit_ = Hypercall(5, (0, 1, 0, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        exit_.number = 6
