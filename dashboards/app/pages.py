"""Overview, SLO, latency, one request: which parts has each page?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
import polars as pl

from dashboards import explored, figures, theme
from dashboards.app.parts import Alarm, Cards, Cell, Heading, Link, Panel, Part, Table, Words
from dashboards.app.state import TIMES
from dashboards.app.store import Broken
from dashboards.app.view import Side, View, together
from dashboards.figures import Bar
from mooncake_bench import explore, metrics
from mooncake_bench.explore import TBT_STATISTICS
from mooncake_bench.opened import COMPLETE, Glance
from mooncake_bench.slo import NOTHING, Slo, percent, seconds

SURFACE_STEPS = 41


def overview(view: View) -> list[Part]:
    """All runs as a table, the chosen ones as cards and capacities."""
    rows = [_row(view, key, view.store.glance(key)) for key in view.store.runs()]
    found = [row for row in rows if view.state.find.lower() in row[0][0].text.lower()]
    parts: list[Part] = [_glance(view)] if view.sides else []
    if view.sides:
        parts.append(_capacity(view))
    order = {name: at for at, (name, _) in enumerate(_COLUMNS)}[view.state.sort]
    falls = view.state.sort in ("attainment", "goodput", "offered", "started")
    ordered = sorted(found, key=lambda row: _rank(row[0][order], falls))
    heads = [(title, "") for _, title in _COLUMNS]
    parts.append(Heading(f"All runs ({len(found)} of {len(rows)})"))
    parts.append(Table("runs", heads, [row for row, _ in ordered]))
    problems = [problem for _, problem in found if problem]
    if problems:
        parts.append(Alarm("Directories that cannot be shown", problems))
    return parts


_COLUMNS = (
    ("run", "run"),
    ("state", "state"),
    ("source", "source"),
    ("offered", "offered (requests)"),
    ("lost", "rejected, failed (requests)"),
    ("attainment", "attainment"),
    ("goodput", "goodput (req/s)"),
    ("ttft", "TTFT p99"),
    ("tbt", "TBT p99"),
    ("hits", "prefix hits"),
    ("started", "started"),
)


def _row(view: View, key: str, one: Glance | Broken) -> tuple[list[Cell], str]:
    """A line of the table, and the problem that the run has, if any."""
    if isinstance(one, Broken):
        blank = [Cell(NOTHING)] * (len(_COLUMNS) - 2)
        return [Cell(one.key), Cell("cannot be shown"), *blank], one.problem
    summary, info = one.summary, one.info
    state = one.state if info.valid or one.state != COMPLETE else "not valid"
    lost = summary["rejected"] + summary["failed"]
    ttft, tbt = summary["ttft_s"]["p99"], summary["tbt_s"]["p99"]
    goodput, hits = summary["goodput_rps"], summary["prefix_hit_ratio"]
    others = [other for other in view.state.chosen if other != key]
    runs = ",".join([*others, key])
    return [
        Cell(f"{info.name} ({key})", href=view.link("latency", runs=runs)),
        Cell(state),
        Cell(f"{info.source}, {info.system}"),
        Cell(f"{summary['offered']:,}", summary["offered"]),
        Cell(f"{lost:,}", lost),
        Cell(percent(summary["attainment"]), summary["attainment"]),
        Cell(_rate(goodput), goodput),
        Cell(seconds(ttft), ttft),
        Cell(seconds(tbt), tbt),
        Cell(percent(hits), hits),
        Cell(info.started_at[:16].replace("T", " ") or NOTHING),
    ], ""


def _rank(cell: Cell, falls: bool) -> tuple[bool, float, str]:
    if cell.value is None:
        return (cell.text == NOTHING, 0.0, cell.text.lower())
    return (False, -cell.value if falls else cell.value, "")


def _glance(view: View) -> Cards:
    """Attainment of every chosen run at the chosen bounds."""
    cards = []
    for side in view.sides:
        judged = view.judged(side)
        goodput = judged["goodput_rps"]
        lines = [
            f"of offered requests within {view.state.slo(side.slo)}",
            f"goodput {_rate(goodput)} req/s",
        ]
        share = judged["attainment"]
        cards.append((side.key, side.label, side.colour, percent(share), share, lines))
    return Cards(cards)


def _capacity(view: View) -> Panel:
    shares = [view.judged(side)["attainment_by_tbt"] for side in view.sides]
    labels = [escape(side.label) for side in view.sides]
    plot = figures.capacity_bars(labels, [side.colour for side in view.sides], shares)
    rows = [
        {"run": side.key, "tbt_bound_s": float(bound), "attainment": share}
        for side, known in zip(view.sides, shares, strict=True)
        for bound, share in known.items()
    ]
    statistic = TBT_STATISTICS[view.state.stat]
    return Panel(
        "overview-capacity",
        "Effective request capacity",
        f"Share of offered requests with the first token in time, by TBT bound ({statistic}).",
        plot,
        pl.DataFrame(rows),
        view.legend,
        wide=True,
    )


def slo(view: View) -> list[Part]:
    """What the bounds do: attainment, goodput, misses, and both bounds at once."""
    if not view.sides:
        return []
    parts: list[Part] = [_glance(view), _judgement(view)]
    if not view.state.is_own_slo:
        own = view.link("slo", ttft=0.0, tbt=0.0)
        parts.append(Link("Back to each run's own bounds", own))
    return [*parts, *_attainment_lines(view), *_surfaces(view)]


def _judgement(view: View) -> Table:
    judged = [view.judged(side) for side in view.sides]

    def row(
        name: str, show: Callable[[Any], str], get: Callable[[dict[str, Any]], Any]
    ) -> list[Cell]:
        values = [get(one) for one in judged]
        return [Cell(name), *[Cell(show(value), value) for value in values]]

    causes = {
        "rejected": "rejected",
        "failed": "failed",
        "late_first_token": "first token too late",
        "slow_tokens": "tokens too slow",
        "both": "both too late and too slow",
    }
    rows = [
        row("attainment", percent, lambda one: one["attainment"]),
        row("goodput (req/s)", _rate, lambda one: one["goodput_rps"]),
        row("goodput of offered rate", percent, lambda one: one["goodput_of_offered"]),
        row("attainment of finished", percent, lambda one: one["attainment_of_finished"]),
    ]
    rows += [
        row(f"missed: {words} (requests)", _count, lambda one, cause=cause: one["missed_by"][cause])  # type: ignore[misc]  # mypy knows no default of a lambda
        for cause, words in causes.items()
    ]
    classes = sorted({name for one in judged for name in one["by_class"]})
    rows += [
        row(
            f"attainment of class {name}",
            percent,
            lambda one, name=name: one["by_class"].get(name, {}).get("attainment"),  # type: ignore[misc]  # the same
        )
        for name in classes
    ]
    return Table("judgement", [("", ""), *view.legend], rows)


def _attainment_lines(view: View) -> list[Part]:
    slo, stat = view.slo, view.state.stat
    bounds = tuple(np.linspace(0, max(0.35, 2.5 * slo.tbt_s), 176).tolist())
    curves = view.curves(_by_tbt, stat, slo, bounds)
    return [
        Panel(
            "slo-attainment",
            "Which TBT could be promised?",
            f"Share of offered requests with the first token within {seconds(slo.ttft_s)}, by "
            f"bound of the TBT ({TBT_STATISTICS[stat]}).",
            figures.attainment_curve(curves, slo.tbt_s),
            together(curves),
            view.legend,
            wide=True,
        )
    ]


def _by_tbt(frame: pl.DataFrame, statistic: str, slo: Any, bounds: Sequence[float]) -> pl.DataFrame:
    return metrics.attainment_curve(explore.with_statistic(frame, statistic), slo, bounds)


def _surfaces(view: View) -> list[Part]:
    slo = view.slo
    ttft = tuple(np.linspace(0, 2.5 * slo.ttft_s, SURFACE_STEPS).tolist())
    tbt = tuple(np.linspace(0, 2.5 * slo.tbt_s, SURFACE_STEPS).tolist())
    parts: list[Part] = []
    for side in view.sides:
        frame = view.ask(side, _surface, view.state.stat, ttft, tbt)
        parts.append(
            Panel(
                f"slo-surface-{side.key}",
                f"Attainment over both bounds: {side.label}",
                f"Share of offered requests within each pair of bounds (TBT: "
                f"{TBT_STATISTICS[view.state.stat]}). The ring is the chosen pair; a click "
                "chooses another.",
                explored.surface(frame, slo),
                frame,
            )
        )
    return parts


def _surface(
    frame: pl.DataFrame, statistic: str, ttft: Sequence[float], tbt: Sequence[float]
) -> pl.DataFrame:
    return explore.attainment_surface(explore.with_statistic(frame, statistic), ttft, tbt)


def latency(view: View) -> list[Part]:
    """How long requests waited: as shares, over time, by length, and by stage."""
    if not view.sides:
        return []
    column, slo = view.state.time, view.slo
    what = TIMES[column]
    bound_s = {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s}.get(column)
    shares = view.curves(explore.cumulative, column)
    over_time = view.curves(explore.quantiles_over_time, column)
    dots = view.curves(explore.points, column)
    axis = {"input_tokens": "input length", "reused_tokens": "reused tokens"}[view.state.by]
    lengths = [
        Panel(
            "latency-points",
            f"{what} by {axis}",
            "A point a finished request; the slowest tenth of the points is exact, the rest a "
            "sample of the others. A click opens the request.",
            explored.points(dots, view.state.by, column, f"{what} (s)", bound_s),
            together(dots),
            view.legend,
        )
    ]
    return [
        Panel(
            "latency-cumulative",
            f"{what} of the requests",
            "Share of offered requests that finished with at most so much. A click opens a "
            "request of that value.",
            figures.cumulative(shares, bound_s, f"{what} (s)"),
            together(shares),
            view.legend,
        ),
        *lengths,
        Panel(
            "latency-time",
            f"{what} over time",
            "By arrival: p50 dotted, p90 dashed, p99 solid. A click opens the slowest request of "
            "that time.",
            explored.quantiles_over_time(over_time, f"{what} (s)", bound_s),
            together(over_time),
            view.legend,
            wide=True,
        ),
        *_stages(view),
        *_slowest(view, column, what),
    ]


def _stages(view: View) -> list[Part]:
    curves = view.curves(explore.stage_table)
    bars = [Bar(c.label, dict(c.frame.select("stage", "seconds").iter_rows())) for c in curves]
    if not any(value for bar in bars for value in bar.stages_s.values()):
        return []
    stages = figures.visible_stages(bars, metrics.STAGES)
    return [
        Panel(
            "latency-stages",
            "Where the mean request spent its time",
            "Mean over finished requests, from intended arrival to the last token.",
            figures.stage_bars(bars, metrics.STAGES),
            together(curves),
            [(figures.STAGE_NAMES[one], theme.STAGE_COLOURS[one]) for one in stages],
            wide=True,
        )
    ]


def _slowest(view: View, column: str, what: str) -> list[Part]:
    """The slowest requests as links: the way to a journey without a mouse."""
    rows = []
    for side in view.sides:
        frame = view.ask(side, explore.slowest, column, 6)
        for row in frame.iter_rows(named=True):
            href = view.link("request", run=side.key, request=row["request"])
            rows.append(
                [
                    Cell(f"request {row['request']}, {side.label}", href=href),
                    Cell(seconds(row[column]), row[column]),
                    Cell(_count(row["input_tokens"]), row["input_tokens"]),
                    Cell(_count(row["reused_tokens"]), row["reused_tokens"]),
                    Cell(row["prefill"] or NOTHING),
                    Cell(row["decode"] or NOTHING),
                ]
            )
    heads = ["slowest", what, "input (tokens)", "reused (tokens)", "prefill", "decode"]
    return [Heading(f"Slowest by {what}"), Table("slowest", [(h, "") for h in heads], rows)]


def request(view: View) -> list[Part]:
    """One request's journey."""
    side = chosen_side(view)
    if side is None:
        return []
    frame = side.shown.run.frame
    wanted = view.state.request
    if wanted < 0 and side.frame.height:
        wanted = view.ask(side, explore.slowest, "e2e_s", 1)["request"][0]
    rows = frame.filter(pl.col("request") == wanted)
    if not rows.height:
        return [Words(f"{side.label} has no request {wanted}; give another number.", "empty")]
    row = rows.row(0, named=True)
    bounds = view.state.slo(side.slo)
    chunks = side.shown.run.chunks(wanted)
    stages = explore.journey(row, chunks)
    parts: list[Part] = [Heading(f"Request {wanted} of {side.label}"), Words(_said(row))]
    if stages.height:
        parts.extend(_journey(row, stages, bounds, _in_parts(row, chunks)))
    gaps = explore.gaps_of(rows, side.shown.run.spans(wanted))
    if gaps.height:
        parts.append(
            Panel(
                "request-gaps",
                "Its gaps between tokens",
                f"Each token after the first, {gaps.height + 1:,} tokens.",
                explored.gaps(gaps, side.colour, bounds),
                gaps,
                wide=True,
            )
        )
    return [
        *parts,
        Heading("Predicted and happened"),
        _expected(row),
        *_predictions(view),
        Heading("All of its record"),
        _record(row),
    ]


