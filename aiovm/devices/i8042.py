"""The 8042 keyboard controller, without a keyboard: reset, A20 and its self-test (IBM PC/AT technical reference).

Ports 0x60 (data) and 0x64 (status, command). Output-port bit 0 low, and pulse commands that name it, call ``reset()``;
bit 1 is A20, told to ``a20(enabled)`` when it changes.

Modelled: command byte, output port, self-tests, pulse, interrupt 1 for answers when the command byte asks for it.
Not modelled: keyboard and mouse: bytes sent to them are swallowed and never answered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiovm.devices.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine

__all__ = ["I8042", "I8042State"]

_OUTPUT_FULL: Final = 0x01
_SYSTEM: Final = 0x04
_IS_COMMAND: Final = 0x08
_NOT_LOCKED: Final = 0x10

_A20: Final = 0x02
_NOT_RESET: Final = 0x01
_OUTPUT_IRQ: Final = 0x01
#: Answers by command: self-test, keyboard and mouse interface tests (1: no device), input port.
_ANSWERS: Final = {0xAA: 0x55, 0xAB: 0x01, 0xA9: 0x01, 0xC0: 0x80}


@dataclass(slots=True)
class I8042State:
    """``command``: the command whose data byte is awaited, or 0. ``answer``: the output buffer, None when empty."""

    command: int = 0
    command_byte: int = 0
    output_port: int = _A20 | _NOT_RESET
    last_was_command: bool = False
    self_tested: bool = False
    answer: int | None = None


class I8042:
    """The controller: :attr:`data` lies at 0x60, :attr:`control` at 0x64."""

    def __init__(self, irq: IrqLine, reset: Callable[[], None], a20: Callable[[bool], None]) -> None:
        self._irq = irq
        self._reset = reset
        self._a20 = a20
        self._s = I8042State()
        self.data = Window(1, self._read_data, self._write_data)
        self.control = Window(1, self._read_status, self._write_command)

    def save(self) -> I8042State:
        """A copy of the state."""
        return replace(self._s)

    def restore(self, state: I8042State) -> None:
        """Take over a copy of ``state``."""
        before = self._s.output_port
        self._s = replace(state)
        if (before ^ state.output_port) & _A20:
            self._a20(bool(state.output_port & _A20))
        self._sync_irq()

    def reset(self) -> None:
        """The power-on state."""
        self.restore(I8042State())

    def _read_data(self, offset: int, size: int, now: int) -> int:
        byte, self._s.answer = self._s.answer, None
        self._sync_irq()
        return byte or 0

    def _read_status(self, offset: int, size: int, now: int) -> int:
        s = self._s
        return (
            _NOT_LOCKED
            | (_OUTPUT_FULL if s.answer is not None else 0)
            | (_SYSTEM if s.self_tested else 0)
            | (_IS_COMMAND if s.last_was_command else 0)
        )

    def _write_data(self, offset: int, size: int, value: int, now: int) -> None:
        s = self._s
        command, s.command = s.command, 0
        s.last_was_command = False
        if command == 0x60:
            s.command_byte = value & 0xFF
        elif command == 0xD1:
            self._set_output_port(value & 0xFF)
        elif command == 0xD2:
            s.answer = value & 0xFF
        self._sync_irq()

    def _write_command(self, offset: int, size: int, value: int, now: int) -> None:
        s = self._s
        value &= 0xFF
        s.command = 0
        s.last_was_command = True
        match value:
            case 0x20:
                s.answer = s.command_byte
            case 0x60 | 0xD1 | 0xD2 | 0xD4:
                s.command = value
            case 0xD0:
                s.answer = s.output_port
            case 0xDD | 0xDF:
                self._set_output_port(s.output_port & ~_A20 | value & _A20)
            case 0xAA | 0xAB | 0xA9 | 0xC0:
                s.self_tested |= value == 0xAA
                s.answer = _ANSWERS[value]
            case _ if value >= 0xF0 and not value & _NOT_RESET:
                self._reset()
        self._sync_irq()

    def _set_output_port(self, value: int) -> None:
        before = self._s.output_port
        self._s.output_port = value | _NOT_RESET
        if (before ^ value) & _A20:
            self._a20(bool(value & _A20))
        if not value & _NOT_RESET:
            self._reset()

    def _sync_irq(self) -> None:
        self._irq.set(self._s.answer is not None and bool(self._s.command_byte & _OUTPUT_IRQ))
