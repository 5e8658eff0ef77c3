"""The floors: imports go down only, and asyncio, host time and randomness stay where they belong."""

import ast
import functools
import graphlib
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import aiovm

ROOT = Path(aiovm.__file__).parent

#: Module patterns (without ``aiovm.``) by floor; the first that matches counts.
FLOORS = {
    0: ("errors", "units", "bits", "trace", "stats", "results"),
    1: (
        "requests",
        "exits",
        "kvm_run",
        "memory",
        "bus",
        "irq",
        "clock",
        "slice_thread",
        "costs",
        "tsc",
        "guest_debug",
        "engine.base",
        "kvm_structs",
    ),
    2: (
        "lapic*",
        "pvclock",
        "kvmclock",
        "paravirt*",
        "mmu",
        "page_walk",
        "segmentation",
        "task_switch",
        "task_register",
        "descriptor_tables",
        "interrupt_return",
        "control",
        "smm",
        "delivery",
        "events",
        "spin",
        "halt_poll",
        "panic",
        "cpuid",
        "devices*",
    ),
    3: ("engine", "engine.*"),
    4: ("machine", "port", "vcpu", "vcpu_*", "policy.thread"),
    5: ("loop", "policy*"),
    6: ("vm", "vm_*", "pc", "acpi", "console", "snapshot*", "loaders*", "guests", "sinks*", "backends*"),
    7: ("", "__main__", "cli*", "locks*", "sim*", "gdb*"),
}

#: A protocol may name, for the type checker, what stands above it.
NAMED_FROM_BELOW = {("machine", "loop"), ("engine.base", "events")}

ASYNCIO = ("clock", "slice_thread", "loop", "vcpu", "vcpu_halt", "vm", "vm_rest", "vm_slices", "console")
HOST_TIME = ("clock",)
RANDOM = ("loop", "policy.*", "sim.machine", "backends.entropy")
#: Extensions in C; they import nothing.
NATIVE = {"aiovm.engine.unicorn._budget"}
#: On the wall clock a guest's keys must not hang on a seed.
SYSTEM_RANDOM = ("backends.entropy",)
UNSEEDED = {"secrets", "uuid"}


def floor_of(module):
    for floor, patterns in FLOORS.items():
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return floor
    return None


@functools.cache
def modules():
    """Every module's name, without ``aiovm.``, and its syntax tree."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


@functools.cache
def imports(module):
    """What ``module`` imports: (name, whether for the type checker only). Ours without ``aiovm.``."""
    tree = modules()[module]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in set(names) - NATIVE:
            found.add((ours(name) or name.partition(".")[0], ours(name) is not None, id(node) in typing_only))
    return frozenset(found)


def ours(name):
    """The module of ours that ``name`` is, or is in; None for somebody else's."""
    if name.partition(".")[0] != "aiovm":
        return None
    name = name.removeprefix("aiovm").lstrip(".")
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_floor(module):
    assert floor_of(module) is not None, f"put {module} into the table"


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    for name, is_ours, typing_only in imports(module):
        if is_ours and not (typing_only and (module, name) in NAMED_FROM_BELOW):
            assert floor_of(name) <= floor_of(module), f"{module} imports {name} from above"


def test_no_module_imports_itself_in_a_circle():
    graph = {m: {n for n, is_ours, typing_only in imports(m) if is_ours and not typing_only} - {m} for m in modules()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(modules())


@pytest.mark.parametrize("module", modules())
def test_asyncio_stays_above(module):
    allowed = floor_of(module) >= 6 or module in ASYNCIO
    assert allowed or "asyncio" not in {n for n, _, _ in imports(module)}


@pytest.mark.parametrize("module", modules())
def test_host_time_is_read_in_the_clock_alone(module):
    names = {n for n, _, _ in imports(module)}
    assert module in HOST_TIME or "time" not in names
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"utcnow", "today"}, f"{module} asks the host for the date in line {node.lineno}"
            if node.attr == "now" and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                assert owner not in {"datetime", "date"}, f"{module} asks the host for the date in line {node.lineno}"


@pytest.mark.parametrize("module", modules())
def test_randomness_comes_from_the_hosts_generator(module):
    names = {n for n, _, typing_only in imports(module) if not typing_only}
    assert "random" not in names or any(fnmatchcase(module, pattern) for pattern in RANDOM)
    assert not names & UNSEEDED
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute):
            assert node.attr != "urandom", f"{module} asks the host for randomness in line {node.lineno}"
        if "random" in names and isinstance(node, ast.Attribute) and ast.unparse(node).startswith("random."):
            allowed = {"Random"} | ({"SystemRandom"} if module in SYSTEM_RANDOM else set())
            assert node.attr in allowed, f"{module} uses the unseeded generator in line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "random.Random":
            assert node.args, f"{module} seeds a generator from the host in line {node.lineno}"


def test_the_core_does_not_know_unicorn():
    for module in modules():
        if not module.startswith("engine.unicorn"):
            assert "unicorn" not in {n for n, is_ours, _ in imports(module) if not is_ours}, module


def test_the_design_tells_every_modules_floor():
    text = (ROOT.parent / "docs" / "design.md").read_text()
    told = {}
    for floor, names in re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE):
        told[int(floor)] = re.findall("`([^`]+)`", names)
    assert set(told) == set(FLOORS)
    for module in set(modules()) - {"", "__main__"}:
        by_name = [floor for floor, names in told.items() if module in names]
        matching = [f for f, names in told.items() if any(fnmatchcase(module, re.sub("/$", "*", n)) for n in names)]
        assert (by_name or matching) == [floor_of(module)], module


def test_a_table_of_floors_that_lies_is_noticed():
    assert [
        floor_of(m) for m in ("errors", "engine.base", "engine.unicorn.engine", "policy.thread", "policy.fair")
    ] == [
        0,
        1,
        3,
        4,
        5,
    ]
    assert floor_of("nonsense") is None
