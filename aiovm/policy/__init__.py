"""Who runs next: the host's policies, and their names on the command line.

``by_name("gang", slice_ns=3_000_000)`` makes a policy; ``by_name("my.module:MyPolicy")`` one of the user's own, which
derives from :class:`aiovm.policy.base.Policy`. Options are the class's keyword arguments.
"""

from __future__ import annotations

import importlib
import inspect

from aiovm.errors import ConfigError
from aiovm.policy.balance import Balance
from aiovm.policy.base import Policy
from aiovm.policy.fair import Fair
from aiovm.policy.gang import Gang, RelaxedGang
from aiovm.policy.micro_slice import MicroSlice
from aiovm.policy.never_preempt_holder import NeverPreemptHolder
from aiovm.policy.random_ import Random

__all__ = ["POLICIES", "by_name"]

#: The built-in policies by name. The base class is the plain round robin.
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Fair, Policy, NeverPreemptHolder, Gang, RelaxedGang, Balance, MicroSlice, Random)
}


def by_name(name: str, **options: int) -> Policy:
    """Make the policy called ``name``; an unknown name or option is a :class:`ConfigError`."""
    cls = _user_class(name) if ":" in name else POLICIES.get(name)
    if cls is None:
        raise ConfigError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}, and module:Class")
    known = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option not in known and not takes_any:
            raise ConfigError(f"policy {name!r} has no option {option!r}; it has {', '.join(known)}")
    return cls(**options)


def _user_class(name: str) -> type[Policy]:
    module_name, _, class_name = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy {name!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ConfigError(f"policy {name!r} does not derive from aiovm.policy.base.Policy")
    return cls