def _in_parts(row: dict[str, Any], chunks: pl.DataFrame | None) -> str:
    """What is known of its chunks and its transfer."""
    if chunks is None:
        prefill = "No chunks of prefills are recorded in this run: one bar."
    elif chunks.height:
        prefill = f"Prefilled in {chunks.height} chunks, told apart by shade."
    else:
        prefill = "Prefilled in one go."
    if row["prefill"] is not None and row["prefill"] == row["decode"]:
        return f"{prefill} It was decoded where it was prefilled: nothing was transferred."
    if row["transfer_start_s"] is None:
        return f"{prefill} When its transfer began is not recorded: what lasted beyond the prefill."
    if row["prefill_end_s"] is not None and row["transfer_start_s"] >= row["prefill_end_s"]:
        return f"{prefill} Its KV was sent after the prefill."
    return f"{prefill} Its KV was sent layer by layer meanwhile: the lighter part came after."


def _predictions(view: View) -> list[Part]:
    """All requests: TTFT as the Conductor predicted it, and as it came."""
    curves = view.curves(explore.predictions)
    if not any(curve.frame.height for curve in curves):
        return [Words("No run here tells what a Conductor predicted.", "empty")]
    return [
        Panel(
            "request-predictions",
            "What the Conductor predicted for all requests",
            "A point a request, from its intended arrival: on the dashed line as predicted, "
            "above it later. A click opens the request.",
            explored.predictions(curves),
            together(curves),
            view.legend,
            wide=True,
        )
    ]


