"""What the lock guest leaves in its memory, read by the host: states, statistics, waits (``guests/locks.h``).

Rules: the guest's addresses are physical (it maps memory to itself); everything is little-endian; nothing here
writes. States may be read at any time, the rest means most when the guest has ended. A guest may have written
anything: every value reads as something, and none raises. An image without these variables is a ConfigError.

Waits are counted in buckets of at most 1/32 of their value: a percentile is the highest wait of its bucket, and
never above the longest wait seen, which is exact.

Modelled: all that the guest exports. Not modelled: times in ns; the guest counts TSC cycles (``params.tsc_khz``).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aiovm.errors import ConfigError
from aiovm.loaders.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DISTRIBUTIONS",
    "LOCKS",
    "PV_LOCKS",
    "CpuLockStats",
    "LockLayout",
    "LockParams",
    "LockResults",
    "LockState",
    "Phase",
    "WaitHistogram",
    "bucket_range",
]

#: ``lock=``, in the order of the guest's numbers.
LOCKS = ("tas", "ttas", "ticket", "pvticket", "mcs", "qspinlock", "pvqspinlock", "broken")
#: Those that need KVM_FEATURE_PV_UNHALT.
PV_LOCKS = frozenset({"pvticket", "pvqspinlock"})
#: ``hold_dist=`` and ``think_dist=``.
DISTRIBUTIONS = ("fixed", "exp", "uniform")

_CPUS, _LOCKS, _LINE, _BUCKETS = 256, 64, 64, 1920
_HIST_ROW = 4 * _BUCKETS
#: Symbols and their sizes in bytes.
_SIZES = {
    "lock_state": _CPUS * _LINE,
    "lock_stats": _CPUS * _LINE,
    "wait_hist": _CPUS * _HIST_ROW,
    "lock_params": 128,
    "lock_count": _LOCKS * _LINE,
    "lock_ops": _CPUS * 8 * _LOCKS,
}


class Phase(enum.IntEnum):
    """Where a CPU is in its loop."""

    OUTSIDE = 0
    WAITING = 1
    HOLDING = 2


class LockState(NamedTuple):
    """A CPU's phase, and the lock that it is about."""

    phase: Phase
    lock: int


@dataclass(frozen=True, slots=True)
class LockParams:
    """``struct params``: the parameters in force; times in ns, except for the last three."""

    lock: int
    cpus: int
    hold_ns: int
    think_ns: int
    hold_dist: int
    think_dist: int
    nlocks: int
    spin: int
    duration_ns: int
    warmup_ns: int
    seed: int
    tsc_khz: int
    loop_ns_fp: int
    start_tsc: int
    measure_tsc: int
    end_tsc: int

    @property
    def lock_name(self) -> str:
        """The lock as ``lock=`` takes it, or ``?``."""
        return LOCKS[self.lock] if self.lock < len(LOCKS) else "?"


@dataclass(frozen=True, slots=True)
class CpuLockStats:
    """``struct stats``: one CPU's operations; all but the first count those begun after the warm-up."""

    ops_total: int
    ops_measured: int
    wait_sum_tsc: int
    wait_max_tsc: int
    halts: int
    kicks: int
    acquired_after_halt: int
    spins: int


def bucket_range(index: int) -> tuple[int, int]:
    """The lowest and the highest wait that bucket ``index`` counts."""
    if index < 32:
        return index, index
    shift = index // 32 - 1
    low = 32 + index % 32 << shift
    return low, low + (1 << shift) - 1


