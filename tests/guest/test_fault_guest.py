"""Every fault in every mode of delivery, by a guest of ours (asm/faults.S) that runs here and on QEMU's emulator.

What each case must give is restated from the SDM (vol. 3A, chapter 6; vol. 3B, chapter 21). QEMU must leave the same
registers, error codes and stacks, but for what :func:`as_manual` says, with the manual's place.

Not modelled, here and there alike: #AC, and #XM for unmasked SSE exceptions; in 64-bit code a stack access through an
address that is not canonical is #SS(0) on a processor, and #GP(0) here and there.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aiovm import guests
from aiovm.loop import Host, run
from aiovm.vm import Vm

ASM = Path(__file__).parent / "asm"
QEMU = shutil.which("qemu-system-x86_64")
REAL, V86, PROT16, PROT32, TRAP, TASK, USER32, LONG, IST, USER64, COMPAT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
NONE = 0x80
DE, DB, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, MF = (0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16)
WITH_ERROR = frozenset({DF, TS, NP, SS, GP, PF})
#: Where the error code is, a selector's index or a vector's; bit 1: IDT.
ABSENT, BEYOND, SHORT_TSS, TSS64 = 0x60, 0x200, 0x58, 0x68

#: Case by case, in the order of the guest: (vector, error code).
COMMON = [(DE,), (DB,), (DB,), (BP,), (OF,), (BR,), (UD,), (NM,)]
SELECTORS = [(NP, ABSENT), (SS, ABSENT), (GP, BEYOND), (TS, SHORT_TSS), (GP, 0x81 << 3 | 2), (GP, 0)]
EXPECTED = {
    REAL: [*COMMON, (DB,), (MF,), (MF,), (UD,)],
    PROT16: [*COMMON, (DB,), (MF,), (MF,), *SELECTORS, (DF, 0)],
    PROT32: [*COMMON, *SELECTORS, (PF, 0), (PF, 3), (PF, 0), (MF,), (DB,), (DF, 0), (DF, 0)],
    TRAP: [(DE,), (BP,), (GP, BEYOND), (PF, 2)],
    USER32: [
        *((DE,), (DB,), (BP,), (OF,), (BR,), (UD,), (GP, ABSENT), (GP, BEYOND), (GP, 0), (PF, 4), (PF, 7), (PF, 5)),
        *((PF, 7), (PF, 5), (MF,), (GP, 3 << 3 | 2), (NM,), (NONE,), (NONE,)),
    ],
    V86: [
        *((DE,), (DB,), (BP,), (OF,), (BR,), (UD,), (GP, 0), (GP, 0x20 << 3 | 2), (UD,), (GP, 0), (MF,)),
        *((BP,), (GP, 0), (GP, 0), (GP, 0)),
    ],
    LONG: [
        *((DE,), (DB,), (DB,), (BP,), (UD,), (UD,), (NM,), (NP, ABSENT), (SS, ABSENT), (GP, BEYOND)),
        *((GP, 0x81 << 3 | 2), (PF, 0), (PF, 3), (PF, 0x10), (GP, 0), (SS, 0), (MF,), (UD,), (DB,), (DF, 0)),
    ],
    IST: [(DE,), (BP,), (GP, BEYOND), (PF, 0), (UD,)],
    USER64: [
        *((DE,), (DB,), (BP,), (UD,), (GP, ABSENT), (GP, BEYOND), (GP, 0), (PF, 4), (PF, 7), (PF, 5), (PF, 0x15)),
        *((GP, 0), (SS, 0), (MF,)),
    ],
    COMPAT: [
        *((DE,), (DB,), (BP,), (OF,), (BR,), (UD,), (GP, ABSENT), (GP, BEYOND), (GP, TSS64), (GP, 0), (PF, 4), (PF, 5)),
    ],
}  # fmt: skip


class Record:
    """What the guest kept of one case."""

    def __init__(self, line):
        self.words = [int(word, 16) for word in line.split()]
        first = self.words[0]
        self.mode, self.case, self.vector = first & 0xFF, first >> 8 & 0xFF, first >> 16 & 0xFF
        self.sp, self.cr2, self.ss = self.words[1:4]
        self.stack = self.words[4:]

    @property
    def error(self):
        return self.stack[0] & 0xFFFF if self.mode == PROT16 else self.stack[0]


@functools.cache
def here():
    async def main():
        said = bytearray()
        async with Vm(Host(1), memory=16 << 20, console=said.extend) as vm:
            vm.load((ASM / "faults.elf").read_bytes(), name="faults")
            assert (await vm.run()).status == 1
        return [Record(line) for line in said.decode().splitlines()]

    return run(main())


@functools.cache
def there():
    command = [QEMU, "-accel", "tcg", "-m", "16M", "-no-reboot", "-display", "none", "-monitor", "none"]
    command += ["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", ASM / "faults.elf"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    return [Record(line) for line in done.stdout.decode().splitlines()]


@pytest.mark.parametrize("mode", EXPECTED)
def test_each_fault_is_the_manuals(mode):
    found = [
        (r.vector, r.error) if r.vector in WITH_ERROR and mode != REAL else (r.vector,)
        for r in here()
        if r.mode == mode
    ]
    assert found == EXPECTED[mode]


def of(mode, case):
    return next(r for r in here() if (r.mode, r.case) == (mode, case))


def test_frames_of_a_stack_switch():
    """SS:ESP, EFLAGS, CS:EIP from the top (6.12.1); out of virtual-8086 mode the data segments above (21.3.1)."""
    user = of(USER32, GP)
    error, eip, cs, eflags, _esp, ss = user.stack[:6]
    assert (error, cs, eflags, ss, user.ss) == (0, 0x33, 0x1_3202, 0x3B, 0x10)
    v86 = of(V86, DE)
    eip, cs, eflags, _esp, ss, *segments = v86.stack[:9]
    assert (cs, ss, segments, v86.ss) == (0xFFFF, 0xFFFF, [0xFFFF] * 4, 0x10)
    assert eflags & 0x3_3000 == 0x3_3000  # VM, IOPL 3, RF
    assert user.sp + 24 == v86.sp + 36 == of(USER32, DE).sp + 20
    assert eip < 0x1_0000


def test_trap_gates_leave_if_and_interrupt_gates_clear_it():
    """Seen at the next case's flags: behind an interrupt gate nobody set IF again (6.12.1.3)."""
    assert of(TRAP, GP + 0x15).stack[3] & 0x200
    assert not of(PROT32, UD).stack[2] & 0x200


