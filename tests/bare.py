"""A machine with nothing in it but a few instructions of a test, tables, and a handler for every vector.

Each vector's handler is ``mov al, vector; out 0xF4, al``: the machine ends with status ``vector << 1 | 1`` and the
frame of the event on top of the stack. A test's own code ends with ``out 0xF4, al`` too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from aiovm.engine.base import DescriptorTable, Seg, Segment
from aiovm.loop import Host, run
from aiovm.vm import Vm

CODE, STACK, STACK0, DATA = 0x8000, 0x7_0000, 0x6_0000, 0x5_0000
GDT, IDT, TSS, TABLES, HANDLERS = 0x1_0000, 0x1_1000, 0x1_3000, 0x2_0000, 0x1_8000
#: What :meth:`End.read` can read; the second is SMRAM's last page.
KEPT = (GDT, 0x3_F000, DATA)
CODE0, DATA0, CODE3, DATA3, TR = 0x08, 0x10, 0x1B, 0x23, 0x28

GP, UD, DB, PF, NP, TS = 13, 6, 1, 14, 11, 10
END = "e6f4"  # out 0xf4, al

_DESCRIPTORS = {
    "long": (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF),
    "prot": (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF),
}


@dataclass
class End:
    """How it ended, and the first vCPU's registers then."""

    status: int
    mode: str
    gpr: list[int]
    rip: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    dr: list[int]
    cpl: int
    segments: dict[Seg, Segment]
    now: int
    vm: Vm
    pages: dict[int, bytes]
    extra: object = None
    frame: tuple[int, ...] = field(default=())

    @property
    def vector(self):
        """The vector whose handler ran, or None."""
        at = self.rip - HANDLERS
        return at >> 3 if 0 <= at < 0x800 else None

    @property
    def error_code(self):
        """On the stack for vectors that have one."""
        return self.frame[0]

    @property
    def fault_rip(self):
        """The RIP that was pushed."""
        return self.frame[1 if self.vector in (8, 10, 11, 12, 13, 14, 17) and self.mode != "real" else 0]

    @property
    def pushed_flags(self):
        return self.frame[3 if self.vector in (8, 10, 11, 12, 13, 14, 17) and self.mode != "real" else 2]

    def read(self, gpa, length):
        """Of the pages that are kept (:data:`KEPT`): the machine itself is closed."""
        at = gpa & 0xFFF
        assert at + length <= 0x1000
        return self.pages[gpa - at][at : at + length]

    def read_u(self, gpa, size):
        return int.from_bytes(self.read(gpa, size), "little")


def bare(code, mode="long", *, cpl=0, setup=None, look=None, regs=None, flags=2, vcpus=1, more=None, **options):
    """Run ``code`` (hex or bytes) at 0x8000. ``regs``: register number to value. ``setup(vm)`` runs before,
    ``look(vm)`` after; ``more``: address to bytes."""
    program = bytes.fromhex(code) if isinstance(code, str) else code

    async def main():
        host = Host(vcpus)
        async with Vm(host, vcpus=vcpus, memory=4 << 20, **options) as vm:
            vm.load(b"\xf4", kind="flat")
            vm.memory.write(CODE, program)
            for at, data in (more or {}).items():
                vm.memory.write(at, bytes.fromhex(data) if isinstance(data, str) else data)
            prepare(vm, mode, cpl)
            state = vm.vcpus[0].context.state
            for register, value in (regs or {}).items():
                state.gpr[register] = value
            state.rflags = flags
            if setup is not None:
                setup(vm)
            outcome = await vm.run()
            end = _end(vm, mode, outcome)
            end.extra = look(vm) if look is not None else None
            return end

    return run(main())


def _end(vm, mode, outcome):
    s = vm.vcpus[0].context.state
    end = End(
        outcome.status, mode, list(s.gpr), s.rip, s.rflags, s.cr0, s.cr2, s.cr3, s.cr4, s.efer,
        [s.get_dr(i) for i in range(8)], s.cpl, {w: s.segment(w) for w in Seg}, outcome.now, vm,
        {page: vm.memory.read(page, 0x1000) for page in KEPT},
    )  # fmt: skip
    width = {"real": 2, "prot": 4, "long": 8}[mode]
    sp = s.gpr[4] + s.segment(Seg.SS).base if mode != "long" else s.gpr[4]
    if 0 <= sp < (4 << 20) - 6 * width:
        end.frame = struct.unpack(f"<6{'.HIQ'[(2, 4, 8).index(width) + 1]}", vm.memory.read(sp, 6 * width))
    return end


