"""Guests written as Python generators: a vCPU that computes, spins, halts and calls without instructions.

A guest program is a generator function of its CPU (:class:`ModelContext`). What it yields takes time:

    yield 20_000                           compute for 20 us
    got = yield cpu.spin(cell, 0, 512)     a PAUSE loop until the cell is 0, 512 turns at most; whether it became so
    yield cpu.halt()                       HLT
    yield cpu.kick(3)                      the hypercalls KICK_CPU, SCHED_YIELD; an IPI; a timer

Code between two yields takes no time and is never interrupted: a read-modify-write needs nothing else.

Rules:

* Code runs at the loop's time. A slice is a wait (``Machine.runs_ahead`` is false): :meth:`enter` goes on with the
  operation, whose end is armed on the clock, and the chain of operations is stepped by the clock's callbacks. The vCPU
  coroutine is woken only when the slice ends: by an exit, or by a kick, which cuts the operation short.
* A cut operation goes on where it was: compute time is exact to the nanosecond, a spin loop's PAUSE-loop window and
  phase begin anew, as at a VM entry.
* An interrupt pushes the running program; its handler is another generator, with IF clear until it ends.

Modelled: CPL (user code is ``cpu.user``), RFLAGS.IF, the interrupt window, PAUSE-loop exits at CPL 0, costs of exits.
Not modelled: registers and memory other than cells; INIT and SIPI, so model vCPUs are runnable from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from aiovm.clock import FOREVER, Alarm, Timer
from aiovm.errors import StateError
from aiovm.exits import Exit, Hlt, Interrupted, PauseLoop, SystemEvent

if TYPE_CHECKING:
    import random

    from aiovm.clock import VirtualClock
    from aiovm.costs import Costs
    from aiovm.engine.base import Context, CpuState, GuestPort
    from aiovm.engine.model.cell import Cell

__all__ = ["ModelContext", "ModelEngine", "ModelPort", "Op", "Program"]

_IF = 0x200
_INTERRUPTED = Interrupted()
_PAUSE_LOOP = PauseLoop(kernel_mode=True)
_HLT_ON, _HLT_OFF = Hlt(interrupts_enabled=True), Hlt(interrupts_enabled=False)
_DONE = SystemEvent("done")

#: ns of code in one turn of a spin loop beside its PAUSE: 16 bytes in the lock guests' ticket loop (guests/locks.elf).
_TURN_BYTES = 16

#: Starts an operation and says how long it takes (ns); one that spins or leaves sets the context's state itself.
Op = Callable[["ModelContext"], int]
Program = Generator[int | Op, Any, None]

# What a context is doing: its program's next step is due; an operation takes its time; that was cut short; a spin loop;
# an exit's cost.
_READY, _COMPUTE, _CUT, _SPIN, _EXITING = range(5)


class ModelPort(Protocol):
    """What a model guest's CPU asks of its vCPU: hypercalls and APIC as calls. At the loop's time."""

    def on_kick(self, index: int) -> None: ...
    def on_sched_yield(self, index: int) -> None: ...
    def on_ipi(self, index: int, vector: int) -> None: ...
    def on_timer(self, deadline: int, vector: int) -> None: ...
    def on_irq_window(self) -> None: ...
    def on_iret(self) -> None: ...
    def must_leave(self) -> bool:
        """Whether the slice must end after this operation: the host wants the CPU back, or somebody kicked."""


class _Frame(NamedTuple):
    """A program that an interrupt pushed aside."""

    send: Callable[[Any], int | Op]
    doing: int
    left: int
    value: object
    cell: Cell | None
    wanted: int
    cpl: int


class ModelContext:
    """One model CPU: what a guest program sees, and what the vCPU runs."""

    __slots__ = (
        "_after",
        "_begun",
        "_cell",
        "_clock",
        "_cost",
        "_doing",
        "_due",
        "_end",
        "_entering",
        "_exit",
        "_exit_ns",
        "_expired",
        "_frames",
        "_irq_window",
        "_left",
        "_pass_or_push",
        "_port",
        "_send",
        "_timer",
        "_turn_ns",
        "_value",
        "alarm",
        "cpl",
        "index",
        "interrupt_shadow",
        "lock_state",
        "map_generation",
        "ple_window",
        "random",
        "rflags",
        "rip",
        "spin_ns",
        "wanted",
    )

    def __init__(self, index: int, port: ModelPort, clock: VirtualClock, costs: Costs) -> None:
        self.index = index
        #: Rings when a slice ends that :meth:`enter` left running.
        self.alarm = Alarm(clock)
        #: ns; below 0 pause-loop exiting is off.
        self.ple_window = -1
        self.map_generation = -1
        #: 0 outside, 1 waiting for a lock, 2 holding one: what the lock guests publish to their host.
        self.lock_state = 0
        #: ns spent in spin loops, see :meth:`settle`.
        self.spin_ns = 0
        #: The value that the spin loop waits for.
        self.wanted = 0
        #: This CPU's random numbers.
        self.random: random.Random
        self._port = port
        self._clock = clock
        self._pass_or_push = clock.pass_or_push
        self._exit_ns = costs.exit_ns
        self._turn_ns = costs.pause_ns + (_TURN_BYTES * costs.code_rate >> 8)
        #: The registers that there are. ``rip`` counts operations.
        self.rip = 0
        self.rflags = 2
        self.cpl = 0
        self.interrupt_shadow = False
        self._send: Callable[[Any], int | Op]
        self._frames: list[_Frame] = []
        self._value: object = None
        self._doing = _READY
        self._after = _READY
        #: ns of the present operation still to come; for a spin loop its remaining turns.
        self._left = 0
        self._begun = 0
        self._end = 0
        self._cell: Cell | None = None
        self._expired = self._expire
        #: In the clock's heap exactly while it has a callback, or was disarmed.
        self._timer = _new_timer()
        #: Why the slice ended; the exit whose cost is being paid.
        self._exit: Exit | None = None
        self._due: Exit = _INTERRUPTED
        self._cost = 0
        self._entering = False
        self._irq_window = False

    # ---- what a guest program may do -------------------------------------------------------------------------------

    def now(self) -> int:
        """The time, ns."""
        return self._clock.now()

    @property
    def pauses(self) -> int:
        """PAUSE instructions executed so far."""
        return self.spin_ns // self._turn_ns

    def user(self) -> None:
        """From here on the program is at CPL 3, where pause loops do not exit."""
        self.cpl = 3

    def kernel(self) -> None:
        """From here on the program is at CPL 0."""
        self.cpl = 0

    def spin(self, cell: Cell, wanted: int, turns: int = 0) -> Op:
        """A PAUSE loop until ``cell`` holds ``wanted``, for at most ``turns`` turns (0: for ever). Yields whether."""
        self._cell = cell
        self.wanted = wanted
        self._left = turns * self._turn_ns if turns else FOREVER
        return _spin

    def halt(self) -> Op:
        """HLT, with IF as it stands."""
        return _halt

    def wait_for_interrupt(self) -> Op:
        """STI; HLT. The shadow covers HLT: an interrupt that waits already ends it at once."""
        return _sti_halt

    def enable_interrupts(self) -> Op:
        """STI."""
        return _sti

    def kick(self, index: int) -> Op:
        """KVM_HC_KICK_CPU."""

        def kick(me: ModelContext) -> int:
            me._port.on_kick(index)
            return me._exit_ns

        return kick

    def sched_yield(self, index: int) -> Op:
        """KVM_HC_SCHED_YIELD."""

        def sched_yield(me: ModelContext) -> int:
            me._port.on_sched_yield(index)
            return me._exit_ns

        return sched_yield

    def send_ipis(self, indices: Sequence[int], vector: int) -> Op:
        """One interrupt command: fixed, to the CPUs ``indices``."""

        def send(me: ModelContext) -> int:
            for index in indices:
                me._port.on_ipi(index, vector)
            return me._exit_ns

        return send

    def arm_timer(self, deadline: int, vector: int) -> Op:
        """The TSC deadline timer, to fire at ``deadline`` (ns)."""

        def arm(me: ModelContext) -> int:
            me._port.on_timer(deadline, vector)
            return me._exit_ns

        return arm

    # ---- Context ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> CpuState:
        """The registers that there are; nobody asks a model CPU for others."""
        return cast("CpuState", self)

    def reset(self, *, init: bool) -> None:
        """A model CPU gets no INIT, and power-on is how it is made."""

    def flush_tlb(self) -> None:
        """No TLB: what a flush costs is the program's business."""

    def take_delivered(self) -> bytes:
        """Programs have no exceptions."""
        return b""

    def set_tsc(self, ratio: int, offset: int) -> None:
        """Programs know the clock itself."""

    def request_irq_window(self, wanted: bool) -> None:
        self._irq_window = wanted

    def run(self, limit: int) -> Exit:
        """Not for a model CPU, whose slices are waited for: see :meth:`enter`."""
        raise StateError("a model CPU does not run ahead; enter() it")

    def start(self, program: Program, random: random.Random) -> None:
        """Give the CPU its program."""
        self._send = program.send
        self.random = random

    def interrupt(self, handler: Program) -> None:
        """Deliver an interrupt: ``handler`` runs with IF clear, then the program goes on."""
        self._frames.append(_Frame(self._send, self._doing, self._left, self._value, self._cell, self.wanted, self.cpl))
        self.rflags &= ~_IF
        self.cpl = 0
        self._send, self._doing, self._value = handler.send, _READY, None

    # ---- a slice ---------------------------------------------------------------------------------------------------

    def enter(self) -> Exit | None:
        """Go on until something leaves: the exit; or None, and :attr:`alarm` rings when :meth:`left` has it."""
        self._exit = None
        self._entering = True
        self._go()
        self._entering = False
        return self._exit

    def left(self) -> Exit:
        """Why the slice ended."""
        assert self._exit is not None
        return self._exit

    def interrupt_slice(self) -> None:
        """Kick: the slice ends now, unless an exit is on its way already.

        A kick that an operation of this CPU's own brings about is seen after it (:meth:`ModelPort.must_leave`).
        """
        if self._exit is None and (self._doing == _COMPUTE or self._doing == _SPIN):
            self.cut()
            self._leave(_INTERRUPTED)

    def cut(self) -> None:
        """Stop the operation in its middle and keep what is left of it."""
        self._disarm()
        if self._doing == _COMPUTE:
            self._left = self._end - self._clock.now()
            self._doing = _CUT
        elif self._doing == _SPIN and self._cell is not None and self in self._cell.spinners:
            self.settle()
            self._cell.spinners.remove(self)
            self._cell.notify()  # if this was the one to wake, it is another's turn

    def _disarm(self) -> None:
        """Forget the operation's end. The timer that stays behind in the heap is not armed again."""
        if self._timer.callback is not None:
            self._timer.callback = None
            self._timer = _new_timer()

    def _arm(self, at: int) -> None:
        timer = self._timer
        timer.callback = self._expired
        self._clock.push(at, timer)

    def settle(self) -> None:
        """Bring :attr:`spin_ns` up to now, where the program spins."""
        if self._doing == _SPIN and self._cell is not None and self in self._cell.spinners:
            spun = self._clock.now() - self._begun
            self.spin_ns += spun
            if self._left != FOREVER:
                self._left -= spun
            self._begun += spun

    def _leave(self, exit_: Exit) -> None:
        self._exit = exit_
        if not self._entering:
            self.alarm.ring_at(self._clock.now())

    def _go(self, op: int | Op | None = None) -> None:
        """Run program code at the loop's time until time must pass or the slice ends. ``op`` is the first operation."""
        cells, pass_or_push, timer = self._clock.cells, self._pass_or_push, self._timer
        timer.callback = self._expired
        while True:
            doing = self._doing
            if doing == _READY:
                if op is None:
                    value, self._value = self._value, None
                    try:
                        op = self._send(value)
                    except StopIteration:
                        if self._return():
                            continue
                        break
                    self.rip += 1
                if isinstance(op, int):
                    ns = op
                else:
                    ns = op(self)
                    if self._doing == _READY and self._port.must_leave():
                        self._begin_exit(_INTERRUPTED, _READY, ns)
                op = None
                if self._doing != _READY:
                    continue
            elif doing == _SPIN:
                if self._begin_spin():
                    return
                continue
            else:
                ns = self._cost if doing == _EXITING else self._left
            end = cells[0] + ns
            if not pass_or_push(end, timer):
                self._end = end
                if doing != _EXITING:
                    self._doing = _COMPUTE
                return
            if doing == _EXITING:
                self._exited()
                break
            self._doing = _READY
        timer.callback = None

    def _expire(self) -> None:
        """The clock's callback: the operation's end."""
        if self._doing != _COMPUTE:
            if self._doing == _SPIN:
                self._spin_event()
            else:
                self._exited()
            return
        # One computation after another is most of what there is, so it takes the short way.
        op: int | Op | None
        try:
            op = self._send(None)
        except StopIteration:
            self._doing = _READY
            if self._return():
                self._go()
            return
        self.rip += 1
        if isinstance(op, int):
            end = self._end + op
            timer = self._timer
            timer.callback = self._expired
            if not self._pass_or_push(end, timer):
                self._end = end
                return
            timer.callback = None
            op = None
        self._doing = _READY
        self._go(op)

    # ---- exits -----------------------------------------------------------------------------------------------------

    def _begin_exit(self, exit_: Exit, after: int, cost: int) -> None:
        """The exit's own cost (ns) comes first, then the slice ends; afterwards the state is ``after``."""
        self._due = exit_
        self._after = after
        self._cost = cost
        self._doing = _EXITING

    def _exited(self) -> None:
        self._doing = self._after
        self._leave(self._due)

    def _return(self) -> bool:
        """The program ended: IRET, or when nothing was interrupted the slice's end and False."""
        if not self._frames:
            self._send = _ended
            self._leave(_DONE)
            return False
        self._send, self._doing, self._left, self._value, self._cell, self.wanted, self.cpl = self._frames.pop()
        self.rflags |= _IF
        self._port.on_iret()
        return True

    # ---- spin loops ------------------------------------------------------------------------------------------------

    def next_poll(self) -> int:
        """When the loop next reads its cell, ns."""
        begun, turn = self._begun, self._turn_ns
        return begun - (begun - self._clock.now()) // turn * turn

    def end_spin_at(self, at: int) -> None:
        """The cell holds what the loop wants, and the loop will see it ``at`` (ns)."""
        timer = self._timer
        if timer.callback is None or at < timer.deadline:
            self._disarm()
            self._arm(at)

    def _begin_spin(self) -> bool:
        """Enter the loop; False when there is nothing to wait for."""
        cell = self._cell
        assert cell is not None
        if cell.value == self.wanted:
            self._value = True
            self._doing = _READY
            return False
        now = self._clock.now()
        self._begun = now
        end = now + self._left
        if 0 <= self.ple_window < self._left and self.cpl == 0:
            end = now + self.ple_window
        self._end = end
        cell.spinners.append(self)
        self._timer.callback = None
        if end < FOREVER:
            self._arm(end)
        return True

    def _spin_event(self) -> None:
        """A poll that the cell foresaw, or the loop's end."""
        cell = self._cell
        assert cell is not None
        self.settle()
        if cell.value == self.wanted or self._left <= 0:
            cell.spinners.remove(self)
            self._value = cell.value == self.wanted
            self._doing = _READY
            # Others wait for the same value: the next poller, before any time passes.
            cell.notify()
            self._go()
        elif self._begun >= self._end:
            cell.spinners.remove(self)
            self._begin_exit(_PAUSE_LOOP, _SPIN, self._exit_ns)
            self._go()
        elif self._end < FOREVER:
            self._arm(self._end)