def _journey(row: dict[str, Any], stages: pl.DataFrame, bounds: Slo, in_parts: str) -> list[Part]:
    predicted = _predicted_from_arrival(row)
    marks = [(at, name) for at, name in ((predicted, "predicted"), (row["ttft_s"], "came")) if at]
    before = stages.filter(~pl.col("stage").is_in(figures.AFTER_FIRST_TOKEN))
    parts: list[Part] = []
    if before.height:
        parts.append(
            Panel(
                "request-first-token",
                "Until its first token",
                f"From its intended arrival. {in_parts} Lines: the first token as predicted, and "
                "as it came.",
                explored.journey(before, [(at, f"first token {name}") for at, name in marks]),
                before,
                wide=True,
            )
        )
    last_s = stages["end_s"].max()
    inside = isinstance(last_s, float) and bounds.ttft_s <= 1.2 * last_s
    parts.append(
        Panel(
            "request-journey",
            "Its whole journey",
            "All stages from its intended arrival to its end.",
            explored.journey(stages, [(bounds.ttft_s, "TTFT bound")] if inside else []),
            stages,
            wide=True,
        )
    )
    return parts


def chosen_side(view: View) -> Side | None:
    """The run that the address names, or the first."""
    named = [side for side in view.sides if side.key == view.state.run]
    return (named or view.sides or [None])[0]  # type: ignore[list-item]  # None where there is none