def prepare(vm, mode, cpl=0, index=0):
    """Tables and registers for ``mode``: real, prot (32 bits, flat, no paging) or long (identity, 2M pages, user)."""
    memory = vm.memory
    s = vm.vcpus[index].context.state
    for register in range(16):
        s.gpr[register] = 0
    for vector in range(256):
        memory.write(HANDLERS + 8 * vector, bytes((0xB0, vector, 0xE6, 0xF4)))
    s.rip, s.gpr[4] = CODE, STACK
    if mode == "real":
        for vector in range(256):
            memory.write(4 * vector, struct.pack("<HH", (HANDLERS + 8 * vector) & 0xF, (HANDLERS + 8 * vector) >> 4))
        s.cr0 = 0x10
        s.efer = 0
        s.set_segment(Seg.CS, Segment(0, 0, 0xFFFF, 0x9B00))
        s.set_segment(Seg.SS, Segment(STACK >> 4, STACK, 0xFFFF, 0x9300))
        for which in (Seg.DS, Seg.ES, Seg.FS, Seg.GS):
            s.set_segment(which, Segment(0, 0, 0xFFFF, 0x9300))
        s.gpr[4] = 0x8000
        s.idt = DescriptorTable(0, 0x3FF)
        return
    long = mode == "long"
    for index_, entry in enumerate(_DESCRIPTORS[mode]):
        memory.write_u(GDT + 8 * index_, 8, entry)
    memory.write_u(GDT + TR, 8, 0x67 | (TSS & 0xFFFFFF) << 16 | 0x8B << 40)
    memory.write_u(GDT + TR + 8, 8, 0)
    for vector in range(256):
        at = HANDLERS + 8 * vector
        gate = at & 0xFFFF | CODE0 << 16 | 0x8E00 << 32 | (at >> 16) << 48
        if long:
            memory.write_u(IDT + 16 * vector, 8, gate)
            memory.write_u(IDT + 16 * vector + 8, 8, 0)
        else:
            memory.write_u(IDT + 8 * vector, 8, gate)
    if long:
        memory.write_u(TSS + 4, 8, STACK0)
        memory.write_u(TABLES, 8, TABLES + 0x1007)
        memory.write_u(TABLES + 0x1000, 8, TABLES + 0x2007)
        for page in range(512):
            memory.write_u(TABLES + 0x2000 + 8 * page, 8, page << 21 | 0x87)
        s.cr3, s.cr4, s.efer, s.cr0 = TABLES, 0x620, 0xD01, 0x8001_0033
    else:
        memory.write_u(TSS + 4, 4, STACK0)
        memory.write_u(TSS + 8, 4, DATA0)
        s.cr4, s.efer, s.cr0 = 0x600, 0, 0x33
    memory.write_u(TSS + 0x66, 2, 0x68)
    cs, ss = (CODE3, DATA3) if cpl else (CODE0, DATA0)
    dpl = cpl << 13
    s.set_segment(Seg.CS, Segment(cs, 0, 0xFFFF_FFFF, (0xAF_9B00 if long else 0xCF_9B00) | dpl))
    s.set_segment(Seg.SS, Segment(ss, 0, 0xFFFF_FFFF, 0xCF_9300 | dpl))
    for which in (Seg.DS, Seg.ES, Seg.FS, Seg.GS):
        s.set_segment(which, Segment(DATA3, 0, 0xFFFF_FFFF, 0xCF_F300))
    s.set_segment(Seg.TR, Segment(TR, TSS, 0x67, 0x8B00))
    s.set_segment(Seg.LDTR, Segment(0, 0, 0, 0x8200))
    s.gdt = DescriptorTable(GDT, 0x3F)
    s.idt = DescriptorTable(IDT, 0xFFF if long else 0x7FF)
    s.cpl = cpl


def fault(code, mode="long", **options):
    """Run ``code``: (vector, error code, RIP that was pushed)."""
    end = bare(code, mode, **options)
    return end.vector, end.error_code if end.vector in (8, 10, 11, 12, 13, 14, 17) else None, end.fault_rip


def set_gate(vm, vector, at, *, dpl=0, kind=0xE, ist=0, selector=CODE0):
    """Long mode's gate of ``vector``, to ``at``."""
    gate = at & 0xFFFF | selector << 16 | ist << 32 | (0x80 | dpl << 5 | kind) << 40 | (at >> 16) << 48
    vm.memory.write_u(IDT + 16 * vector, 8, gate)


def nmi_at(ns):
    """A setup: an NMI for the first vCPU at ``ns``."""
    return lambda vm: vm.host.clock.call_at(ns, lambda: vm.vcpus[0].inject_nmi())
