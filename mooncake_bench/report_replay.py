"""What does the page say of the replay itself: every request's fate, its classes, the server?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape, unescape
from typing import Any

from dashboards import figures, page
from dashboards.figures import Curve
from mooncake_bench import server_gauges
from mooncake_bench.findings import Comparison
from mooncake_bench.records import read_server_metrics
from mooncake_bench.slo import NOTHING, Slo, percent, seconds

Row = tuple[str, list[str]]

_FATES = {
    "offered": "offered",
    "sent": "sent",
    "attempts": "sends, with retries",
    "finished": "finished",
    "rejected_early": "rejected early",
    "failed_late": "failed late",
    "abandoned": "given up by the client",
    "not_sent": "never sent",
}
"""What accounting.py counts, in the page's words."""
_ONLY_IF_ANY = ("sent", "attempts", "abandoned", "not_sent")
"""A simulation sends nothing, and most clients give nothing up."""


def fates(group: Comparison) -> list[Row]:
    """Rows of the table of numbers: what became of every offered request."""
    accounts = [side.run.summary.get("accounting", {}) for side in group.sides]
    rows = []
    for key, name in _FATES.items():
        if key == "attempts" and all(one.get(key) == one.get("sent") for one in accounts):
            continue
        if key in _ONLY_IF_ANY and not any(one.get(key) for one in accounts):
            continue
        rows.append((name, [_count(one.get(key)) for one in accounts]))
    return rows


def classes(group: Comparison, heads: Sequence[tuple[str, str]]) -> str:
    """Attainment by class of the trace, each against its own bounds; "" where it has no classes."""
    by_class = [side.run.summary.get("by_class") or {} for side in group.sides]
    names = sorted({name for one in by_class for name in one})
    rows: list[Row | None] = []
    for name in names:
        known = [one.get(name, {}) for one in by_class]
        bounds = next(one["slo"] for one in known if one)
        rows.append((f"{name}: offered", [_count(one.get("offered")) for one in known]))
        held_to = _bounds(Slo(**bounds))
        rows.append((f"within {held_to}", [percent(one.get("attainment")) for one in known]))
        for label, key in (("TTFT", "ttft_s"), ("TBT", "tbt_s")):
            p99 = [seconds((one.get(key) or {}).get("p99")) for one in known]
            rows.append((f"{label} p99", p99))
        rows.append(None)
    if not rows:
        return ""
    return "<h3>How do the classes fare?</h3>" + page.table("numbers", heads, rows)


def server(group: Comparison, colours: Sequence[str], key: str) -> list[str]:
    """Figures of what the servers' own metrics said, for those that were asked and answered."""
    frames = [read_server_metrics(side.run) for side in group.sides]
    parts = []
    for gauge in server_gauges.GAUGES:
        curves = [
            Curve(escape(side.short), colour, server_gauges.over_time(frame, gauge))
            for side, colour, frame in zip(group.sides, colours, frames, strict=True)
        ]
        if not (curves := [curve for curve in curves if curve.frame.height]):
            continue
        draw = figures.shares_over_time if gauge.is_share else figures.counts_over_time
        parts.append(
            page.figure(
                draw(curves, "value"),
                f"{key}-{gauge.key}",
                gauge.title,
                "By the server's own metrics, read once a second.",
                legend=[(unescape(curve.label), curve.colour) for curve in curves],
            )
        )
    return parts


def _bounds(slo: Slo) -> str:
    return f"TTFT ≤ {seconds(slo.ttft_s)}, TBT ≤ {seconds(slo.tbt_s)}"


def _count(value: Any) -> str:
    return NOTHING if value is None else f"{value:,}"
