"""What does the terminal show of a verdict? What matters first: everything breached, in short."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mooncake_bench.gate import words
from mooncake_bench.gate.verdict import Finding, Verdict, scenarios_of

ROWS_MAX = 60
STYLES = {"breached": "bold red", "too noisy": "yellow", "observed": "dim", "pass": ""}


def show(verdict: Verdict, console: Console) -> None:
    """The findings as tables, one a scenario, and the verdict as the last line."""
    shown = visible(verdict)
    for scenario in scenarios_of(shown[:ROWS_MAX]):
        console.print(
            table(scenario, [one for one in shown[:ROWS_MAX] if one.scenario == scenario])
        )
    if len(shown) > ROWS_MAX:
        console.print(f"... and {len(shown) - ROWS_MAX} more; --out DIR writes all", style="dim")
    for line in [*verdict.remarks, verdict.setting]:
        console.print(line, highlight=False, soft_wrap=True)
    if verdict.exit_code and verdict.locally:
        console.print(f"To see it: {verdict.locally}", highlight=False, soft_wrap=True)
    console.print(
        verdict.headline, style=STYLES[verdict.outcome] or "green", highlight=False, soft_wrap=True
    )


def visible(verdict: Verdict) -> list[Finding]:
    """In virtual time what is as it was says nothing; live every metric is worth a line."""
    if verdict.tier == 2:
        return verdict.findings
    return [one for one in verdict.findings if one.outcome != "pass"]


def table(title: str, findings: list[Finding]) -> Table:
    has_interval = any(one.low is not None for one in findings)
    columns = [index for index, head in enumerate(words.HEADS) if has_interval or head != "95 %"]
    drawn = Table(
        *[words.HEADS[index] for index in columns],
        title=title or None,
        title_justify="left",
        box=None,
    )
    for one in findings:
        row = words.cells(one)
        drawn.add_row(*[row[index] for index in columns], style=STYLES[one.outcome])
    return drawn