def _ended(_value: object) -> int:
    """What a CPU runs whose program is over."""
    raise StopIteration


def _new_timer() -> Timer:
    """One that is not armed."""
    timer = Timer(0, int)
    timer.cancel()
    return timer


def _spin(me: ModelContext) -> int:
    me._doing = _SPIN
    return 0


def _halt(me: ModelContext) -> int:
    me._begin_exit(_HLT_ON if me.rflags & _IF else _HLT_OFF, _READY, me._exit_ns)
    return 0


def _sti(me: ModelContext) -> int:
    me.rflags |= _IF
    if me._irq_window:
        me._port.on_irq_window()
    return 0


def _sti_halt(me: ModelContext) -> int:
    me.rflags |= _IF
    if me._irq_window:
        me._port.on_irq_window()
    else:
        _halt(me)
    return 0


class ModelEngine:
    """One machine's model CPUs."""

    def __init__(self, clock: VirtualClock, costs: Costs) -> None:
        self._clock = clock
        self._pass_or_push = clock.pass_or_push
        self._costs = costs
        self.contexts: list[ModelContext] = []

    def create_context(self, index: int, port: GuestPort) -> Context:
        """A CPU; ``port`` must also be a :class:`ModelPort`."""
        context = ModelContext(index, cast("ModelPort", port), self._clock, self._costs)
        self.contexts.append(context)
        return cast("Context", context)  # nobody steps a model CPU or waits for its NMIs

    def kick(self) -> None:
        """End every running slice."""
        for context in self.contexts:
            context.interrupt_slice()

    def leave(self, exit_: Exit) -> None:
        """Model programs leave by their operations."""
        raise StateError(f"a model guest cannot leave with {exit_}")

    def close(self) -> None:
        """Nothing to free."""
