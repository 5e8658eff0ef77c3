"""Registers with named fields: what reads, what fits, what a guest's store may change."""

import enum

import pytest

from aiovm.bits import Field, Register, mask, sign_extend


class Mode(enum.IntEnum):
    ONE_SHOT = 0
    PERIODIC = 1
    DEADLINE = 2


class Lvt(Register):
    """A made-up register with every kind of field."""

    reset = 0x0001_0000
    vector = Field(7, 0)
    pending = Field(12, ro=True)
    sticky = Field(13, w1c=True)
    masked = Field(16, kind=bool)
    mode = Field(18, 17, kind=Mode)


@pytest.mark.parametrize(("width", "value"), [(0, 0), (1, 1), (8, 0xFF), (64, 0xFFFF_FFFF_FFFF_FFFF)])
def test_mask(width, value):
    assert mask(width) == value


@pytest.mark.parametrize(
    ("value", "bits", "expected"),
    [
        (0x7F, 8, 127),
        (0x80, 8, -128),
        (0xFF, 8, -1),
        (0x1FF, 8, -1),
        (0x8000_0000, 32, -(1 << 31)),
        (0, 1, 0),
        (1, 1, -1),
    ],
)
def test_sign_extend(value, bits, expected):
    assert sign_extend(value, bits) == expected


def test_reset_value_is_the_default():
    assert Lvt() == 0x10000
    assert Lvt(0) == 0
    assert Register() == 0


def test_fields_read_typed():
    r = Lvt(0x0005_30EF)
    assert r.vector == 0xEF
    assert r.pending == 1
    assert r.sticky == 1
    assert r.masked is True
    assert r.mode is Mode.DEADLINE


def test_a_field_knows_its_place():
    assert Lvt.mode.mask == 0x6_0000
    assert Lvt.masked.mask == 0x1_0000
    assert (Lvt.vector.name, Lvt.vector.high, Lvt.vector.low) == ("vector", 7, 0)


def test_replace_makes_a_new_value():
    r = Lvt()
    s = r.replace(vector=0x31, masked=False, mode=Mode.PERIODIC)
    assert s == 0x2_0031
    assert type(s) is Lvt
    assert r == 0x10000


@pytest.mark.parametrize("fields", [{"vector": 0x100}, {"vector": -1}, {"masked": 2}, {"mode": 4}])
def test_replace_refuses_what_does_not_fit(fields):
    with pytest.raises(ValueError, match="does not fit"):
        Lvt().replace(**fields)


def test_replace_refuses_unknown_fields():
    with pytest.raises(ValueError, match="Lvt has no field colour"):
        Lvt().replace(colour=1)


def test_a_store_keeps_unnamed_and_read_only_bits():
    r = Lvt(0x8000_1000)  # bit 31 unnamed, bit 12 read-only
    assert r.stored(0) == 0x8000_1000
    assert r.stored(0xFFFF_FFFF) == 0x8007_10FF  # 12 and 31 keep, 13 stays clear


def test_a_store_clears_write_one_to_clear_bits():
    r = Lvt(0x2000)
    assert r.stored(0x2000) == 0
    assert r.stored(0) == 0x2000


def test_repr_shows_the_fields():
    assert repr(Lvt(0x1_0020)) == ("Lvt(0x10020: vector=32, pending=0, sticky=0, masked=True, mode=<Mode.ONE_SHOT: 0>)")
