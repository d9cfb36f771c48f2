"""A run in a terminal's window: how far is it, and how much of it is within the SLOs?"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mooncake_bench import explore
from mooncake_bench.opened import COMPLETE, RUNNING, Opened
from mooncake_bench.slo import NOTHING, percent, seconds

BARS = "▁▂▃▄▅▆▇█"


def watched(run: Opened) -> RenderableType:
    """The run in some twelve lines."""
    summary, info = run.summary, run.info
    style = {RUNNING: "cyan", COMPLETE: "green"}.get(run.state, "red")
    state = run.state if info.valid or run.state != COMPLETE else "not valid"
    title = Text.assemble((info.name, "bold"), "  ", (state, style), f"  {info.source}")
    lines: list[RenderableType] = [title]
    if planned := info.client.get("planned"):
        bar = Table.grid()  # A bar alone does not end its line.
        bar.add_row(ProgressBar(total=planned, completed=summary["offered"], width=60))
        lines.append(bar)
    lines.append(_numbers(summary, str(info.slo)))
    if run.frame.height:
        lines.append(_over_time(run))
    lines += [Text(reason, style="red") for reason in info.invalid_reasons]
    return Group(*lines)


def _numbers(summary: dict[str, Any], slo: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    lost = f"{summary['rejected']:,} rejected, {summary['failed']:,} failed"
    goodput = summary["goodput_rps"]
    table.add_row("ended", f"{summary['offered']:,} requests, {lost}")
    table.add_row("within SLO", f"{percent(summary['attainment'])} ({slo})")
    table.add_row("goodput", NOTHING if goodput is None else f"{goodput:.3g} req/s")
    for name, key in (("TTFT", "ttft_s"), ("TBT", "tbt_s")):
        spread = summary[key]
        said = [f"{quantile} {seconds(spread[quantile])}" for quantile in ("p50", "p90", "p99")]
        table.add_row(name, "  ".join(said))
    table.add_row("prefix hits", percent(summary["prefix_hit_ratio"]))
    return table


def _over_time(run: Opened) -> Table:
    """p99 of both times as a row of bars each, with the highest beside it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, column in (("TTFT p99", "ttft_s"), ("TBT p99", "tbt_s")):
        values = explore.quantiles_over_time(run.frame, column, 48)["p99"].to_list()
        highest = max(values, default=0.0)
        bars = "".join(BARS[min(int(value / highest * 7.99), 7)] for value in values if highest)
        table.add_row(name, bars, f"up to {seconds(highest)}")
    return table
