"""The two 8259A interrupt controllers of a PC (Intel 8259A data sheet; KVM's ``i8259.c``, Linux 6.16).

Rules, from ``arch/x86/kvm/i8259.c``:

* Edge pins latch at the rise and keep the request when the line falls; level pins (ELCR) follow the line.
* Registers are bytes: accesses of other sizes read 0 and are ignored, as in KVM.
* A request wins when its priority is strictly higher than what is in service; priorities rotate.
* The slave's output pulses the master's pin 2. An acknowledge with nothing pending gives a spurious 7 (15).

Modelled: ICW1–4, the end-of-interrupt and rotation commands, poll, special fully nested mode, automatic EOI, ELCR.
Not modelled: the special mask (stored, not applied, as in KVM), ICW3, single and buffered modes, MCS-80 calls.
Difference from KVM: ICW1 also clears the in-service register, as the chip does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.window import Window
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pic8259", "Pic8259State", "PicState"]

#: Which pins may be level-triggered: not 0, 1, 2 and not 8, 13.
_ELCR_MASKS: Final = (0xF8, 0xDE)
_CASCADE: Final = 2
_NONE: Final = 8


@dataclass(slots=True)
class PicState:
    """One chip. ``icw`` is the next initialization word expected, 0 when ready."""

    irr: int = 0
    isr: int = 0
    imr: int = 0
    last: int = 0
    elcr: int = 0
    base: int = 0
    priority_add: int = 0
    icw: int = 0
    needs_icw4: bool = False
    read_isr: bool = False
    poll: bool = False
    special_mask: bool = False
    auto_eoi: bool = False
    rotate_on_auto_eoi: bool = False
    fully_nested: bool = False


@dataclass(slots=True)
class Pic8259State:
    """Both chips, master first, and what drives each of the 16 pins."""

    chips: tuple[PicState, PicState] = field(default_factory=lambda: (PicState(), PicState()))
    sources: list[int] = field(default_factory=lambda: [0] * 16)


class Pic8259:
    """The pair. ``intr`` is the master's output; ``ports[0]`` lies at 0x20, ``ports[1]`` at 0xA0, ``elcr`` at 0x4D0.

    ``on_acknowledge(irq)``: an interrupt was retired; ``on_mask(irq, masked)``: a mask bit changed. irq is 0–15.
    """

    def __init__(
        self,
        intr: IrqLine,
        *,
        on_acknowledge: Callable[[int], None] | None = None,
        on_mask: Callable[[int, bool], None] | None = None,
    ) -> None:
        self._intr = intr
        self._on_acknowledge = on_acknowledge
        self._on_mask = on_mask
        self._lines = [0] * 16
        self._s = Pic8259State()
        self.ports = (self._window(0), self._window(1))
        self.elcr = Window(2, self._read_elcr, self._write_elcr)

    # ---- pins ----------------------------------------------------------------------------------------------

    def new_line(self, irq: int) -> IrqLine:
        """A wire to pin ``irq`` (0–15, not 2), one source of its own; wires to one pin are ORed."""
        if not 0 <= irq < 16 or irq == _CASCADE:
            raise ConfigError(f"8259 pin {irq} is not for devices")
        source = self._lines[irq]
        self._lines[irq] += 1

        def sink(level: bool) -> None:
            self.set_line(irq, level, source=source)

        return IrqLine(sink)

    def set_line(self, irq: int, level: bool, *, source: int = 0) -> int:
        """One source's level: -1 masked, 0 coalesced, 1 taken (``KVM_IRQ_LINE_STATUS``)."""
        s = self._s
        bit = 1 << source
        s.sources[irq] = s.sources[irq] | bit if level else s.sources[irq] & ~bit
        answer = self._set_pin(s.chips[irq >> 3], irq & 7, s.sources[irq] != 0)
        self._sync_irq()
        return answer

    @property
    def output(self) -> bool:
        """INTR is high."""
        return self._intr.level

    def acknowledge(self) -> int:
        """The CPU's INTA: the vector, which goes into service; a spurious one when nothing is pending."""
        master, slave = self._s.chips
        irq = self._best(0)
        if irq < 0:
            vector = master.base + 7
        else:
            self._put_in_service(0, irq)
            vector = master.base + irq
            if irq == _CASCADE:
                irq = self._best(1)
                vector = slave.base + (7 if irq < 0 else irq)
                if irq >= 0:
                    self._put_in_service(1, irq)
        self._sync_irq()
        return vector

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> Pic8259State:
        """A copy of the state."""
        return _copy(self._s)

    def restore(self, state: Pic8259State) -> None:
        """Take over a copy of ``state``."""
        self._s = _copy(state)
        self._sync_irq()

    def reset(self) -> None:
        """The power-on state, but for the levels that the wires have."""
        self.restore(Pic8259State(sources=self._s.sources))

    # ---- registers -----------------------------------------------------------------------------------------

    def _window(self, which: int) -> Window:
        return Window(
            2,
            lambda offset, size, now: self._read_chip(which, offset) if size == 1 else 0,
            lambda offset, size, value, now: self._write_chip(which, offset, value & 0xFF) if size == 1 else None,
        )

    def _read_chip(self, which: int, offset: int) -> int:
        chip = self._s.chips[which]
        if chip.poll:
            chip.poll = False
            return self._poll(which)
        if offset:
            return chip.imr
        return chip.isr if chip.read_isr else chip.irr

    def _poll(self, which: int) -> int:
        chip = self._s.chips[which]
        irq = self._best(which)
        if irq >= 0:
            if which:
                master = self._s.chips[0]
                master.isr &= ~(1 << _CASCADE)
                master.irr &= ~(1 << _CASCADE)
            chip.irr &= ~(1 << irq)
            self._retire(which, irq)
        self._sync_irq()
        return 0x07 if irq < 0 else 0x80 | irq

    def _write_chip(self, which: int, offset: int, value: int) -> None:
        chip = self._s.chips[which]
        if offset:
            self._write_data(which, value)
        elif value & 0x10:
            _initialize(chip, value)
        elif value & 0x08:
            if value & 0x04:
                chip.poll = True
            if value & 0x02:
                chip.read_isr = bool(value & 1)
            if value & 0x40:
                chip.special_mask = bool(value & 0x20)
        else:
            self._ocw2(which, value >> 5, value & 7)
        self._sync_irq()

    def _write_data(self, which: int, value: int) -> None:
        chip = self._s.chips[which]
        match chip.icw:
            case 0:
                changed = chip.imr ^ value
                chip.imr = value
                if self._on_mask is not None:
                    for pin in range(8):
                        if changed >> pin & 1:
                            self._on_mask(8 * which + pin, bool(value >> pin & 1))
            case 2:
                chip.base = value & 0xF8
                chip.icw = 3
            case 3:
                chip.icw = 4 if chip.needs_icw4 else 0
            case _:
                chip.fully_nested = bool(value & 0x10)
                chip.auto_eoi = bool(value & 0x02)
                chip.icw = 0

    def _ocw2(self, which: int, command: int, irq: int) -> None:
        """End of interrupt and rotation (data sheet, figure 8)."""
        chip = self._s.chips[which]
        match command:
            case 0 | 4:
                chip.rotate_on_auto_eoi = command == 4
            case 1 | 5:
                priority = _priority(chip, chip.isr)
                if priority == _NONE:
                    return
                irq = priority + chip.priority_add & 7
                if command == 5:
                    chip.priority_add = irq + 1 & 7
                self._retire(which, irq)
            case 3 | 7:
                if command == 7:
                    chip.priority_add = irq + 1 & 7
                self._retire(which, irq)
            case 6:
                chip.priority_add = irq + 1 & 7

    def _read_elcr(self, offset: int, size: int, now: int) -> int:
        return self._s.chips[offset].elcr if size == 1 else 0

    def _write_elcr(self, offset: int, size: int, value: int, now: int) -> None:
        if size == 1:
            self._s.chips[offset].elcr = value & _ELCR_MASKS[offset]

    # ---- inside --------------------------------------------------------------------------------------------

    @staticmethod
    def _set_pin(chip: PicState, pin: int, level: bool) -> int:
        bit = 1 << pin
        taken = 1
        if not level:
            chip.last &= ~bit
            if chip.elcr & bit:
                chip.irr &= ~bit
        else:
            if chip.elcr & bit or not chip.last & bit:
                taken = 0 if chip.irr & bit else 1
                chip.irr |= bit
            chip.last |= bit
        return -1 if chip.imr & bit else taken

    def _best(self, which: int) -> int:
        """The pin that wins now, or -1."""
        chip = self._s.chips[which]
        priority = _priority(chip, chip.irr & ~chip.imr)
        if priority == _NONE:
            return -1
        serving = chip.isr
        if chip.fully_nested and not which:
            serving &= ~(1 << _CASCADE)
        return priority + chip.priority_add & 7 if priority < _priority(chip, serving) else -1

    def _put_in_service(self, which: int, irq: int) -> None:
        chip = self._s.chips[which]
        bit = 1 << irq
        chip.isr |= bit
        if not chip.elcr & bit:
            chip.irr &= ~bit
        if chip.auto_eoi:
            if chip.rotate_on_auto_eoi:
                chip.priority_add = irq + 1 & 7
            self._retire(which, irq)

    def _retire(self, which: int, irq: int) -> None:
        self._s.chips[which].isr &= ~(1 << irq)
        if self._on_acknowledge is not None:
            self._on_acknowledge(8 * which + irq)

    def _sync_irq(self) -> None:
        if self._best(1) >= 0:
            master = self._s.chips[0]
            self._set_pin(master, _CASCADE, True)
            self._set_pin(master, _CASCADE, False)
        self._intr.set(self._best(0) >= 0)


def _priority(chip: PicState, mask: int) -> int:
    """How far the best pin of ``mask`` is from the top priority; 8 when there is none."""
    for priority in range(8):
        if mask >> (priority + chip.priority_add & 7) & 1:
            return priority
    return _NONE


def _initialize(chip: PicState, icw1: int) -> None:
    """ICW1: level requests and ELCR stay (data sheet, "Initialization Command Words")."""
    chip.last = 0
    chip.irr &= chip.elcr
    chip.isr = 0
    chip.imr = 0
    chip.priority_add = 0
    chip.special_mask = False
    chip.read_isr = False
    chip.needs_icw4 = bool(icw1 & 1)
    if not chip.needs_icw4:
        chip.fully_nested = False
        chip.auto_eoi = False
    chip.icw = 2


def _copy(state: Pic8259State) -> Pic8259State:
    master, slave = state.chips
    return Pic8259State(chips=(replace(master), replace(slave)), sources=state.sources.copy())
