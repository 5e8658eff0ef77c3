"""The model engine: guests written as Python generators of operations, thousands of vCPUs without instructions."""

from aiovm.engine.model.cell import Cell
from aiovm.engine.model.context import ModelContext, ModelEngine, ModelPort, Op, Program

__all__ = ["Cell", "ModelContext", "ModelEngine", "ModelPort", "Op", "Program"]
