"""What does the terminal show of a verdict? What matters first: everything breached, in short."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from mooncake_bench.gate import statistics, words
from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.gate.policy import Check, Policy
from mooncake_bench.gate.verdict import Finding, Verdict, scenarios_of
from mooncake_bench.metrics import Floats
from mooncake_bench.slo import NOTHING

ROWS_MAX = 60
STYLES = {"breached": "bold red", "too noisy": "yellow", "observed": "dim", "pass": ""}


def show(verdict: Verdict, console: Console) -> None:
    """The findings as tables, one a scenario, and the verdict as the last line."""

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)

    shown = visible(verdict)
    for scenario in scenarios_of(shown[:ROWS_MAX]):
        found = [one for one in shown[:ROWS_MAX] if one.scenario == scenario]
        console.print(table(scenario, found))
        for line in reasons(found):
            say(f"   {line}")
    if len(shown) > ROWS_MAX:
        say(f"... and {len(shown) - ROWS_MAX} more; --out DIR writes all", "dim")
    for line in [*verdict.remarks, verdict.setting]:
        say(line)
    if verdict.exit_code and verdict.locally:
        say(f"To see it: {verdict.locally}")
    say(verdict.headline, STYLES[verdict.outcome] or "green")


def reasons(findings: list[Finding]) -> list[str]:
    """Why, where a row of numbers does not say it; of requests decided otherwise the first."""
    return [
        f"{one.metric}: {one.why}" for one in findings if one.why not in ("changed", "not gated")
    ]


def visible(verdict: Verdict) -> list[Finding]:
    """In virtual time what is as it was says nothing; live every metric is worth a line."""
    if verdict.tier == 2:
        return verdict.findings
    return [one for one in verdict.findings if one.outcome != "pass"]


def table(title: str, findings: list[Finding]) -> Table:
    has_interval = any(one.low is not None for one in findings)
    heads = [head for head in words.HEADS[:-1] if has_interval or head != "95 %"]
    drawn = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for head in heads:
        drawn.add_column(head, no_wrap=True)
    for one in findings:
        row = dict(zip(words.HEADS, words.cells(one), strict=True))
        drawn.add_row(*[row[head] for head in heads], style=STYLES[one.outcome])
    return drawn


def noise_table(old: list[Evidence], new: list[Evidence], policy: Policy) -> Table:
    """Of the runs that are recorded: what was, what is, and what so many repeats can tell apart."""
    drawn = Table("metric", "old", "new", "run to run", "finds from", box=None)
    for check in policy.of("gate"):
        values = [one.value(check.metric) for one in new]
        known = np.array([value for value in values if value is not None])
        if known.size < len(new):
            continue
        before = [one.value(check.metric) for one in old]
        was = [value for value in before if value is not None]
        middle = float(np.median(known))
        drawn.add_row(
            check.metric,
            words.value(check.metric, float(np.median(was)) if was else None),
            words.value(check.metric, middle),
            _variation(known, middle),
            _finds(check, known, middle),
        )
    return drawn


def _variation(values: Floats, middle: float) -> str:
    if len(values) < 2 or not middle:
        return NOTHING
    return f"{float(values.std(ddof=1)) / abs(middle):.1%}".replace("%", " %")


def _finds(check: Check, values: Floats, middle: float) -> str:
    slack = abs(check.bound(middle) - middle)
    if len(values) < 3 or not middle or not slack:
        return NOTHING
    noise = statistics.worse(values - middle, check.better)
    sizes = (len(values), len(values))
    least = statistics.detectable(noise, sizes, check.estimator, slack)
    needed = statistics.repeats_needed(noise, check.estimator, slack)
    more = f" (wants {needed or 'over 100'} runs)" if least > 2 * slack else ""
    return f"{least / abs(middle):.1%}".replace("%", " %") + more
