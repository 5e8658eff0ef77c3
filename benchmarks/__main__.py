"""``python -m benchmarks [name ...]``: all of them, or those named (engine, exits, switches, scheduler, ...)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

names = [p.stem.removeprefix("bench_") for p in sorted(Path(__file__).parent.glob("bench_*.py"))]
for name in sys.argv[1:] or names:
    if name not in names:
        sys.exit(f"no benchmark is called {name!r}; there are {', '.join(names)}")
    importlib.import_module(f"benchmarks.bench_{name}").main()
