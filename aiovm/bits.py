"""Registers as values with named fields.

A :class:`Register` is an immutable ``int``. A :class:`Field` reads its bits, typed; ``replace`` makes a new
value and refuses what does not fit; ``stored`` applies a guest's store, which keeps read-only and reserved
bits and clears write-1-to-clear bits. Bit numbers are written high, low, as the manuals do.

A field read costs about a microsecond, so what is read on a hot path is kept decoded beside the register by
its owner. ``Any`` is explicit here and nowhere else below floor 5: a field's type is its own business.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self, TypeVar, overload

__all__ = ["Field", "Register", "mask", "sign_extend"]

T = TypeVar("T")


def mask(width: int) -> int:
    """The low ``width`` bits set."""
    return (1 << width) - 1


def sign_extend(value: int, bits: int) -> int:
    """``value``'s low ``bits`` bits read as two's complement."""
    sign = 1 << (bits - 1)
    return ((value & mask(bits)) ^ sign) - sign


class Field(Generic[T]):
    """Bits ``high`` down to ``low`` of a register, read as ``kind``.

    ``ro``: a guest's store leaves them. ``w1c``: a guest's store of 1 clears them.
    """

    __slots__ = ("high", "kind", "low", "name", "ro", "w1c")

    @overload
    def __init__(self: Field[int], high: int, low: int | None = None, *, ro: bool = ..., w1c: bool = ...) -> None: ...
    @overload
    def __init__(
        self, high: int, low: int | None = None, *, kind: type[T], ro: bool = ..., w1c: bool = ...
    ) -> None: ...
    def __init__(
        self, high: int, low: int | None = None, *, kind: Any = int, ro: bool = False, w1c: bool = False
    ) -> None:
        self.high = high
        self.low = high if low is None else low
        self.kind = kind
        self.ro = ro
        self.w1c = w1c
        self.name = "?"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return mask(self.high - self.low + 1) << self.low

    @overload
    def __get__(self, register: None, owner: type) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type) -> T: ...
    def __get__(self, register: Register | None, owner: type) -> Self | T:
        if register is None:
            return self
        value: T = self.kind((int(register) & self.mask) >> self.low)
        return value


class Register(int):
    """An integer with named fields; subclasses list them as :class:`Field` and may set ``reset``."""

    __slots__ = ()

    reset: ClassVar[int] = 0
    _fields: ClassVar[tuple[Field[Any], ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(f for f in vars(cls).values() if isinstance(f, Field))

    def __new__(cls, value: int | None = None) -> Self:
        return super().__new__(cls, cls.reset if value is None else value)

    def replace(self, **fields: int) -> Self:
        """A copy with the named fields set; ``ValueError`` when a value does not fit or a name is unknown."""
        value = int(self)
        known = {f.name: f for f in self._fields}
        for name, new in fields.items():
            field = known.get(name)
            if field is None:
                raise ValueError(f"{type(self).__name__} has no field {name}")
            if not 0 <= int(new) <= field.mask >> field.low:
                raise ValueError(f"{type(self).__name__}.{name}: {int(new):#x} does not fit")
            value = value & ~field.mask | int(new) << field.low
        return type(self)(value)

    def stored(self, raw: int) -> Self:
        """The value after a guest stores ``raw``: unnamed and read-only bits keep, ``w1c`` bits clear."""
        value = int(self)
        for field in self._fields:
            if field.w1c:
                value &= ~(raw & field.mask)
            elif not field.ro:
                value = value & ~field.mask | raw & field.mask
        return type(self)(value)

    def __repr__(self) -> str:
        parts = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in self._fields)
        return f"{type(self).__name__}({int(self):#x}: {parts})"
