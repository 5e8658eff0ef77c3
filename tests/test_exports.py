"""Public means listed: each module's ``__all__`` is complete, true and without repetition."""

import ast
import importlib
import pkgutil

import pytest

import aiovm

NAMES = [m.name for m in pkgutil.walk_packages(aiovm.__path__, "aiovm.") if not m.name.endswith("._budget")]
MODULES = [name for name in NAMES if not name.endswith("__main__")]


def tree(module):
    with open(module.__file__, encoding="utf-8") as source:
        return ast.parse(source.read())


def is_package(module):
    return hasattr(module, "__path__")


@pytest.mark.parametrize("name", MODULES)
def test_what_is_listed_exists_once(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if listed is None:
        assert is_package(module), "a module lists its public names"
        return
    assert len(set(listed)) == len(listed)
    for public in listed:
        assert hasattr(module, public), public


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_listed(name):
    module = importlib.import_module(name)
    defined = {
        node.name
        for node in tree(module).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(getattr(module, "__all__", ()))


@pytest.mark.parametrize("name", NAMES)
def test_every_module_says_what_it_is(name):
    module = importlib.import_module(name) if not name.endswith("__main__") else None
    if module is not None:
        assert (module.__doc__ or "").strip(), "a docstring first"
