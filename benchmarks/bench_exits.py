"""Exits answered in Python, a second, by kind, beside QEMU TCG's cost of the same instruction."""

from __future__ import annotations

from benchmarks.common import aiovm_seconds, best, qemu_seconds, show

KINDS = ("cpuid", "msr", "port", "mmio", "hypercall", "rdtsc", "pause")
_ROUNDS = 400_000
_NOT_IN_QEMU = frozenset({"hypercall"})


def main() -> None:
    """Measure and print."""
    rows = []
    for kind in KINDS:
        few = best(lambda k=kind: aiovm_seconds("bench", f"loop={k} n=1", ple=False))
        many = best(lambda k=kind: aiovm_seconds("bench", f"loop={k} n={_ROUNDS}", ple=False))
        ours = (many - few) / _ROUNDS
        peer = None
        if kind not in _NOT_IN_QEMU:
            low, high = qemu_seconds(f"loop={kind} n=1"), qemu_seconds(f"loop={kind} n={_ROUNDS * 10}")
            if low is not None and high is not None:
                peer = (high - low) / (_ROUNDS * 10)
        rows.append(
            [
                kind,
                f"{1 / ours / 1000:,.0f}k",
                f"{ours * 1e9:,.0f}",
                "-" if peer is None else f"{peer * 1e9:,.0f}",
                "-" if peer is None else f"{ours / peer:.1f}",
            ]
        )
    show("Exits answered inline", ("exit", "a second", "aiovm ns", "QEMU TCG ns", "aiovm/QEMU"), rows)


if __name__ == "__main__":
    main()
