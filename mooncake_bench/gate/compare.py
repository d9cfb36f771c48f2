"""How do two sides differ? Every usual number with its interval, and no verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from mooncake_bench.gate import baselines, likeness, words
from mooncake_bench.gate.command import diagnostics, results, say
from mooncake_bench.gate.errors import Invalid
from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.gate.exact import changed_decisions
from mooncake_bench.gate.policy import Check
from mooncake_bench.gate.repeated import Batch, interval_of
from mooncake_bench.gate.verdict import INVALID, Finding, direction
from mooncake_bench.slo import NOTHING

USUAL = (
    "offered", "finished", "rejected", "failed", "attainment", "goodput_rps",
    "ttft_s.mean", "ttft_s.p50", "ttft_s.p90", "ttft_s.p99",
    "tbt_s.mean", "tbt_s.p50", "tbt_s.p90", "tbt_s.p99",
    "e2e_s.p50", "prefix_hit_ratio", "output_tokens_per_s", "lag_s.p99",
)  # fmt: skip  # a line a metric would be a page
COUNTS = ("offered", "finished", "rejected", "failed")


def compare(
    a: Annotated[str, typer.Argument(help="run directory, or a directory of runs")],
    b: Annotated[str, typer.Argument(help="the other")],
    metric: Annotated[list[str] | None, typer.Option(help="instead of the usual ones")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help=f"may differ: {', '.join(likeness.ASPECTS)}, all")
    ] = None,
) -> None:
    """How do B's runs differ from A's? Medians of runs, differences, 95 % intervals."""
    batch = Batch(baselines.read_side([a]), baselines.read_side([b]))
    try:
        remarks = likeness.check_alike(batch.baseline, batch.candidate, allow or [])
    except Invalid as error:
        diagnostics.print(
            f"mooncake-bench: {error}", style="red", highlight=False, soft_wrap=True, markup=False
        )
        raise typer.Exit(INVALID) from None
    table = Table("", Path(a).name or a, Path(b).name or b, "change", "95 % of it", box=None)
    for name in metric or USUAL:
        table.add_row(*row(name, batch))
    results.print(table)
    for line in [*remarks, what_it_is(batch)]:
        say(line)


def row(metric: str, batch: Batch) -> tuple[str, ...]:
    """A metric of both sides, with the difference."""
    sides = [[one.value(metric) for one in side] for side in (batch.baseline, batch.candidate)]
    if any(value is None for side in sides for value in side):
        shown = [NOTHING if None in side else words.value(metric, middle(side)) for side in sides]
        return metric, *shown, NOTHING, NOTHING
    old, new = middle(sides[0]), middle(sides[1])
    low, high = None, None
    if not batch.baseline[0].is_simulated and metric not in COUNTS:
        check = Check(metric=metric, rule="", better="smaller", scale=1.0, estimator="median")
        low, high = interval_of(check, batch, np.array(sides[0]), np.array(sides[1]))
    found = Finding(
        metric=metric,
        rule="",
        outcome="observed",
        why="",
        better=direction(metric),
        baseline=old,
        candidate=new,
        low=low,
        high=high,
    )
    return words.cells(found)[:5]


def what_it_is(batch: Batch) -> str:
    """How far the numbers can be trusted, in a sentence."""
    first, second = batch.baseline[0], batch.candidate[0]
    if first.is_simulated:
        return decisions(first, second)
    runs = min(len(batch.baseline), len(batch.candidate))
    if runs == 1:
        return (
            "One run of a side: the intervals are of parts of it, and know nothing of how runs "
            "differ; repeat both (5 and more) before believing a difference."
        )
    return f"Medians of {len(batch.baseline)} and {len(batch.candidate)} runs."


def decisions(first: Evidence, second: Evidence) -> str:
    """What the Conductor decided otherwise in virtual time."""
    count, told = changed_decisions(first.decisions, second.decisions)
    if not count:
        return "In virtual time, without noise: every request was decided alike."
    return f"In virtual time, without noise: {count:,} requests were decided otherwise; {told}."


def middle(values: list[float | None]) -> float:
    return float(np.median([value for value in values if value is not None]))
