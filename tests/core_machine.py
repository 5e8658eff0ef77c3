"""A machine of the Unicorn engine alone, and a port that notes what it is asked.

Each machine is tiny: 2 MiB of memory, identity page tables for 1 GiB at 0x1000, code at 0x10000, the stack below
0x20000. Programs are bytes with their mnemonics beside them. Engines: with the C hook and its twin, with and without
pointers into the core.
"""

import pytest

from aiovm.clock import new_cells
from aiovm.costs import Costs
from aiovm.engine.base import Seg, Segment
from aiovm.engine.unicorn import UnicornEngine, budget
from aiovm.exits import GuestException, Hlt, PauseLoop
from aiovm.memory import GuestMemory

CODE, STACK, DATA = 0x10000, 0x20000, 0x30000
MMIO = 0x3000_0000  # inside the identity mapping, outside memory
NOWHERE = 0x4000_0000  # not mapped
LONG = 1 << 40  # a limit that no test reaches

ENGINES = [(native, pointers) for native in ([True] if budget.NATIVE else []) + [False] for pointers in (True, False)]
IDS = [f"{'native' if n else 'twin'}-{'pointers' if p else 'public'}" for n, p in ENGINES]

every_engine = pytest.mark.parametrize(("native", "pointers"), ENGINES, ids=IDS)


def code(*parts):
    """Hex with spaces to bytes."""
    return bytes.fromhex("".join(parts))


class Port:
    """Answers everything, notes (what, RIP, arguments), and leaves or raises where told."""

    def __init__(self):
        self.seen = []
        self.leave_on = {}
        self.raise_on = {}
        self.then = {}
        self.permitted = ()
        self.msr = 0x1122_3344_5566_7788
        self.hears_exceptions = True
        self.engine = self.context = None

    def note(self, what, *arguments):
        self.seen.append((what, self.context.state.rip, *arguments))
        if what in self.then:
            self.then[what](*arguments)
        if what in self.raise_on:
            raise self.raise_on.pop(what)
        if what in self.leave_on:
            self.engine.leave(self.leave_on[what])

    def on_cpuid(self, leaf, subleaf):
        self.note("cpuid", leaf, subleaf)
        return 0x11, 0x22, 0x33, 0x44

    def on_rdmsr(self, index):
        self.note("rdmsr", index)
        return self.msr

    def on_wrmsr(self, index, value):
        self.note("wrmsr", index, value)
        return self.msr is not None

    def on_rdtsc(self):
        self.note("rdtsc")
        return 0x1234_5678_9ABC

    def on_in(self, port, size):
        self.note("in", port, size)
        return 0xA1B2_C3D4 & (1 << 8 * size) - 1

    def on_out(self, port, size, value):
        self.note("out", port, size, value)

    def on_mmio_read(self, gpa, size):
        self.note("read", gpa, size)
        return 0x8877_6655_4433_2211 >> 8 * (gpa & 7) & (1 << 8 * size) - 1

    def on_mmio_write(self, gpa, size, value):
        self.note("write", gpa, size, value)
        return True

    def on_hypercall(self, *numbers):
        self.note("hypercall", *numbers)
        return 0xFFFF_FFFF_FFFF_FFEA

    def on_cr_read(self, register):
        self.note("cr_read", register)
        return 0xB

    def on_cr_write(self, register, value):
        self.note("cr_write", register, value)
        if register in (0, 3, 4):
            setattr(self.context.state, f"cr{register}", value)
        return True

    def on_dr_read(self, register):
        self.note("dr_read", register)
        return 0xD0 + register

    def on_dr_write(self, register, value):
        self.note("dr_write", register, value)
        return True

    def on_load_tr(self, selector):
        self.note("load_tr", selector)
        return True

    def on_rsm(self):
        self.note("rsm")
        self.on_exception(6, None, 0)

    def on_io_permission(self, port, size):
        self.note("permission", port, size)
        return port in self.permitted

    def on_nmi_window(self):
        self.note("nmi_window", self.context.state.nmi_masked, self.context.state.interrupt_shadow)

    def on_step(self):
        self.note("step")

    def on_stepped(self):
        self.note("stepped")

    def on_exception(self, vector, error_code, address):
        self.note("exception", vector, error_code, address)
        if "exception" not in self.then:
            self.engine.leave(GuestException(vector, error_code, address))

    def on_soft_interrupt(self, vector, length, kind):
        self.note("int", vector, length, kind)
        self.engine.leave(GuestException(vector))

    def on_irq_window(self):
        self.note("window", self.context.state.rflags & 0x200, self.context.state.interrupt_shadow)
        if "window" not in self.then:
            self.context.request_irq_window(False)

    def on_hlt(self):
        self.note("hlt")
        self.engine.leave(Hlt(interrupts_enabled=bool(self.context.state.rflags & 0x200)))

    def on_pause_loop(self):
        self.note("pause_loop")
        self.engine.leave(PauseLoop(kernel_mode=True))


class Machine:
    """Memory, an engine, and CPUs in 64-bit mode at CPL 0."""

    def __init__(self, program=b"", *, native=None, pointers=None, cpus=1, at=CODE, **options):
        self.memory = GuestMemory()
        self.memory.set_region(0, 0, 2 << 20)
        self.memory.write_u(0x1000, 8, 0x2007)
        self.memory.write_u(0x2000, 8, 0x3007)
        for n in range(512):
            self.memory.write_u(0x3000 + 8 * n, 8, n << 21 | 0x87)
        self.memory.write(at, program)
        self.cells = new_cells()
        self.engine = UnicornEngine(self.memory, self.cells, costs=Costs(), native=native, pointers=pointers, **options)
        self.ports = [Port() for _ in range(cpus)]
        self.contexts = []
        for n, port in enumerate(self.ports):
            context = self.engine.create_context(n, port)
            port.engine, port.context = self.engine, context
            self.contexts.append(context)
            start64(context, at)
        self.port, self.context = self.ports[0], self.contexts[0]
        self.state = self.context.state

    @property
    def gpr(self):
        """The first CPU's registers, wherever they are now."""
        return self.state.gpr

    def run(self, limit=LONG):
        return self.context.run(limit)

    def seen(self, what):
        return [event[1:] for event in self.port.seen if event[0] == what]


def start64(context, rip, *, cpl=0):
    s = context.state
    s.cr3, s.cr4, s.efer, s.cr0 = 0x1000, 0x620, 0xD01, 0x8001_0033
    dpl = cpl << 13
    s.set_segment(Seg.CS, Segment(0x33 if cpl else 0x08, 0, 0xFFFF_FFFF, 0xAF_9B00 | dpl))
    s.set_segment(Seg.SS, Segment(0x2B if cpl else 0x10, 0, 0xFFFF_FFFF, 0xCF_9300 | dpl))
    for which in (Seg.DS, Seg.ES):
        s.set_segment(which, Segment(0x10, 0, 0xFFFF_FFFF, 0xCF_9300))
    s.gpr[4] = STACK
    s.rip = rip
    s.rflags = 2