@dataclass(frozen=True, slots=True)
class WaitHistogram:
    """Waits in TSC cycles: counts by bucket, and the longest."""

    counts: tuple[int, ...]
    longest: int

    @property
    def total(self) -> int:
        """How many waits were counted."""
        return sum(self.counts)

    def percentile(self, rank: int, of: int = 100) -> int:
        """The wait that ``rank`` in ``of`` waits do not exceed; 0 when none was counted."""
        if not 0 <= rank <= of:
            raise ConfigError(f"no percentile {rank} of {of}")
        wanted = max(1, -(-self.total * rank // of))
        for index, count in enumerate(self.counts):
            wanted -= count
            if wanted <= 0:
                return min(bucket_range(index)[1], self.longest)
        return 0

    @property
    def p50(self) -> int:
        """The median."""
        return self.percentile(50)

    @property
    def p99(self) -> int:
        """The 99th percentile."""
        return self.percentile(99)


@dataclass(frozen=True, slots=True)
class LockResults:
    """Everything, read together. Tuples are indexed by CPU or by lock, as many as the parameters say."""

    params: LockParams
    cpus: tuple[CpuLockStats, ...]
    #: Operations by lock: what the CPUs did, and what the owners' non-atomic counters show.
    done: tuple[int, ...]
    counted: tuple[int, ...]
    #: The measured waits of all CPUs.
    waits: WaitHistogram

    @property
    def lost(self) -> int:
        """Updates that the counters miss: more than 0 says that two owners met."""
        return sum(abs(a - b) for a, b in zip(self.done, self.counted, strict=True))

    @property
    def operations(self) -> int:
        """Measured operations of all CPUs."""
        return sum(cpu.ops_measured for cpu in self.cpus)


class LockLayout:
    """Where an image of the lock guest keeps its variables. ``read(gpa, length)`` gives guest memory."""

    def __init__(self, symbols: Symbols) -> None:
        self._at: dict[str, int] = {}
        for name, size in _SIZES.items():
            symbol = symbols.get(name)
            if symbol is None or symbol.size != size:
                found = "is missing" if symbol is None else f"has {symbol.size:#x} bytes, not {size:#x}"
                raise ConfigError(f"not the lock guest: {name} {found}")
            self._at[name] = symbol.address

    @classmethod
    def from_elf(cls, image: bytes, name: str = "locks") -> LockLayout:
        """The layout of an ELF image; ``name`` is for messages."""
        return cls(Symbols(image, name))

    def state_address(self, cpu: int) -> int:
        """Where CPU ``cpu``'s phase lies (32 bits); the lock's number follows it."""
        return self._at["lock_state"] + _LINE * cpu

    def read_state(self, read: Callable[[int, int], bytes], cpu: int) -> LockState:
        """What CPU ``cpu`` is doing now; numbers that are no phase read as outside."""
        phase, lock = struct.unpack("<II", read(self.state_address(cpu), 8))
        return LockState(Phase(phase) if phase <= 2 else Phase.OUTSIDE, lock)

    def read_params(self, read: Callable[[int, int], bytes]) -> LockParams:
        """The parameters in force: all zero until the guest has read its command line."""
        return LockParams(*struct.unpack("<16Q", read(self._at["lock_params"], 128)))

    def read_cpu(self, read: Callable[[int, int], bytes], cpu: int) -> CpuLockStats:
        """CPU ``cpu``'s statistics."""
        return CpuLockStats(*struct.unpack("<8Q", read(self._at["lock_stats"] + _LINE * cpu, _LINE)))

    def read_waits(self, read: Callable[[int, int], bytes], cpu: int) -> tuple[int, ...]:
        """CPU ``cpu``'s waits by bucket."""
        return struct.unpack(f"<{_BUCKETS}I", read(self._at["wait_hist"] + _HIST_ROW * cpu, _HIST_ROW))

    def read(self, read: Callable[[int, int], bytes]) -> LockResults:
        """Everything."""
        params = self.read_params(read)
        cpus, locks = range(min(params.cpus, _CPUS)), range(min(params.nlocks, _LOCKS))
        stats = tuple(self.read_cpu(read, cpu) for cpu in cpus)
        waits = [self.read_waits(read, cpu) for cpu in cpus]
        ops = [struct.unpack("<64Q", read(self._at["lock_ops"] + 8 * _LOCKS * cpu, 8 * _LOCKS)) for cpu in cpus]
        counted = (int.from_bytes(read(self._at["lock_count"] + _LINE * lock, 8), "little") for lock in locks)
        return LockResults(
            params=params,
            cpus=stats,
            done=tuple(sum(row[lock] for row in ops) for lock in locks),
            counted=tuple(counted),
            waits=WaitHistogram(
                counts=tuple(map(sum, zip(*waits, strict=True))),
                longest=max((cpu.wait_max_tsc for cpu in stats), default=0),
            ),
        )
