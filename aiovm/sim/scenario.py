"""Scenarios: what a simulation runs, as checked values; read from TOML.

Every table and key is known, every duration has its unit, every number its range; what is wrong is named with its line
and key. Defaults are the common case: one machine of 8 vCPUs on 8 physical CPUs, the fair policy, KVM 6.16.

Not modelled: SMT siblings that share a core, NUMA distances.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
from msgspec import Meta

from aiovm.costs import Costs
from aiovm.errors import ConfigError
from aiovm.policy import by_name
from aiovm.spin import SpinOptions
from aiovm.units import parse_duration

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Dbench",
    "Ebizzy",
    "Features",
    "HostSpec",
    "KernelBuild",
    "LockBound",
    "Ns",
    "Scenario",
    "TcpRr",
    "VmSpec",
    "Workload",
    "build",
    "load_scenario",
    "parse_scenario",
    "to_toml_tree",
]


class Ns(int):
    """Nanoseconds; written with a unit."""


Count = Annotated[int, Meta(ge=1, le=100_000)]
_LOCKS = "tas|ticket|pticket|pvticket|mcs|qspinlock|pvqspinlock"
LockKind = Annotated[str, Meta(pattern=f"^({_LOCKS})$")]
Distribution = Annotated[str, Meta(pattern="^(fixed|exp|uniform)$")]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table of a scenario."""


class LockBound(_Strict, frozen=True, tag="lock-bound", tag_field="kind"):
    """Think, take a lock, hold it, release. The lock guests' default workload."""

    lock: LockKind = "ticket"
    locks: Annotated[int, Meta(ge=1, le=4096)] = 1
    hold: Ns = Ns(2_000)
    hold_dist: Distribution = "fixed"
    think: Ns = Ns(20_000)
    think_dist: Distribution = "exp"
    #: Turns before a paravirtual waiter halts. Linux: 1 << 15; at this model's 74 ns a turn, 2.4 ms.
    spin: Annotated[int, Meta(ge=1, le=1 << 32)] = 1 << 15
    #: Bringing the lock's word from another CPU's cache; a hand-over to one of n spinners takes n/2 of it.
    line: Ns = Ns(0)
    steal: bool = True
    wait_early: bool = True
    #: vcpu_is_preempted, as far as the lock asks for it.
    sees_preemption: bool = False
    #: CPU time of each operation beside think and hold, such as the guest's own measuring.
    overhead: Ns = Ns(0)


class KernelBuild(_Strict, frozen=True, tag="kernel-build", tag_field="kind"):
    """Like a parallel kernel build: long stretches at CPL 3, then a system call or fault that takes a few locks.

    About a tenth of the time is spent in the kernel, and locks are many; one of them is hot (dcache, zone or LRU lock).
    """

    lock: LockKind = "ticket"
    user: Ns = Ns(100_000)
    kernel: Ns = Ns(5_000)
    sections: Annotated[int, Meta(ge=1, le=64)] = 2
    hold: Ns = Ns(1_000)
    locks: Annotated[int, Meta(ge=1, le=4096)] = 2
    #: Bringing the lock's word from another CPU's cache; a hand-over to one of n spinners takes n/2 of it.
    line: Ns = Ns(0)
    spin: Annotated[int, Meta(ge=1, le=1 << 32)] = 1 << 15
    wait_early: bool = True
    steal: bool = True
    sees_preemption: bool = False


