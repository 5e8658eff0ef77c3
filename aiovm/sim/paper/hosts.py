"""Rows about the host: gangs and balance, halt polling, and a directed yield that must do nothing (rows 11, 12, D)."""

from __future__ import annotations

from statistics import median

import msgspec

from aiovm.sim.paper.row import MS, Row, Runs, Verdict, scenario, throughputs
from aiovm.sim.scenario import Features, HostSpec, LockBound, Ns, Scenario, TcpRr, VmSpec

__all__ = ["ROWS"]

# ---- 11: gangs ---------------------------------------------------------------------------------------------------

_COMPUTE = LockBound(lock="ticket", hold=Ns(0), think=Ns(1_000_000))


def _judge_11(runs: Runs) -> Verdict:
    gang = [a / b for a, b in zip(throughputs(runs, "gang"), throughputs(runs, "alone"), strict=True)]
    balance = [a / b for a, b in zip(throughputs(runs, "balance"), throughputs(runs, "fair"), strict=True)]
    idle = [1 - r.busy_share for r in runs["4+2"]]
    return Verdict(
        gang,
        {
            "gang >= 0.97": median(gang) >= 0.97,
            "balance no worse": median(balance) >= 1.0,
            "4+2 on 4 idles exactly 25 %": all(i == 0.25 for i in idle),
        },
        f"gang {median(gang):.3f} of 1:1; balance {100 * (median(balance) - 1):+.1f} % over fair; idle {idle[0]:.4f}",
    )


# ---- 12: halt polling --------------------------------------------------------------------------------------------

_POLLING = {
    "none": Features(halt_poll=Ns(0)),
    "always": Features(halt_poll_dynamic=False),
    "dynamic": Features(),
}


def _judge_12(runs: Runs) -> Verdict:
    latency = {k: median(r.vms[0].wait_p50_ns for r in runs[f"rr {k}"]) for k in _POLLING}
    idle = {k: 100 * median(r.vms[0].cpu_share for r in runs[f"idle {k}"]) for k in _POLLING}
    return Verdict(
        [float(r.vms[0].wait_p50_ns) for r in runs["rr dynamic"]],
        {
            "polling helps": latency["always"] < latency["none"],
            "dynamic within 3 % of always": abs(latency["dynamic"] / latency["always"] - 1) <= 0.03,
            "idle within 0.2 points of none": abs(idle["dynamic"] - idle["none"]) <= 0.2,
        },
        "latency "
        + ", ".join(f"{k} {latency[k] / 1000:.1f} us" for k in _POLLING)
        + "; idle at 250 Hz "
        + ", ".join(f"{k} {idle[k]:.2f} %" for k in _POLLING),
    )


# ---- D: undercommit ----------------------------------------------------------------------------------------------


def _judge_d(runs: Runs) -> Verdict:
    with_yield, without = runs["directed yield"], runs["none"]
    same = all(msgspec.to_builtins(a) == msgspec.to_builtins(b) for a, b in zip(with_yield, without, strict=True))
    spun = min(sum(vm.ple_exits for vm in r.vms) for r in with_yield)
    won = [float(sum(vm.yields_won for vm in r.vms)) for r in (*with_yield, *runs["2011"])]
    return Verdict(
        won,
        {"spinners did exit": spun > 0, "no yield won": not any(won), "same run as without": same},
        f"{spun} PAUSE-loop exits at least; runs with and without directed yield {'equal' if same else 'differ'}",
    )


_UNDERCOMMIT = LockBound(lock="ticket", hold=Ns(20_000), think=Ns(20_000))

ROWS = (
    Row(
        "11",
        "gang scheduling against independent; balance scheduling",
        "no collapse under gang; balance up to 8 % better; strict 4+2 vCPUs on 4 CPUs idle 25 %",
        "gang >= 0.97 of 1:1; balance >= fair; the 25 % exact",
        "ticket lock at 2:1 under gang scheduling, of 1:1",
        "Sukwong and Kim, EuroSys 2011; Ousterhout, ICDCS 1982",
        {
            "alone": scenario(1, warmup_ms=50),
            "gang": scenario(2, policy="gang"),
            "fair": scenario(2, LockBound(lock="tas"), vcpus=6),
            "balance": scenario(2, LockBound(lock="tas"), vcpus=6, policy="balance"),
            "4+2": Scenario(
                warmup=Ns(120 * MS),
                duration=Ns(240 * MS),
                host=HostSpec(pcpus=4, policy="gang", jitter=0),
                vm=[
                    VmSpec(name="wide", vcpus=4, workload=_COMPUTE),
                    VmSpec(name="narrow", vcpus=2, workload=_COMPUTE),
                ],
            ),
        },
        _judge_11,
    ),
    Row(
        "12",
        "halt polling: none, always, dynamic",
        "TCP_RR 34, 27, 26.7 us; idle at 250 Hz 1.1, 4.6-14, 1.2 %",
        "dynamic latency within 3 % of always, idle cost within 0.2 points of none",
        "TCP_RR latency with dynamic polling, ns",
        "Linux commit aca6ff29c406",
        {
            **{
                f"rr {k}": scenario(1, TcpRr(), vcpus=1, pcpus=1, features=f, warmup_ms=20, duration_ms=100)
                for k, f in _POLLING.items()
            },
            **{
                f"idle {k}": scenario(
                    1, TcpRr(clients=False, ticks=250), vcpus=1, pcpus=1, features=f, warmup_ms=100, duration_ms=2000
                )
                for k, f in _POLLING.items()
            },
        },
        _judge_12,
    ),
    Row(
        "D",
        "undercommit: yield_to with one task a run queue",
        "must do nothing",
        "no yield won, and the run is the same to the last figure as without directed yield",
        "directed yields won",
        "kernel/sched/core.c, yield_to; Linux commit c45c528899",
        {
            "directed yield": scenario(
                1, _UNDERCOMMIT, features=Features(ple_grows=False), warmup_ms=5, duration_ms=20
            ),
            "none": scenario(
                1, _UNDERCOMMIT, features=Features(ple_grows=False, directed_yield=False), warmup_ms=5, duration_ms=20
            ),
            "2011": scenario(
                1,
                _UNDERCOMMIT,
                features=Features(
                    ple_grows=False, ready_filter=False, eligibility_filter=False, kernel_mode_filter=False
                ),
                warmup_ms=5,
                duration_ms=20,
            ),
        },
        _judge_d,
    ),
)
