"""The optional native block hook; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aiovm.engine.unicorn._budget",
            ["aiovm/engine/unicorn/_budget.c", "aiovm/engine/unicorn/_delivery.c"],
            depends=["aiovm/engine/unicorn/_budget.h"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,  # without a compiler the Python twin does the same work, slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