class Ebizzy(_Strict, frozen=True, tag="ebizzy", tag_field="kind"):
    """Like ebizzy: search at CPL 3, then map and unmap memory: a few critical sections of the memory allocator's locks,
    and every so often a flush of the TLBs of all other CPUs, which is waited for. With ``mutex`` all of it under the
    address space's lock, whose waiters sleep (mmap_lock)."""

    lock: LockKind = "pvqspinlock"
    user: Ns = Ns(100_000)
    kernel: Ns = Ns(5_000)
    sections: Annotated[int, Meta(ge=0, le=64)] = 2
    hold: Ns = Ns(1_000)
    locks: Annotated[int, Meta(ge=1, le=4096)] = 1
    #: Bringing the lock's word from another CPU's cache; a hand-over to one of n spinners takes n/2 of it.
    line: Ns = Ns(0)
    mutex: bool = True
    #: One round in so many flushes.
    flush_every: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    call: Ns = Ns(500)
    pv_flush: bool = False
    pv_yield: bool = False
    spin: Annotated[int, Meta(ge=1, le=1 << 32)] = 1 << 15
    wait_early: bool = True
    steal: bool = True
    sees_preemption: bool = False


class Dbench(_Strict, frozen=True, tag="dbench", tag_field="kind"):
    """Like dbench on tmpfs: mostly kernel, short operations under a few contended locks, a little user code."""

    lock: LockKind = "ticket"
    user: Ns = Ns(20_000)
    kernel: Ns = Ns(20_000)
    sections: Annotated[int, Meta(ge=1, le=64)] = 2
    hold: Ns = Ns(1_000)
    locks: Annotated[int, Meta(ge=1, le=4096)] = 1
    #: Bringing the lock's word from another CPU's cache; a hand-over to one of n spinners takes n/2 of it.
    line: Ns = Ns(0)
    spin: Annotated[int, Meta(ge=1, le=1 << 32)] = 1 << 15
    wait_early: bool = True
    steal: bool = True
    sees_preemption: bool = False


class TcpRr(_Strict, frozen=True, tag="tcp-rr", tag_field="kind"):
    """Like netperf TCP_RR: a request arrives by interrupt, is answered, and the CPU idles until the next.

    ``ticks``: interrupts a second of the guest's own timer; with ``clients`` false the guest only idles.
    """

    wire: Ns = Ns(20_000)
    service: Ns = Ns(4_000)
    ticks: Annotated[int, Meta(ge=0, le=1000)] = 0
    clients: bool = True


Workload = LockBound | KernelBuild | Ebizzy | Dbench | TcpRr


class Features(_Strict, frozen=True):
    """KVM's features; all on is 6.16."""

    ple: bool = True
    #: The window grows with each exit (3.16, 2014).
    ple_grows: bool = True
    directed_yield: bool = True
    ready_filter: bool = True
    undercommit_check: bool = True
    eligibility_filter: bool = True
    kernel_mode_filter: bool = True
    boost_woken: bool = True
    boost_interrupted: bool = True
    ipi_aware: bool = False
    kick_yields: bool = True
    halt_poll: Ns = Ns(200_000)
    #: Halt polling adapts its window; off: always the whole of ``halt_poll``.
    halt_poll_dynamic: bool = True

    @property
    def spin_options(self) -> SpinOptions:
        """As the directed yield wants them."""
        return SpinOptions(
            directed=self.directed_yield,
            ready_filter=self.ready_filter,
            undercommit_check=self.undercommit_check,
            eligibility_filter=self.eligibility_filter,
            kernel_mode_filter=self.kernel_mode_filter,
            boost_woken=self.boost_woken,
            boost_interrupted=self.boost_interrupted,
            ipi_aware=self.ipi_aware,
        )


class HostSpec(_Strict, frozen=True):
    """The physical side."""

    pcpus: Annotated[int, Meta(ge=1, le=4096)] = 8
    policy: str = "fair"
    slice: Ns = Ns(6_000_000)
    #: Each slice varies by up to this share, 1/1000.
    jitter: Annotated[int, Meta(ge=0, le=999)] = 100
    options: dict[str, int] = {}

    def __post_init__(self) -> None:
        if self.slice < 1:
            raise ConfigError("`slice` is below 1ns")
        try:
            by_name(self.policy, slice_ns=int(self.slice), jitter=self.jitter, **self.options)
        except ConfigError as error:
            raise ConfigError(f"`policy`: {error}") from error


