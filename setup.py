"""The optional native block hook; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aiovm.engine.unicorn._budget",
            [f"aiovm/engine/unicorn/_{name}.c" for name in ("budget", "delivery", "exits", "port", "tlb")],
            depends=["aiovm/engine/unicorn/_budget.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,  # without a compiler the Python twin does the same work, slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
