"""The PC around the CPUs: which chips there are, at which addresses, and whose wire ends where.

====================  ==========================================================================
ports 0x20, 0xA0      8259 pair; ELCR at 0x4D0
ports 0x40, 0x61      8254, speaker
ports 0x60, 0x64      8042 (no keyboard)
ports 0x70            clock and CMOS
port 0x92, 0xCF9      fast reset, reset control
ports 0x3F8           serial port 1, interrupt 4
ports 0x510           fw_cfg
ports 0x600           ACPI: PM1 event and control, PM timer; SCI is interrupt 9
ports 0xE0, 0x2000    pc-testdev (and memory at 0xFF000000)
memory 0xFEC00000     I/O APIC
memory 0xFED00000     HPET
====================  ==========================================================================

A *GSI* is an interrupt number: a pin of the I/O APIC, and below 16 one of the 8259 pair as well. GSI 0 is pin 2 of the
I/O APIC, GSI 2 is not an 8259 pin (QEMU's ``kvm_pc_setup_irq_routing``). The 8259's output is LINT0 of the CPUs that
take it as ExtINT.

Rules: chips never wait and never look at the clock; a chip with a deadline is armed on the machine's clock after each
access. An interrupt message leaves at the present moment through the machine's clock, so that from inside a slice it
reaches other CPUs in order. Power-off and reset end the machine.

Source: Intel PIIX/ICH data sheets for addresses; QEMU's ``hw/i386/pc.c`` for what guests expect. Not modelled: A20 (the
line is always on), PCI, a display, a keyboard, disks; parallel port, second serial port.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiovm.acpi import PM_BASE, RESET_PORT, S5_TYPE, SCI
from aiovm.devices.acpi_pm import AcpiPm, AcpiPmState
from aiovm.devices.cmos_rtc import CmosRtc, CmosRtcState
from aiovm.devices.fw_cfg import FwCfg, FwCfgState
from aiovm.devices.hpet import HPET_BASE, Hpet, HpetState
from aiovm.devices.i8042 import I8042, I8042State
from aiovm.devices.ioapic import IOAPIC_BASE, IoApic, IoApicState
from aiovm.devices.pc_testdev import PcTestdev, PcTestdevState
from aiovm.devices.pic8259 import Pic8259, Pic8259State
from aiovm.devices.pit8254 import Pit8254, Pit8254State
from aiovm.devices.port92 import Port92, Port92State
from aiovm.devices.reset_control import ResetControl, ResetControlState
from aiovm.devices.uart16550 import Uart16550, Uart16550State
from aiovm.devices.window import Window
from aiovm.errors import ConfigError
from aiovm.irq import IrqLine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiovm.bus import Bus, Device
    from aiovm.clock import Clock, Timer
    from aiovm.lapic_message import IpiMessage
    from aiovm.memory import GuestMemory
    from aiovm.vcpu import Vcpu

__all__ = ["Pc", "PcState"]

_MIB = 1 << 20
_TIMER_GSI, _TIMER_PIN = 0, 2
_TESTDEV_MEMORY = 0xFF00_0000


class _Timed(Protocol):
    """A chip with deadlines."""

    def next_deadline(self) -> int | None: ...
    def advance(self, now: int) -> object: ...


class _Board(Protocol):
    """What the platform needs of its machine."""

    memory: GuestMemory
    ports: Bus
    mmio: Bus
    ram_size: int

    @property
    def clock(self) -> Clock: ...
    @property
    def vcpus(self) -> Sequence[Vcpu]: ...
    def call_at(self, deadline: int, callback: Callable[[], object]) -> Timer: ...
    def post(self, deadline: int, callback: Callable[[], object]) -> None: ...
    def deliver_message(self, message: IpiMessage) -> int: ...
    def end(self, reason: str, status: int) -> None: ...


class _Alarm:
    """One chip's deadline on the machine's clock."""

    __slots__ = ("_board", "_chip", "_timer")

    def __init__(self, board: _Board, chip: _Timed) -> None:
        self._board = board
        self._chip = chip
        self._timer: Timer | None = None

    def arm(self) -> None:
        """The chip was touched: its next deadline may be another."""
        deadline = self._chip.next_deadline()
        timer = self._timer
        if timer is not None:
            if timer.deadline == deadline:
                return
            timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._board.call_at(deadline, self._ring)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def rearm(self) -> None:
        """The same deadline, behind those that were armed before now."""
        self.disarm()
        self.arm()

    def _ring(self) -> None:
        self._timer = None
        self._chip.advance(self._board.clock.now())
        self.arm()


@dataclass(frozen=True, slots=True)
class PcState:
    """Every chip, and the levels of all wires in the order in which they were laid."""

    pic: Pic8259State
    ioapic: IoApicState
    pit: Pit8254State
    rtc: CmosRtcState
    hpet: HpetState
    serial: Uart16550State
    acpi_pm: AcpiPmState
    i8042: I8042State
    port92: Port92State
    reset_control: ResetControlState
    fw_cfg: FwCfgState
    testdev: PcTestdevState
    wires: list[bool]


class Pc:
    """The chips of ``board``. ``sink``, ``on_room``: the first serial port's other end."""

    def __init__(
        self,
        board: _Board,
        *,
        sink: Callable[[int], bool],
        on_room: Callable[[], None],
    ) -> None:
        self._board = board
        self._wires: list[IrqLine] = []
        #: Saved levels of wires that the program laid, for when it lays them again.
        self._relaid: deque[bool] = deque()
        self.pic = Pic8259(
            self._wire(IrqLine(self._intr)),
            on_acknowledge=self._isa_acknowledged,
            on_mask=self._timer_masked(_TIMER_GSI),
        )
        self.ioapic = IoApic(
            board.deliver_message,
            on_acknowledge=self._pin_acknowledged,
            on_mask=self._timer_masked(_TIMER_PIN),
            on_routes=self._routes_changed,
        )
        self._hpet_replaces = False
        self.pit = Pit8254(self._replaceable(_TIMER_GSI), reinject=True, on_tick=self._tick)
        self.rtc = CmosRtc(self._replaceable(8), boot_wall_ns=board.clock.epoch_ns, nvram=_nvram(board))
        self.hpet = Hpet([self.new_line(gsi) for gsi in range(IoApic.PINS)], on_legacy=self._set_hpet_replaces)
        self.serial = Uart16550(self.new_line(4), sink, on_room=on_room)
        self.acpi_pm = AcpiPm(self.new_line(SCI), self._power_off, s5_type=S5_TYPE)
        self.i8042 = I8042(self.new_line(1), self._reset, _ignore_a20)
        self.port92 = Port92(self._reset, _ignore_a20)
        self.reset_control = ResetControl(self._reset)
        self.fw_cfg = FwCfg(cpus=len(board.vcpus), ram_bytes=board.ram_size, memory=board.memory)
        self.testdev = PcTestdev([self.new_line(gsi) for gsi in range(IoApic.PINS)])
        self._alarms: dict[_Timed, _Alarm] = {}
        self._register()

    def _register(self) -> None:
        ports, mmio = self._board.ports, self._board.mmio
        for base, window in zip((0x20, 0xA0), self.pic.ports, strict=True):
            ports.register(base, window.length, window)
        ports.register(0x4D0, 2, self.pic.elcr)
        ports.register(0x40, Pit8254.LENGTH, self._timed(self.pit, self.pit, Pit8254.LENGTH))
        ports.register(0x61, 1, self.pit.speaker)
        ports.register(0x60, 1, self.i8042.data)
        ports.register(0x64, 1, self.i8042.control)
        ports.register(0x70, CmosRtc.LENGTH, self._timed(self.rtc, self.rtc, CmosRtc.LENGTH))
        ports.register(0x92, Port92.LENGTH, self.port92)
        ports.register(RESET_PORT, ResetControl.LENGTH, self.reset_control)
        ports.register(0x3F8, Uart16550.LENGTH, self._timed(self.serial, self.serial, Uart16550.LENGTH))
        ports.register(0x510, FwCfg.LENGTH, self.fw_cfg)
        ports.register(PM_BASE, AcpiPm.LENGTH, self._timed(self.acpi_pm, self.acpi_pm, AcpiPm.LENGTH))
        ports.register(0xE0, self.testdev.ports.length, self.testdev.ports)
        ports.register(0x2000, self.testdev.irqs.length, self.testdev.irqs)
        mmio.register(_TESTDEV_MEMORY, self.testdev.memory.length, self.testdev.memory)
        mmio.register(IOAPIC_BASE, IoApic.LENGTH, self._timed(self.ioapic, self.ioapic, IoApic.LENGTH))
        mmio.register(HPET_BASE, Hpet.LENGTH, self._timed(self.hpet, self.hpet, Hpet.LENGTH))

    def _timed(self, chip: _Timed, device: Device, length: int) -> Window:
        """A window on ``device`` that arms the chip's deadline after each access."""
        arm = self._alarms.setdefault(chip, _Alarm(self._board, chip)).arm

        def read(offset: int, size: int, now: int) -> int:
            value = device.read(offset, size, now)
            arm()
            return value

        def write(offset: int, size: int, value: int, now: int) -> None:
            device.write(offset, size, value, now)
            arm()

        return Window(length, read, write)

    def rearm(self, chip: _Timed) -> None:
        """``chip`` was touched from the host's side."""
        self._alarms[chip].arm()

    def rearm_all(self) -> None:
        """Every chip's deadline anew, in the order in which they were registered."""
        for alarm in self._alarms.values():
            alarm.rearm()

    def save(self) -> PcState:
        """A copy of every chip's state."""
        return PcState(
            self.pic.save(), self.ioapic.save(), self.pit.save(), self.rtc.save(), self.hpet.save(),
            self.serial.save(), self.acpi_pm.save(), self.i8042.save(), self.port92.save(), self.reset_control.save(),
            self.fw_cfg.save(), self.testdev.save(), [wire.level for wire in self._wires],
        )  # fmt: skip

    def restore(self, state: PcState) -> None:
        """Take over a saved state; deadlines are armed by :meth:`rearm_all`."""
        if len(state.wires) < len(self._wires):
            raise ConfigError(f"the saved machine has {len(state.wires)} interrupt wires, this one {len(self._wires)}")
        # Wires first: a chip then finds its own as it left it, and no interrupt is raised anew.
        levels = iter(state.wires)
        for wire in self._wires:
            wire.restore(next(levels))
        self._relaid.extend(levels)
        self.hpet.restore(state.hpet)
        self.pit.restore(state.pit)
        self.rtc.restore(state.rtc)
        self.serial.restore(state.serial)
        self.acpi_pm.restore(state.acpi_pm)
        self.i8042.restore(state.i8042)
        self.port92.restore(state.port92)
        self.reset_control.restore(state.reset_control)
        self.fw_cfg.restore(state.fw_cfg)
        self.testdev.restore(state.testdev)
        self.pic.restore(state.pic)
        self.ioapic.restore(state.ioapic)

    def disarm(self) -> None:
        """The machine is gone: nobody waits for its chips."""
        for alarm in self._alarms.values():
            alarm.disarm()

    # ---- wires -------------------------------------------------------------------------------------------------

    def new_line(self, gsi: int) -> IrqLine:
        """A device's own wire to ``gsi``: the I/O APIC's pin and, below 16 but for the cascade, the 8259's.

        In a restored machine the program's own, laid in the same order again, have the levels that were saved.
        """
        pin = self._wire(self.ioapic.new_line(_TIMER_PIN if gsi == _TIMER_GSI else gsi))
        if gsi >= 16 or gsi == _TIMER_PIN:
            return pin
        isa = self._wire(self.pic.new_line(gsi))

        def sink(level: bool) -> None:
            isa.set(level)
            pin.set(level)

        return self._wire(IrqLine(sink))

    def _wire(self, line: IrqLine) -> IrqLine:
        if self._relaid:
            line.restore(self._relaid.popleft())
        self._wires.append(line)
        return line

    def _replaceable(self, gsi: int) -> IrqLine:
        """A wire that the HPET's legacy replacement cuts."""
        line = self.new_line(gsi)
        return self._wire(IrqLine(lambda level: line.set(level and not self._hpet_replaces)))

    def _set_hpet_replaces(self, replaces: bool) -> None:
        self._hpet_replaces = replaces

    def _intr(self, level: bool) -> None:
        """The 8259's output: whoever takes ExtINT looks again."""
        if not level:
            return
        board = self._board
        for vcpu in board.vcpus:
            if vcpu.apic.accepts_extint():
                board.post(board.clock.now(), vcpu.notice_extint)
                return

    def pending(self, vcpu: Vcpu) -> bool:
        """Whether the 8259 pair asks this CPU for an interrupt."""
        return self.pic.output and vcpu.apic.accepts_extint()

    def broadcast_eoi(self, vector: int, *, level: bool) -> None:
        """A local APIC retired ``vector``."""
        self.ioapic.eoi(vector, level, self._board.clock.now())
        self.rearm(self.ioapic)

    def _routes_changed(self) -> None:
        watched = 1 << self.ioapic.vector_of(_TIMER_PIN)
        for vcpu in self._board.vcpus:
            vcpu.apic.watched_vectors = watched

    # ---- the timer's interrupt is counted (KVM's reinjection) ----------------------------------------------------

    def _isa_acknowledged(self, irq: int) -> None:
        if irq == _TIMER_GSI:
            self.pit.acknowledge()

    def _pin_acknowledged(self, pin: int) -> None:
        if pin == _TIMER_PIN:
            self.pit.acknowledge()

    def _timer_masked(self, which: int) -> Callable[[int, bool], None]:
        def on_mask(pin: int, masked: bool) -> None:
            if pin == which and not masked:
                self.pit.unmasked()

        return on_mask

    def _tick(self) -> None:
        """LINT0 in NMI mode is the old NMI watchdog: each tick is an NMI there."""
        board = self._board
        for vcpu in board.vcpus:
            if vcpu.apic.lint0_is_nmi:
                board.post(board.clock.now(), vcpu.inject_nmi)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _power_off(self) -> None:
        self._board.end("power-off", 0)

    def _reset(self) -> None:
        self._board.end("reset", 0)


def _ignore_a20(_enabled: bool) -> None:
    """A20 is always on."""


def _nvram(board: _Board) -> dict[int, int]:
    """What a PC's firmware leaves in CMOS: memory sizes (Ralf Brown's CMOS list, 0x15 on) and QEMU's CPU count."""
    low = min(board.ram_size, 0xC000_0000)
    above_1m = min(low - _MIB >> 10, 0xFFFF)
    above_16m = min(max(low - 16 * _MIB, 0) >> 16, 0xFFFF)
    above_4g = max(board.ram_size - 0xC000_0000, 0) >> 16
    words = {0x15: 640, 0x17: above_1m, 0x30: above_1m, 0x34: above_16m, 0x5B: above_4g & 0xFFFF}
    nvram = {at + i: value >> 8 * i & 0xFF for at, value in words.items() for i in range(2)}
    nvram[0x5D] = above_4g >> 16 & 0xFF
    nvram[0x5F] = len(board.vcpus) - 1 & 0xFF
    return nvram