class VmSpec(_Strict, frozen=True):
    """``count`` equal machines."""

    name: str = "vm"
    count: Count = 1
    vcpus: Annotated[int, Meta(ge=1, le=1024)] = 8
    workload: Workload = LockBound()
    features: Features | None = None


class Scenario(_Strict, frozen=True):
    """A whole simulation."""

    name: str = "scenario"
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 1
    duration: Ns = Ns(200_000_000)
    warmup: Ns = Ns(50_000_000)
    host: HostSpec = HostSpec()
    features: Features = Features()
    costs: dict[str, int] = {}
    vm: Annotated[list[VmSpec], Meta(min_length=1)] = msgspec.field(default_factory=lambda: [VmSpec()])

    def __post_init__(self) -> None:
        unknown = sorted(set(self.costs) - set(Costs.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"`costs.{unknown[0]}` is not known; there are {', '.join(Costs.__dataclass_fields__)}")
        for name, value in self.costs.items():
            try:
                Costs(**{name: value})
            except ConfigError as error:
                raise ConfigError(f"`costs.{name}`: {error}") from error
        if self.duration < 1_000_000:
            raise ConfigError("`duration` is below 1ms")
        for spec in self.vm:
            if isinstance(spec.workload, LockBound) and not spec.workload.think + spec.workload.hold:
                raise ConfigError("`think` and `hold` cannot both be 0")


def load_scenario(path: Path) -> Scenario:
    """The scenario in the file ``path``; :class:`ConfigError` names file, line and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise ConfigError(f"cannot read {path}: {why}") from error
    return parse_scenario(text, name=str(path))


def parse_scenario(text: str, *, name: str = "scenario") -> Scenario:
    """The scenario in ``text`` (TOML)."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from error
    return build(tree, text, name)


def build(tree: dict[str, Any], text: str, name: str) -> Scenario:
    """The scenario in the parsed ``tree``; ``text`` is where lines are looked up for messages."""
    try:
        return msgspec.convert(tree, Scenario, dec_hook=_decode)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        keys = re.findall(r"[\w-]+|\[\d+\]", path.strip("`").removeprefix("$"))
        named = re.match(r"(?:`|Object contains unknown field `)([\w.-]+)`", message)
        if named:
            keys.extend(named[1].split("."))
            message = message.removeprefix(f"`{named[1]}`: ")
        line = _line_of(text, keys)
        where = f"line {line}: " if line else ""
        raise ConfigError(f"{name}: {where}{'.'.join(keys).replace('.[', '[') or 'scenario'}: {message}") from error


def _decode(kind: type, value: Any) -> Any:
    if kind is Ns:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} has no unit: write a number and ns, us, ms, s or min")
        return Ns(parse_duration(value))
    raise NotImplementedError(kind)


def _line_of(text: str, keys: list[str]) -> int:
    """The line on which the key path ``keys`` is set, or that of the innermost table that is there; 0: nowhere."""
    table: list[str] = []
    counts: dict[str, int] = {}
    best, best_depth = 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([\w.-]+)\s*\]", line)
        assignment = re.match(r"\s*([\w.-]+)\s*=", line)
        if header:
            table = []
            for part in header[2].split("."):
                table.append(part)
                path = ".".join(table)
                if header[1] == "[[" and path == header[2]:
                    counts[path] = counts.get(path, -1) + 1
                if path in counts:
                    table.append(f"[{counts[path]}]")
            here = table
        elif assignment:
            here = [*table, *assignment[1].split(".")]
        else:
            continue
        depth = len(here)
        if here == keys[:depth] and depth > best_depth:
            best, best_depth = number, depth
    return best


def to_toml_tree(scenario: Scenario) -> dict[str, Any]:
    """The scenario as plain values, durations in ns with their unit: what a result file carries."""
    return cast("dict[str, Any]", msgspec.to_builtins(scenario, enc_hook=lambda value: f"{int(value)}ns"))
