"""The 16550A serial port, eight byte registers (National Semiconductor PC16550D data sheet, June 1995).

Rules: the interrupt with the highest priority shows in IIR: line status, received data or character timeout,
transmitter empty, modem status. The transmitter-empty interrupt is an event: it is raised when the transmitter runs
empty or its enable bit rises, and goes when IIR shows it to the guest or a byte is written.

Host side: a byte goes to ``sink(byte)``; False means "not now", the byte stays in the transmit FIFO, and
:meth:`Uart16550.drain` tries again. :meth:`Uart16550.feed` takes as many bytes as the receiver has room for and says
how many; ``on_room`` is called whenever the guest has made room, loopback's end included.

Modelled: divisor latch, FIFO mode with its trigger levels and timeout, break, loopback, modem lines and their
changes. Not modelled: the line's speed (a byte is sent in no time), parity and framing errors, DMA pins, OUT2 as the
gate of the interrupt line. A receiver overrun happens in loopback only, since the host side waits for room.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiovm.irq import IrqLine

__all__ = ["Fcr", "Ier", "Iir", "Lsr", "Mcr", "Msr", "Uart16550", "Uart16550State"]

_FIFO_BYTES = 16
_TRIGGERS = (1, 4, 8, 14)
#: A received character is a byte, with its error bits (LSR positions) eight bits up.
_ERRORS_SHIFT = 8
#: Divisor 1 is 115200 baud: a 1.8432 MHz clock over 16.
_BAUD_BASE = 115_200
_DLAB = 0x80

# The registers' bits are plain integers: a kernel's console polls and writes tens of thousands of them, and arithmetic
# on enum.IntFlag costs a microsecond an operation.


class Ier:
    """Interrupt enable, register 1."""

    RECEIVED: Final = 1
    TRANSMITTER_EMPTY: Final = 2
    LINE_STATUS: Final = 4
    MODEM_STATUS: Final = 8


class Iir:
    """Interrupt identification, register 2 (data sheet, table IV)."""

    MODEM_STATUS: Final = 0x0
    NONE: Final = 0x1
    TRANSMITTER_EMPTY: Final = 0x2
    RECEIVED: Final = 0x4
    LINE_STATUS: Final = 0x6
    TIMEOUT: Final = 0xC


class Fcr:
    """FIFO control, register 2."""

    ENABLE: Final = 1
    CLEAR_RECEIVER: Final = 2
    CLEAR_TRANSMITTER: Final = 4


class Mcr:
    """Modem control, register 4."""

    DTR: Final = 1
    RTS: Final = 2
    OUT1: Final = 4
    OUT2: Final = 8
    LOOP: Final = 16


class Lsr:
    """Line status, register 5."""

    DATA_READY: Final = 0x01
    OVERRUN: Final = 0x02
    BREAK: Final = 0x10
    THR_EMPTY: Final = 0x20
    TRANSMITTER_EMPTY: Final = 0x40
    FIFO_ERROR: Final = 0x80


class Msr:
    """Modem status, register 6: the lines; four bits below each of them is "it changed" (RI: "it ended")."""

    CTS: Final = 0x10
    DSR: Final = 0x20
    RI: Final = 0x40
    DCD: Final = 0x80


@dataclass(slots=True)
class Uart16550State:
    """The port. ``modem`` are the lines as the host drives them, ``deltas`` MSR's low four bits."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scratch: int = 0
    divisor: int = 12
    modem: int = Msr.CTS | Msr.DSR | Msr.DCD
    deltas: int = 0
    overrun: bool = False
    empty_event: bool = False
    received: list[int] = field(default_factory=list)
    sending: list[int] = field(default_factory=list)
    timeout_ns: int | None = None
    timed_out: bool = False


