"""Real x86 machine code on Unicorn 2.1.4."""

from aiovm.engine.unicorn.context import UnicornContext
from aiovm.engine.unicorn.engine import UnicornEngine

__all__ = ["UnicornContext", "UnicornEngine"]
