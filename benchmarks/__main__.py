"""``python -m benchmarks [name ...]``: all of them, or those named (engine, exits, switches, scheduler, ...)."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

names = [p.stem.removeprefix("bench_") for p in sorted(Path(__file__).parent.glob("bench_*.py"))]
parser = argparse.ArgumentParser(
    prog="python -m benchmarks", description="Measures aiovm beside its neighbours, in one run; read the ratios."
)
parser.add_argument("name", nargs="*", help=f"all, or some of: {', '.join(names)}")
for name in parser.parse_args().name or names:
    if name not in names:
        parser.error(f"no benchmark is called {name!r}; there are {', '.join(names)}")
    importlib.import_module(f"benchmarks.bench_{name}").main()