def test_task_gates_switch_and_set_ts_nt_and_the_link():
    """6.12.2 and 7.3: the error code is on the new task's stack, both tasks are busy."""
    for case, code in ((UD, None), (0x22, BEYOND), (DF, 0)):
        r = of(TASK, case)
        top, link, _eip, eflags, _esp, ebp, cs, old, new, flags = r.stack[:10]
        assert r.cr2 & 8  # CR0.TS
        assert (r.ss, link, ebp, cs) == (0x50, 0x48, 0x1234, 8)
        assert old >> 8 & 0xF == new >> 8 & 0xF == 0xB
        assert flags & 0x4000
        assert not eflags & 0x4000
        if code is not None:
            assert top == code


def test_long_mode_aligns_the_stack_and_ist_is_taken_without_a_change_of_privilege():
    """6.14.2 and 6.14.5."""
    odd = of(LONG, 0x45)
    pushed = odd.stack[6] | odd.stack[7] << 32
    assert pushed & 0xF == 0xB
    assert odd.sp + 40 == pushed & ~0xF
    on_ist = of(IST, DE)
    assert on_ist.sp != of(LONG, DE).sp
    assert of(IST, BP).sp == on_ist.sp == of(IST, 0x45).sp


def flags_at(record):
    """Where the pushed flags are among the words; None for 16-bit frames."""
    if record.mode in (REAL, PROT16):
        return None
    if record.mode == TASK:
        return 7
    width = 1 if record.mode in (V86, PROT32, TRAP, USER32) else 2
    return 4 + width * (2 + (record.vector in WITH_ERROR))


def as_manual(record):
    """QEMU's record with its deviations made good; what it is right in stays to be compared."""
    words = list(record.words)
    at = flags_at(record)
    if record.vector == UD and (record.mode, record.case) in {(REAL, 8), (PROT16, 8), (PROT32, 8), (LONG, 9)}:
        # INT1 is an instruction, a trap to vector 1 (vol. 2A, INT n); QEMU takes it for an invalid opcode.
        words[0] ^= (UD ^ DB) << 16
        words[4] += 1
    elif (
        at is not None and DF not in (record.vector, record.case) and record.vector in WITH_ERROR | {DE, BR, UD, NM, MF}
    ):
        # Faults push RF set (vol. 3B, 18.3.1.1); #DF is an abort and pushes it as it is.
        words[at] |= 0x1_0000
    if record.case == 0x47:
        # An address by RSP or RBP that is not canonical is #SS (vol. 2A, MOV and PUSH: 64-bit mode exceptions).
        words[0] ^= (GP ^ SS) << 16
    if (record.mode, record.case) == (LONG, 0x24):
        # The error code of a vector beyond the IDT has the vector at bit 3 (6.13); QEMU scales it by the gate's size.
        assert words[4] == 0x81 << 4 | 2
        words[4] = 0x81 << 3 | 2
    if record.mode == IST:
        # The new SS is null where the privilege changes (6.14.4); QEMU's is with every IST.
        words[3] = 0x10
        words[at + 4] = 0x10  # as pushed from the second case on
    return words


@pytest.mark.peer
@pytest.mark.skipif(QEMU is None and not os.environ.get("CI"), reason="no qemu-system-x86_64: run make peers")
@pytest.mark.parametrize("mode", EXPECTED.keys() | {TASK})
def test_qemu_leaves_the_same(mode):
    ours = [r for r in here() if r.mode == mode]
    theirs = [r for r in there() if r.mode == mode]
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert [f"{w:08x}" for w in mine.words] == [f"{w:08x}" for w in as_manual(its)], (mode, mine.case)


@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "ld", "objcopy", "make"))), reason="no compiler")
def test_the_image_is_made_of_its_source(tmp_path):
    """By the binutils that built it; another version may encode and lay out otherwise."""
    present = subprocess.run(["ld", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    if present not in (Path(guests.__file__).parent / "BUILT_WITH").read_text():
        pytest.skip(f"the image was built with another linker than {present}")
    subprocess.run(["make", "-s", "-B", f"OUT={tmp_path}"], cwd=ASM, check=True, timeout=60)
    assert (tmp_path / "faults.elf").read_bytes() == (ASM / "faults.elf").read_bytes()
