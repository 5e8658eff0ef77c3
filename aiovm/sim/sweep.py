"""Sweeps: a scenario over ranges of its parameters and several seeds, resumable.

    --set pcpus=1..16 --set vm.workload.hold=1us,2us,4us

A parameter is a path into the scenario's tables; ``pcpus``, ``policy`` and ``slice`` alone mean the host's. Paths into
``vm`` concern every machine. Each result is stored as it comes, under a name that is a function of the scenario and
seed; what is stored already is not run again, so an interrupted sweep goes on where it was. A result of other sources
of aiovm's is refused: it might not be what these would say. A policy of one's own is not looked at.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aiovm.errors import ConfigError
from aiovm.results import store, to_json
from aiovm.sim.jobs import run_jobs
from aiovm.sim.result import SimResult  # noqa: TC001  (msgspec reads the annotations)
from aiovm.sim.scenario import HostSpec, Scenario, build, to_toml_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Point", "changed", "points", "run_sweep", "split_setting"]

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MOST = 100_000


class Point(msgspec.Struct, frozen=True):
    """One run of a sweep: what was set, and the seed."""

    settings: dict[str, str]
    seed: int
    scenario: Scenario

    @property
    def name(self) -> str:
        """The file name of its result."""
        text = msgspec.json.encode([to_toml_tree(self.scenario), self.seed], order="deterministic")
        return hashlib.blake2b(text, digest_size=12).hexdigest() + ".json"


def points(base: Scenario, settings: Sequence[str], seeds: int) -> list[Point]:
    """Every combination of the ``settings`` (``path=1..16`` or ``path=a,b``) with seeds 1 to ``seeds``."""
    axes = [_axis(setting) for setting in settings]
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = {path: value for (path, _), value in zip(axes, values, strict=True)}
        scenario = changed(base, chosen)
        found += [Point(chosen, seed, scenario) for seed in range(1, seeds + 1)]
        if len(found) > _MOST:
            raise ConfigError(f"a sweep of more than {_MOST} runs")
    return found


def changed(base: Scenario, settings: Mapping[str, str]) -> Scenario:
    """``base`` with other values: path into its tables, value."""
    tree = copy.deepcopy(to_toml_tree(base))
    for path, value in settings.items():
        _set(tree, path, value)
    return build(tree, "", " ".join(f"{path}={value}" for path, value in settings.items()))


def split_setting(setting: str, form: str) -> tuple[str, str]:
    """The two sides of ``path=value``; ``form`` is what the refusal of another setting says."""
    path, equals, value = setting.partition("=")
    if not equals or not path or not value:
        raise ConfigError(f"bad setting {setting!r}: write {form}")
    return path, value


def _axis(setting: str) -> tuple[str, list[str]]:
    path, text = split_setting(setting, "path=1..16 or path=a,b")
    values: list[str] = []
    for part in text.split(","):
        bounds = _RANGE.fullmatch(part)
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            if not first <= last < first + _MOST:
                raise ConfigError(f"bad range {part!r} in {setting!r}")
            values += [str(v) for v in range(first, last + 1)]
        else:
            values.append(part)
    return path, values


def _set(tree: dict[str, Any], path: str, text: str) -> None:
    keys = path.split(".")
    if len(keys) == 1 and keys[0] in HostSpec.__struct_fields__:
        keys.insert(0, "host")
    tables: list[Any] = [tree]
    for key in keys[:-1]:
        deeper: list[Any] = []
        for table in tables:
            inner = table.get(key) if isinstance(table, dict) else None
            if inner is None:
                raise ConfigError(f"a scenario has no {path!r}")
            deeper += inner if isinstance(inner, list) else [inner]
        tables = deeper
    value: Any = text
    if text in ("true", "false"):
        value = text == "true"
    elif re.fullmatch(r"-?\d+", text):
        value = int(text)
    for table in tables:
        table[keys[-1]] = value


@functools.cache
def _program() -> str:
    """A digest of aiovm's sources."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


class _Stored(msgspec.Struct, frozen=True):
    program: str
    settings: dict[str, str]
    seed: int
    result: SimResult


def run_sweep(todo: Sequence[Point], out: Path, *, executor: str = "process") -> Iterator[tuple[Point, SimResult]]:
    """Run what ``out`` does not hold yet; yields every point with its result, the stored ones first."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {out}: {error.strerror}") from error
    missing = []
    for point in todo:
        stored = _load(out / point.name)
        if stored is None:
            missing.append(point)
        else:
            yield point, stored
    if missing:
        for place, result in run_jobs([(p.scenario, p.seed) for p in missing], executor=executor):
            _store(out / missing[place].name, missing[place], result)
            yield missing[place], result


def _load(path: Path) -> SimResult | None:
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a result of a sweep: {error}") from error
    if stored.program != _program():
        raise ConfigError(f"{path} is a result of another version of aiovm: give another directory")
    return stored.result


def _store(path: Path, point: Point, result: SimResult) -> None:
    try:
        store(path, to_json(_Stored(_program(), point.settings, point.seed, result)))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