class Uart16550:
    """One serial port."""

    LENGTH = 8

    def __init__(self, irq: IrqLine, sink: Callable[[int], bool], *, on_room: Callable[[], None] | None = None) -> None:
        self._irq = irq
        self._sink = sink
        self._on_room = on_room
        self._s = Uart16550State()

    # ---- guest side ----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, now: int) -> int:
        """The byte registers from ``offset`` on."""
        if size > 1:
            return sum(self.read(offset + i, 1, now) << (8 * i) for i in range(size))
        s = self._s
        match offset:
            case 0 | 1 if s.lcr & _DLAB:
                return s.divisor >> (8 * offset) & 0xFF
            case 0:
                return self._read_rbr(now)
            case 1:
                return s.ier
            case 2:
                source = self._source()
                if source == Iir.TRANSMITTER_EMPTY:
                    s.empty_event = False
                    self._sync_irq()
                return source | (0xC0 if s.fcr & Fcr.ENABLE else 0)
            case 3:
                return s.lcr
            case 4:
                return s.mcr
            case 5:
                status = self._line_status()
                s.overrun = False
                if s.received:
                    s.received[0] &= 0xFF
                self._sync_irq()
                return status
            case 6:
                status = self._modem_lines() | s.deltas
                s.deltas = 0
                self._sync_irq()
                return status
            case 7:
                return s.scratch
        return 0xFF

    def write(self, offset: int, size: int, value: int, now: int) -> None:
        """The byte registers from ``offset`` on."""
        if size > 1:
            for i in range(size):
                self.write(offset + i, 1, value >> (8 * i), now)
            return
        s = self._s
        value &= 0xFF
        match offset:
            case 0 if s.lcr & _DLAB:
                s.divisor = s.divisor & 0xFF00 | value
            case 1 if s.lcr & _DLAB:
                s.divisor = s.divisor & 0xFF | value << 8
            case 0:
                self._write_thr(value, now)
            case 1:
                if value & ~s.ier & Ier.TRANSMITTER_EMPTY and not s.sending:
                    s.empty_event = True
                s.ier = value & 0xF
            case 2:
                self._write_fcr(value, now)
            case 3:
                s.lcr = value
            case 4:
                before = self._modem_lines()
                reconnected = s.mcr & ~value & Mcr.LOOP
                s.mcr = value & 0x1F
                self._note_modem(before)
                if reconnected and self._on_room is not None:
                    self._on_room()
            case 7:
                s.scratch = value
        self._sync_irq()

    # ---- time ----------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When the character timeout comes."""
        return self._s.timeout_ns

    def advance(self, now: int) -> None:
        """Let time pass to ``now``."""
        s = self._s
        if s.timeout_ns is not None and now >= s.timeout_ns:
            s.timeout_ns = None
            s.timed_out = True
            self._sync_irq()

    # ---- host side -----------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many bytes the receiver can take now (none in loopback: the line is cut)."""
        s = self._s
        if s.mcr & Mcr.LOOP:
            return 0
        return max(self._capacity() - len(s.received), 0)

    @property
    def empty(self) -> bool:
        """Whether the guest has read all."""
        return not self._s.received

    def feed(self, data: bytes, now: int) -> int:
        """Receive bytes from the line; how many of them were taken."""
        taken = data[: self.room]
        if taken:
            self._s.received.extend(taken)
            self._restart_timeout(now)
            self._sync_irq()
        return len(taken)

    def feed_break(self, now: int) -> bool:
        """Receive a break; False when there is no room."""
        if not self.room:
            return False
        self._s.received.append(Lsr.BREAK << _ERRORS_SHIFT)
        self._restart_timeout(now)
        self._sync_irq()
        return True

    def drain(self) -> None:
        """Offer what waits in the transmitter to the sink again."""
        self._send()
        self._sync_irq()

    def set_modem(self, lines: int) -> None:
        """Drive CTS, DSR, RI and DCD."""
        before = self._modem_lines()
        self._s.modem = lines
        self._note_modem(before)
        self._sync_irq()

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> Uart16550State:
        """A copy of the state."""
        return replace(self._s, received=self._s.received.copy(), sending=self._s.sending.copy())

    def restore(self, state: Uart16550State) -> None:
        """Take over a copy of ``state``."""
        self._s = replace(state, received=state.received.copy(), sending=state.sending.copy())
        self._sync_irq()

    def reset(self) -> None:
        """Master reset."""
        self.restore(Uart16550State())

    # ---- inside --------------------------------------------------------------------------------------------

    def _capacity(self) -> int:
        return _FIFO_BYTES if self._s.fcr & Fcr.ENABLE else 1

    def _read_rbr(self, now: int) -> int:
        s = self._s
        if not s.received:
            return 0
        byte = s.received.pop(0) & 0xFF
        self._restart_timeout(now)
        self._sync_irq()
        if self._on_room is not None:
            self._on_room()
        return byte

    def _write_thr(self, byte: int, now: int) -> None:
        s = self._s
        s.empty_event = False
        if s.mcr & Mcr.LOOP:
            if len(s.received) < self._capacity():
                s.received.append(byte)
                self._restart_timeout(now)
            else:
                s.overrun = True
            s.empty_event = True
            return
        if len(s.sending) >= self._capacity():
            s.sending.pop()  # a full transmitter's last byte is overwritten
        s.sending.append(byte)
        self._send()

    def _send(self) -> None:
        sending = self._s.sending
        was_empty = not sending
        while sending and self._sink(sending[0]):
            sending.pop(0)
        if not was_empty and not sending:
            self._s.empty_event = True

    def _write_fcr(self, value: int, now: int) -> None:
        s = self._s
        if (s.fcr ^ value) & Fcr.ENABLE:
            value |= Fcr.CLEAR_RECEIVER | Fcr.CLEAR_TRANSMITTER
        s.fcr = value & 0xC9 if value & Fcr.ENABLE else 0
        if value & Fcr.CLEAR_RECEIVER:
            s.received.clear()
            self._restart_timeout(now)
            if self._on_room is not None:
                self._on_room()
        if value & Fcr.CLEAR_TRANSMITTER and s.sending:
            s.sending.clear()
            s.empty_event = True

    def _restart_timeout(self, now: int) -> None:
        """Four character times without a byte coming or going raise the timeout (FIFO mode)."""
        s = self._s
        s.timed_out = False
        s.timeout_ns = None
        if s.received and s.fcr & Fcr.ENABLE:
            bits = 1 + 5 + (s.lcr & 3) + (s.lcr >> 3 & 1) + 1 + (s.lcr >> 2 & 1)
            s.timeout_ns = now + 4 * bits * max(s.divisor, 1) * 1_000_000_000 // _BAUD_BASE

    def _line_status(self) -> int:
        s = self._s
        status = 0
        if s.received:
            status |= Lsr.DATA_READY | s.received[0] >> _ERRORS_SHIFT
            if s.fcr & Fcr.ENABLE and any(char >> _ERRORS_SHIFT for char in s.received):
                status |= Lsr.FIFO_ERROR
        if s.overrun:
            status |= Lsr.OVERRUN
        if not s.sending:
            status |= Lsr.THR_EMPTY | Lsr.TRANSMITTER_EMPTY
        return status

    def _modem_lines(self) -> int:
        mcr = self._s.mcr
        if not mcr & Mcr.LOOP:
            return self._s.modem
        # Loopback: RTS, DTR, OUT1 and OUT2 come back as CTS, DSR, RI and DCD.
        return (mcr & Mcr.RTS) << 3 | (mcr & Mcr.DTR) << 5 | (mcr & Mcr.OUT1) << 4 | (mcr & Mcr.OUT2) << 4

    def _note_modem(self, before: int) -> None:
        after = self._modem_lines()
        changed = (before ^ after) & (Msr.CTS | Msr.DSR | Msr.DCD) | before & ~after & Msr.RI
        self._s.deltas |= changed >> 4

    def _source(self) -> int:
        s = self._s
        if not s.ier:
            return Iir.NONE
        if s.ier & Ier.LINE_STATUS and (s.overrun or (s.received and s.received[0] >> _ERRORS_SHIFT)):
            return Iir.LINE_STATUS
        if s.ier & Ier.RECEIVED and s.received:
            trigger = _TRIGGERS[s.fcr >> 6] if s.fcr & Fcr.ENABLE else 1
            if len(s.received) >= trigger:
                return Iir.RECEIVED
            if s.timed_out:
                return Iir.TIMEOUT
        if s.ier & Ier.TRANSMITTER_EMPTY and s.empty_event:
            return Iir.TRANSMITTER_EMPTY
        if s.ier & Ier.MODEM_STATUS and s.deltas:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _sync_irq(self) -> None:
        self._irq.set(self._source() != Iir.NONE)