def _said(row: dict[str, Any]) -> str:
    ending = row["status"] + (f": {row['reason']}" if row["reason"] else "")
    placed = f"; prefill on {row['prefill']}" if row["prefill"] else ""
    placed += f", decode on {row['decode']}" if row["decode"] else ""
    tokens = f"{row['input_tokens']:,} input tokens"
    if row["reused_tokens"] is not None:
        tokens += f" of which {row['reused_tokens']:,} reused"
    if row["fetched_tokens"]:
        tokens += f" ({row['fetched_tokens']:,} fetched from another instance)"
    return f"{ending}. {tokens}; {_count(row['output_tokens'])} tokens of output{placed}."


def _predicted_from_arrival(row: dict[str, Any]) -> float | None:
    if row["predicted_ttft_s"] is None or row["placed_s"] is None:
        return None
    return float(row["predicted_ttft_s"] + row["placed_s"] - row["arrival_s"])


def _expected(row: dict[str, Any]) -> Table:
    predicted = _predicted_from_arrival(row)
    lines = [
        ("TTFT, from intended arrival", predicted, row["ttft_s"]),
        ("TBT", row["predicted_tbt_s"], row["tbt_s"]),
    ]
    rows = []
    for name, expected, came in lines:
        both = expected is not None and came is not None
        off = came - expected if both else None
        rows.append([Cell(name), *[Cell(seconds(v), v) for v in (expected, came, off)]])
    heads = ["", "predicted by the Conductor", "as it came", "later by"]
    return Table("expected", [(head, "") for head in heads], rows)


def _record(row: dict[str, Any]) -> Table:
    rows = [
        [Cell(name), Cell(_shown(name, value), value if isinstance(value, float | int) else None)]
        for name, value in row.items()
        if value is not None
    ]
    return Table("record", [("column", ""), ("value", "")], rows, is_numbers=False)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f} s" if name.endswith("_s") or "_s_" in name else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and name != "request" else str(value)


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
