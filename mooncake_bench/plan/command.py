"""What is typed for a plan? `mooncake-bench plan --config plan.toml --out DIR`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mooncake_bench.slo import NOTHING, percent

if TYPE_CHECKING:
    from mooncake_bench.plan.candidate import Trial
    from mooncake_bench.plan.outcome import Outcome
    from mooncake_bench.plan.result import GrowthPlan, PlanReport

INTERRUPTED = 130
HEADS = ("growth", "req/s", "plan", "nodes", "within SLO", "95 % of it", "head-room", "an hour")
results = Console()
diagnostics = Console(stderr=True)


def plan(
    config: Annotated[Path, typer.Option(help="the plan's TOML: trace, SLO, profiles, limits")],
    out: Annotated[Path, typer.Option(help="page, JSON, and the runs kept for the next time")],
    workers: Annotated[
        int, typer.Option(min=0, help="processes; 0: one a core (with --ray local: its CPUs)")
    ] = 0,
    ray: Annotated[
        str, typer.Option(help='run on a Ray cluster instead: its address, "auto" or "local"')
    ] = "",
) -> None:
    """How many nodes, of which kind and split, keep the SLO: search in virtual time, one page."""
    from mooncake_bench.plan.main import plan as make_plan

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with diagnostics.status("reading the trace") as status:
        count = 0

        def on_done(trial: Trial, outcome: Outcome, is_new: bool) -> None:
            nonlocal count
            count += 1
            load = trial.load.speed * trial.load.users
            status.update(f"{count} runs; last {trial.candidate.title} at {load:g}x")

        try:
            report = make_plan(config, out, workers or usable or 1, ray, on_done)
        except KeyboardInterrupt:
            diagnostics.print(
                f"interrupted; what was finished is kept in {out}, the same command goes on there",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(INTERRUPTED) from None
    show(report, out)


def show(report: PlanReport, out: Path) -> None:
    """A line a growth, on stdout."""
    table = Table(*HEADS, box=None)
    for one in report.growths:
        table.add_row(*row(one, report.spec.currency))
    Console(width=max(results.width, 110)).print(table)  # It is read in logs too.
    for one in report.growths:
        if one.infeasible:
            results.print(f"{one.growth:g}x: infeasible: {one.infeasible}", highlight=False)
    counts = report.counts
    results.print(
        f"{counts.run} runs ({counts.stopped} stopped early), {counts.reused} from before, "
        f"{counts.cpu_s:.0f} CPU s, {report.wall_s:.0f} s; written to {out}",
        highlight=False,
        soft_wrap=True,
    )


def row(one: GrowthPlan, currency: str) -> list[str]:
    choice = one.choice
    if choice is None:
        return [f"{one.growth:g}x", f"{one.rate_rps:.3g}", "infeasible", *[NOTHING] * 5]
    held, room = choice.attainment, one.headroom
    return [
        f"{one.growth:g}x",
        f"{one.rate_rps:.3g}",
        choice.title,
        str(choice.nodes),
        percent(held.value),
        f"{100 * held.low:.1f} to {100 * held.high:.1f} %",
        NOTHING if room is None else f"{room:+.0%}",
        f"{choice.price_per_hour:,.0f} {currency}",
    ]
