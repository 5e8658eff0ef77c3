"""The I/O APIC: 24 pins to interrupt messages (Intel 82093AA data sheet; KVM's ``ioapic.c``, Linux 6.16).

Rules, from ``arch/x86/kvm/ioapic.c``:

* A pin's level is the OR of its sources. An edge pin sends at the rise; a level pin sends while it is high and its
  entry awaits no EOI (remote IRR).
* EOI of a level vector clears remote IRR, and a pin that is still high sends again. After 10 000 such repetitions in a
  row the next one waits 10 ms, so that a guest that never quiets its device still gets somewhere.
* Storing an entry keeps remote IRR and status, and clears remote IRR when the entry is now edge-triggered: guests
  flip the mode as an EOI of their own. Unmasking does not send an edge that came while masked.
* As in KVM, remote IRR is also set when nobody was addressed.

Modelled: version 0x11. Not modelled: the EOI register of later versions, the delivery-status bit (reads 0), the
APIC bus arbitration, KVM's counting of RTC interrupts that coalesced, resampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aiovm.errors import ConfigError
from aiovm.irq import IrqLine
from aiovm.lapic_message import DeliveryMode, IpiMessage, Shorthand

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IOAPIC_BASE", "IoApic", "IoApicState"]

#: Where the registers lie.
IOAPIC_BASE: Final = 0xFEC0_0000

_PINS: Final = 24
_SELECT: Final = 0x00
_WINDOW: Final = 0x10

_REG_ID: Final = 0x00
_REG_VERSION: Final = 0x01
_REG_ARBITRATION: Final = 0x02
_REG_TABLE: Final = 0x10

_VECTOR: Final = 0xFF
_LOGICAL: Final = 1 << 11
_STATUS: Final = 1 << 12
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASKED: Final = 1 << 16
_LOW_WORD: Final = 0xFFFF_FFFF

_STORM_LIMIT: Final = 10_000
_STORM_DELAY_NS: Final = 10_000_000
_MODES: Final = tuple(DeliveryMode)


@dataclass(slots=True)
class IoApicState:
    """``sources[pin]`` has a bit for each source that drives the pin high; ``irr`` are the levels latched."""

    apic_id: int = 0
    select: int = 0
    irr: int = 0
    table: list[int] = field(default_factory=lambda: [_MASKED] * _PINS)
    sources: list[int] = field(default_factory=lambda: [0] * _PINS)
    repeats: list[int] = field(default_factory=lambda: [0] * _PINS)
    retry_ns: int | None = None


class IoApic:
    """The chip. ``deliver(message)`` answers how many local APICs accepted: -1 when none was addressed.

    ``on_acknowledge(pin)``: an interrupt of the pin was retired. ``on_mask(pin, masked)``: the mask bit changed.
    ``on_routes()``: an entry was stored, so whoever keeps a digest of the table renews it.
    """

    LENGTH = 0x100
    PINS = _PINS

    def __init__(
        self,
        deliver: Callable[[IpiMessage], int],
        *,
        on_acknowledge: Callable[[int], None] | None = None,
        on_mask: Callable[[int, bool], None] | None = None,
        on_routes: Callable[[], None] | None = None,
    ) -> None:
        self._deliver = deliver
        self._on_acknowledge = on_acknowledge
        self._on_mask = on_mask
        self._on_routes = on_routes
        self._lines = [0] * _PINS
        self._s = IoApicState()

    # ---- pins ----------------------------------------------------------------------------------------------

    def new_line(self, pin: int) -> IrqLine:
        """A wire to ``pin``, one source of its own; wires to one pin are ORed."""
        if not 0 <= pin < _PINS:
            raise ConfigError(f"I/O APIC pin {pin} does not exist")
        source = self._lines[pin]
        self._lines[pin] += 1

        def sink(level: bool) -> None:
            self.set_line(pin, level, source=source)

        return IrqLine(sink)

    def set_line(self, pin: int, level: bool, *, source: int = 0) -> int:
        """One source's level. Answers as ``KVM_IRQ_LINE_STATUS``: -1 masked or nobody, 0 coalesced, else delivered."""
        s = self._s
        bit = 1 << source
        s.sources[pin] = s.sources[pin] | bit if level else s.sources[pin] & ~bit
        mask = 1 << pin
        if not s.sources[pin]:
            s.irr &= ~mask
            return 1
        was_high = s.irr & mask
        s.irr |= mask
        entry = s.table[pin]
        if entry & _REMOTE_IRR if entry & _LEVEL else was_high:
            return 0  # merges with the one that is under way
        return self._service(pin)

    def vector_of(self, pin: int) -> int:
        """The vector in the pin's entry."""
        return self._s.table[pin] & _VECTOR

    def eoi(self, vector: int, trigger_level: bool, now: int) -> None:
        """A local APIC retired ``vector``, whose TMR bit is ``trigger_level``."""
        s = self._s
        for pin, entry in enumerate(s.table):
            if entry & _VECTOR != vector:
                continue
            if self._on_acknowledge is not None:
                self._on_acknowledge(pin)
            if not trigger_level:
                continue
            s.table[pin] &= ~_REMOTE_IRR
            if entry & _MASKED or not s.irr >> pin & 1:
                s.repeats[pin] = 0
                continue
            s.repeats[pin] += 1
            if s.repeats[pin] == _STORM_LIMIT:
                s.repeats[pin] = 0
                s.retry_ns = now + _STORM_DELAY_NS
            else:
                self._service(pin)

    # ---- registers -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """IOREGSEL, IOWIN; 0 elsewhere."""
        if offset == _SELECT:
            return self._s.select
        if offset == _WINDOW:
            return self._read_indirect(self._s.select)
        return 0

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """IOREGSEL, IOWIN; ignored elsewhere."""
        if offset == _SELECT:
            self._s.select = value & 0xFF
        elif offset == _WINDOW:
            self._write_indirect(self._s.select, value & _LOW_WORD)

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When a repetition that was put off is sent."""
        return self._s.retry_ns

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        if s.retry_ns is None or now < s.retry_ns:
            return
        s.retry_ns = None
        for pin, entry in enumerate(s.table):
            if entry & _LEVEL and not entry & _REMOTE_IRR and s.irr >> pin & 1:
                self._service(pin)

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> IoApicState:
        """A copy of the state."""
        return _copy(self._s)

    def restore(self, state: IoApicState) -> None:
        """Take over a copy of ``state``."""
        self._s = _copy(state)
        if self._on_routes is not None:
            self._on_routes()

    def reset(self) -> None:
        """The power-on state, but for the levels that the wires have."""
        self.restore(IoApicState(sources=self._s.sources))

    # ---- inside --------------------------------------------------------------------------------------------

    def _read_indirect(self, register: int) -> int:
        s = self._s
        if register in (_REG_ID, _REG_ARBITRATION):
            return s.apic_id << 24
        if register == _REG_VERSION:
            return 0x0017_0011
        pin = register - _REG_TABLE >> 1
        if not 0 <= pin < _PINS:
            return _LOW_WORD
        return s.table[pin] >> (32 if register & 1 else 0) & _LOW_WORD

    def _write_indirect(self, register: int, value: int) -> None:
        s = self._s
        if register == _REG_ID:
            s.apic_id = value >> 24 & 0xF
        pin = register - _REG_TABLE >> 1
        if not 0 <= pin < _PINS:
            return
        old = s.table[pin]
        if register & 1:
            entry = old & _LOW_WORD | value << 32
        else:
            keep = _REMOTE_IRR | _STATUS
            entry = old & ~(_LOW_WORD & ~keep) | value & ~keep
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        s.table[pin] = entry
        masked = bool(entry & _MASKED)
        if self._on_mask is not None and (old ^ entry) & _MASKED:
            self._on_mask(pin, masked)
        if entry & _LEVEL and not masked and not entry & _REMOTE_IRR and s.irr >> pin & 1:
            self._service(pin)
        if self._on_routes is not None:
            self._on_routes()

    def _service(self, pin: int) -> int:
        """Send the pin's message unless it is masked or awaits its EOI."""
        s = self._s
        entry = s.table[pin]
        level = entry & _LEVEL != 0
        if entry & _MASKED or (level and entry & _REMOTE_IRR):
            return -1
        message = IpiMessage(
            entry & _VECTOR,
            _MODES[entry >> 8 & 7],
            entry & _LOGICAL != 0,
            True,
            level,
            Shorthand.NONE,
            entry >> 56,
        )
        accepted = self._deliver(message)
        if accepted and level:
            s.table[pin] |= _REMOTE_IRR
        return accepted


def _copy(state: IoApicState) -> IoApicState:
    return replace(state, table=state.table.copy(), sources=state.sources.copy(), repeats=state.repeats.copy())
