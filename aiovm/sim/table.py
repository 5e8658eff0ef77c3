"""A simulation's result for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from aiovm.units import format_ns

if TYPE_CHECKING:
    from rich.console import Console

    from aiovm.sim.result import SimResult

__all__ = ["print_result"]

#: More machines than this are summed up by the busiest ones.
_MOST_ROWS = 40


#: Where nobody looks, lines are this long.
_PLAIN_WIDTH = 170


def print_result(result: SimResult, console: Console) -> None:
    """One row a machine, and a line for the host."""
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    table = Table(title=f"{result.scenario}, seed {result.seed}, {format_ns(result.duration_ns)}")
    names = ("machine", "vCPUs", "ops/s", "wait p50", "p99", "max", "spin", "CPU", "steal", "fairness", "LHP", "LWP")
    for name in (*names, "PLE", "yields", "kicks", "halts"):
        table.add_column(name, justify="left" if name == "machine" else "right")
    for vm in result.vms[:_MOST_ROWS]:
        table.add_row(
            vm.name,
            str(vm.vcpus),
            f"{vm.throughput_ops_per_s:,.0f}",
            format_ns(vm.wait_p50_ns),
            format_ns(vm.wait_p99_ns),
            format_ns(vm.wait_max_ns),
            f"{100 * vm.spin_share:.1f} %",
            f"{100 * vm.cpu_share:.1f} %",
            f"{100 * vm.steal_share:.1f} %",
            f"{vm.fairness:.3f}",
            str(vm.holder_preemptions),
            str(vm.waiter_preemptions),
            str(vm.ple_exits),
            f"{vm.yields_won}/{vm.yields_tried}",
            str(vm.kicks),
            str(vm.halts),
        )
    console.print(table)
    more = len(result.vms) - _MOST_ROWS
    if more > 0:
        console.print(f"and {more} more machines")
    console.print(
        f"{result.pcpus} physical CPUs, policy {result.policy}: {100 * result.busy_share:.1f} % busy, "
        f"{result.switches:,} switches, {result.throughput:,.0f} operations a second in all"
    )
