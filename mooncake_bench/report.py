"""Does disaggregation pay for this traffic, and how much is within the SLOs? One page that says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from dashboards import figures, page, theme
from dashboards.figures import Bar, Curve
from mooncake_bench import findings, metrics, report_replay
from mooncake_bench.findings import Comparison, Side
from mooncake_bench.records import RecordsError, Run
from mooncake_bench.slo import NOTHING, percent, seconds

_ROLES = ("prefill", "decode", "colocated")
_REFUSAL_BINS = 40


def write_report(
    runs: Sequence[Run], out: Path, title: str = "Does disaggregation pay for this traffic?"
) -> Path:
    """Write one self-contained HTML page on `runs` to `out` and return `out`.

    Runs of the same requests, all live or all simulated, stand side by side. The page loads nothing
    from anywhere. Raises RecordsError when there is nothing to report or `out` cannot be written.
    """
    if not runs:
        raise RecordsError("no runs to report; name at least one run directory")
    groups = findings.comparisons(runs)
    sections = [_section(group, f"g{index}") for index, group in enumerate(groups)]
    body = (
        f"<header><h1>{escape(title)}</h1>{_in_short(groups)}</header>"
        f"<main>{_rates(groups)}{''.join(sections)}</main><footer>{_WORDS}</footer>"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page.document(title, body), encoding="utf-8")
    except OSError as error:
        raise RecordsError(f"{out}: cannot write the report ({error.strerror})") from error
    return out


def _in_short(groups: Sequence[Comparison]) -> str:
    items = []
    for index, group in enumerate(groups):
        doubt = "" if _is_valid(group) else "not valid: "
        items.append(
            f'<li><a class="what" href="#g{index}">{escape(_heading(group))}</a>'
            f'<span class="verdict">{escape(doubt + _short_verdict(group))}</span></li>'
        )
    return f'<ul class="short">{"".join(items)}</ul>'


def _rates(groups: Sequence[Comparison]) -> str:
    """Where one traffic was replayed at several rates: how much each system can take."""
    parts = []
    for index, (first, ladders) in enumerate(findings.ladders(groups)):
        colours = theme.system_colours(ladder.system for ladder in ladders)
        named = list(zip(ladders, colours, strict=True))
        kind = "simulated" if first.is_simulated else "live"
        plot = figures.attainment_by_rate(
            [Curve(escape(ladder.short), colour, ladder.points) for ladder, colour in named],
            findings.TARGET_ATTAINMENT,
        )
        sentences = "".join(page.paragraph(_capital(findings.capacity(rung))) for rung in ladders)
        drawn = page.figure(
            plot,
            f"rates{index}",
            f"Attainment by offered rate: {first.trace_name}, {kind}",
            f"Share of offered requests within {first.slo}. Each point is a run.",
            legend=[(ladder.short, colour) for ladder, colour in named],
            wide=True,
        )
        parts.append(sentences + page.figures([drawn]))
    return f"<h3>How much can it take within the SLOs?</h3>{''.join(parts)}" if parts else ""


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _short_verdict(group: Comparison) -> str:
    names = [side.short for side in findings.contenders(group)[:2]]
    return f"{' against '.join(names)}: {findings.verdict(group)}"


def _section(group: Comparison, key: str) -> str:
    colours = theme.system_colours(side.run.info.system for side in group.sides)
    parts = [
        f"<h2>{escape(_heading(group))}</h2>",
        page.paragraph(_setting(group), "quiet"),
        *_banners(group),
        page.paragraph(findings.headline(group), "headline"),
        *[page.paragraph(sentence) for sentence in findings.remarks(group)],
        page.paragraph(_origin_of_times(group), "quiet small modelled"),
        f'<div class="cards">{"".join(map(_card, group.sides, colours))}</div>',
        page.table("numbers", _legend(group, colours), _number_rows(group)),
        report_replay.classes(group, _legend(group, colours)),
        "<h3>How much of it is within the SLOs?</h3>",
        _capacity(group, colours, key),
        "<h3>How long do users wait?</h3>",
        _waiting(group, colours, key),
        "<h3>Where does the time go?</h3>",
        _stages(group, key),
        "<h3>What were the instances doing?</h3>",
        _instances(group, colours, key),
        "<h3>What was run</h3>",
        page.table("facts", _heads(group, colours), _fact_rows(group)),
        *[_configuration(side) for side in group.sides],
    ]
    return f'<section class="comparison" id="{key}">{"".join(parts)}</section>'


# --- Words --------------------------------------------------------------------------------------


def _heading(group: Comparison) -> str:
    kind = "Simulated" if group.is_simulated else "Live"
    rate = f", {group.offered_rps:.3g} req/s" if group.offered_rps else ""
    return f"{kind}: {group.trace_name}{rate}"


def _setting(group: Comparison) -> str:
    side = group.sides[0]
    last = side.run.requests["arrival_s"].max()
    minutes = f" over {last / 60:.3g} minutes" if isinstance(last, float) else ""
    slo = group.slo
    return (
        f"{side.frame.height:,} requests offered{minutes}. SLO: first token within "
        f"{seconds(slo.ttft_s)} of its intended arrival, and TBT (mean of a request's longest 10 % "
        f"of gaps between tokens) of at most {seconds(slo.tbt_s)}."
    )


def _banners(group: Comparison) -> list[str]:
    found = []
    for side in group.sides:
        info = side.run.info
        if not info.valid:
            reasons = info.invalid_reasons or ["no reason was recorded"]
            found.append(page.banner(f"Not a valid run: {side.name}. Do not rely on it.", reasons))
    warnings = [f"{side.name}: {text}" for side in group.sides for text in side.run.info.warnings]
    return found + [page.paragraph(f"Note. {text}", "small modelled") for text in warnings]


def _origin_of_times(group: Comparison) -> str:
    """Which times were measured, and which came out of a model that is wrong by so much."""
    info = group.sides[0].run.info
    name = info.profile.get("name", "an unnamed profile")
    error = str(info.profile.get("error") or "not stated")
    if info.source == "simulated":
        return (
            "Simulated: no request was sent and no GPU was used. The times of prefill, decode and "
            f"transfer come from the profile {name}. Its known error: {error}."
        )
    if info.source == "live-modelled":
        return (
            "Live with modelled engines: requests went through real sockets in real time, but the "
            f"engines only wait as long as the profile {name} says. Its known error: {error}."
        )
    return f"Live ({info.source}): all times were measured."


def _is_valid(group: Comparison) -> bool:
    return all(side.run.info.valid for side in group.sides)


# --- Tables -------------------------------------------------------------------------------------


def _card(side: Side, colour: str) -> str:
    summary = side.run.summary
    of_offered = percent(summary.get("goodput_of_offered"))
    lost = summary["rejected"] + summary["failed"]
    return page.card(
        side.name,
        colour,
        percent(side.attainment),
        [
            "of offered requests within both SLOs",
            f"{side.goodput_rps:.3g} req/s goodput, {of_offered} of the offered rate",
            f"{lost:,} rejected or failed" if lost else "none rejected, none failed",
        ],
    )


def _heads(group: Comparison, colours: Sequence[str]) -> list[tuple[str, str]]:
    return [(side.name, colour) for side, colour in zip(group.sides, colours, strict=True)]


def _number_rows(group: Comparison) -> list[tuple[str, list[str]] | None]:
    def row(name: str, show: Callable[[Any], str], *path: str) -> tuple[str, list[str]]:
        return name, [show(_at(side.run.summary, path)) for side in group.sides]

    bounds = list(group.sides[0].run.summary["attainment_by_tbt"])
    capacities = [
        row(
            f"effective capacity, TBT ≤ {seconds(float(bound))}",
            percent,
            "attainment_by_tbt",
            bound,
        )
        for bound in bounds
    ]
    times = [
        row(f"{label} {quantile}", seconds, key, quantile)
        for label, key in (("TTFT", "ttft_s"), ("TBT", "tbt_s"))
        for quantile in ("p50", "p90", "p99")
    ]
    return [
        *report_replay.fates(group),
        None,
        row("attainment", percent, "attainment"),
        row("goodput (req/s)", _rate, "goodput_rps"),
        *capacities,
        None,
        *times[:3],
        None,
        *times[3:],
        None,
        row("prefix hit ratio", percent, "prefix_hit_ratio"),
        row("prefill engine time a request", seconds, "prefill_busy_s_mean"),
        row("output (tokens/s)", _rate, "output_tokens_per_s"),
        row("prefill wasted on refused requests (tokens)", _count, "wasted_prefill_tokens"),
    ]


def _fact_rows(group: Comparison) -> list[tuple[str, list[str]] | None]:
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("run", lambda run: run.info.name),
        ("source", lambda run: f"{run.info.source}, {run.info.system}"),
        ("started", lambda run: run.info.started_at or NOTHING),
        ("valid", _validity),
        ("trace", _trace),
        (
            "transforms",
            lambda run: "; ".join(map(str, run.info.trace.get("transforms") or ())) or "none",
        ),
        ("arrivals jittered", lambda run: "yes" if run.info.trace.get("jittered") else "no"),
        ("speed", _speed),
        ("seed", lambda run: str(run.info.seed)),
        ("profile", lambda run: str(run.info.profile.get("name", NOTHING))),
        ("its source", lambda run: str(run.info.profile.get("source", NOTHING))),
        ("its known error", lambda run: str(run.info.profile.get("error", NOTHING))),
        ("client lag p50, p99", _lag),
        ("client CPU", _client_cpu),
        ("versions", lambda run: _pairs(run.info.versions)),
        ("machine", _machine),
    ]
    return [(name, [show(side.run) for side in group.sides]) for name, show in facts]


def _validity(run: Run) -> str:
    return "yes" if run.info.valid else f"NO: {'; '.join(run.info.invalid_reasons) or 'no reason'}"


def _trace(run: Run) -> str:
    sha256 = str(run.info.trace.get("sha256", "unknown"))
    return f"{run.info.trace.get('name', 'unnamed')}, sha256 {sha256}"


def _speed(run: Run) -> str:
    speed = run.info.trace.get("speed", 1.0)
    return "the trace's own" if speed == 1 else f"{speed:g} times the trace's"


def _lag(run: Run) -> str:
    lag = run.summary.get("lag_s", {})
    if lag.get("p99") is None:
        return NOTHING if run.info.source != "simulated" else "none: no client"
    return f"{seconds(lag['p50'])}, {seconds(lag['p99'])}"


def _client_cpu(run: Run) -> str:
    share = run.summary.get("client_cpu")
    return NOTHING if share is None else f"{percent(share)} of a core"


def _machine(run: Run) -> str:
    machine = dict(run.info.machine)
    memory = machine.pop("memory_bytes", None)
    if isinstance(memory, int):
        machine["memory"] = f"{memory / 2**30:.0f} GiB"
    return _pairs(machine)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or NOTHING


def _configuration(side: Side) -> str:
    config = msgspec.json.format(msgspec.json.encode(side.run.info.config), indent=2)
    return page.folded(f"Resolved configuration of {side.name}", config.decode())


def _at(summary: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = summary
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- Figures ------------------------------------------------------------------------------------


def _capacity(group: Comparison, colours: Sequence[str], key: str) -> str:
    slo = group.slo
    bounds = np.linspace(0, max(0.35, 2.5 * slo.tbt_s), 176).tolist()
    curves = _curves(group, colours, lambda side: metrics.attainment_curve(side.frame, slo, bounds))
    bars = figures.capacity_bars(
        [curve.label for curve in curves],
        colours,
        [side.run.summary["attainment_by_tbt"] for side in group.sides],
    )
    within = f"with the first token within {seconds(slo.ttft_s)}"
    return page.figures(
        [
            page.figure(
                bars,
                f"{key}-capacity",
                "Effective request capacity",
                f"Share of offered requests {within}, at three TBT bounds.",
                legend=_legend(group, colours),
            ),
            page.figure(
                figures.attainment_curve(curves, slo.tbt_s),
                f"{key}-attainment",
                "Which TBT could be promised?",
                f"Share of offered requests {within}, by TBT bound.",
                legend=_legend(group, colours),
            ),
        ]
    )


def _waiting(group: Comparison, colours: Sequence[str], key: str) -> str:
    plots = [
        ("ttft_s", "Time to first token", group.slo.ttft_s, "TTFT"),
        ("tbt_s", "Time between tokens", group.slo.tbt_s, "TBT"),
    ]
    return page.figures([_cumulative(group, colours, key, *plot) for plot in plots])


def _cumulative(
    group: Comparison,
    colours: Sequence[str],
    key: str,
    column: str,
    title: str,
    bound_s: float,
    axis: str,
) -> str:
    lost = any(side.run.summary["finished"] < side.frame.height for side in group.sides)
    note = "Share of offered requests" + (
        "; a curve that ends below 100 % shows what was rejected or failed." if lost else "."
    )
    curves = _curves(group, colours, lambda side: metrics.cumulative_shares(side.frame, column))
    plot = figures.cumulative(curves, bound_s, axis)
    legend = _legend(group, colours)
    return page.figure(plot, f"{key}-{column.removesuffix('_s')}", title, note, legend=legend)


def _stages(group: Comparison, key: str) -> str:
    if not any(side.run.summary["finished"] for side in group.sides):
        return page.paragraph("No request finished.", "quiet")
    whole = [Bar(escape(side.short), metrics.stage_means(side.frame)) for side in group.sides]
    edges = metrics.input_quartiles([side.frame for side in group.sides])
    by_side = [metrics.stages_by_input(side.frame, edges) for side in group.sides]
    by_input = [
        Bar(f"{label}  {escape(side.short)}", classes[rank])
        for rank, label in enumerate(_length_classes(edges))
        for side, classes in zip(group.sides, by_side, strict=True)
    ]
    until, after = figures.UNTIL_FIRST_TOKEN, figures.AFTER_FIRST_TOKEN
    lengths = "By quartile of input length, in tokens."
    plots = [
        (whole, until, "stages-ttft", "Until the first token", ""),
        (whole, after, "stages-decode", "From the first token to the last", ""),
        (by_input, until, "input-ttft", "Until the first token, by input length", lengths),
        (by_input, after, "input-decode", "From the first token on, by input length", lengths),
    ]
    return page.figures(
        [
            page.figure(
                figures.stage_bars(bars, stages),
                f"{key}-{name}",
                heading,
                note,
                legend=_stage_legend(bars, stages),
            )
            for bars, stages, name, heading, note in plots
        ]
    )


def _length_classes(edges: Sequence[int]) -> list[str]:
    names = [f"{edge / 1000:.3g}k" if edge >= 1000 else str(edge) for edge in edges]
    middle = [f"{low} to {high}" for low, high in pairwise(names)]
    return [f"up to {names[0]}", *middle, f"over {names[-1]}"]


def _instances(group: Comparison, colours: Sequence[str], key: str) -> str:
    hits = _curves(group, colours, lambda side: metrics.hits_over_time(side.frame))
    pools = _curves(group, colours, lambda side: metrics.pool_fill_over_time(side.run.samples))
    parts = [
        _load(group, colours, key),
        _shares(
            hits, "hit_ratio", f"{key}-hits", "Cache hits", "Reused share of the input tokens."
        ),
        _shares(
            pools,
            "fill",
            f"{key}-pool",
            "Fill of the KVCache pools",
            "Share of their blocks in use.",
        ),
        *report_replay.server(group, colours, key),
        _refusals(group, colours, key),
    ]
    shown = [part for part in parts if part]
    if not shown:
        return page.paragraph("The endpoint reports nothing of its instances.", "quiet")
    return page.figures(shown)


def _load(group: Comparison, colours: Sequence[str], key: str) -> str:
    panels = []
    for side, colour in zip(group.sides, colours, strict=True):
        load = metrics.load_over_time(side.run.samples)
        for role in _ROLES:
            part = load.filter(pl.col("role") == role)
            if part.height:
                label = side.short if role == "colocated" else f"{side.short}: {role} instances"
                panels.append(Curve(escape(label), colour, part))
    if not panels:
        return ""
    return page.figure(
        figures.load_over_time(panels),
        f"{key}-load",
        "Load of the instances",
        "Predicted TTFT or TBT over its SLO; at 1.0 (dashed) an instance is at its limit. "
        "Line: mean; band: from the least to the most loaded instance.",
        wide=True,
    )


def _shares(curves: Sequence[Curve], column: str, figure_id: str, title: str, note: str) -> str:
    curves = [curve for curve in curves if curve.frame.height]
    if not curves:
        return ""
    legend = [(unescape(curve.label), curve.colour) for curve in curves]
    plot = figures.shares_over_time(curves, column)
    return page.figure(plot, figure_id, title, note, legend=legend)


def _refusals(group: Comparison, colours: Sequence[str], key: str) -> str:
    curves = _curves(
        group, colours, lambda side: metrics.refusals_over_time(side.frame, _REFUSAL_BINS)
    )
    curves = [curve for curve in curves if curve.frame.height]
    if not curves:
        return ""
    last = max(float(side.frame["arrival_s"].max() or 0.0) for side in group.sides)  # type: ignore[arg-type]
    return page.figure(
        figures.refusals_over_time(curves, last / _REFUSAL_BINS),
        f"{key}-refusals",
        "Rejections and failures",
        "Requests refused a second, by reason and time of arrival.",
        legend=list(figures.reason_colours(curves).items()),
        wide=True,
    )


def _legend(group: Comparison, colours: Sequence[str]) -> list[tuple[str, str]]:
    return [(side.short, colour) for side, colour in zip(group.sides, colours, strict=True)]


def _stage_legend(bars: Sequence[Bar], stages: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (figures.STAGE_NAMES[stage], theme.STAGE_COLOURS[stage])
        for stage in figures.visible_stages(bars, stages)
    ]


def _curves(
    group: Comparison, colours: Sequence[str], frame: Callable[[Side], pl.DataFrame]
) -> list[Curve]:
    return [
        Curve(escape(side.short), colour, frame(side))
        for side, colour in zip(group.sides, colours, strict=True)
    ]


_WORDS = """<h3>Words</h3><dl class="small">
<dt>TTFT</dt><dd>Time from a request's <em>intended</em> arrival to its first token; a client or a
server that is late makes it longer.</dd>
<dt>TBT</dt><dd>Gap between consecutive tokens. A request's TBT is the mean of its longest 10 % of
gaps, as in the Mooncake paper.</dd>
<dt>Attainment</dt><dd>Share of <em>offered</em> requests that finished within every SLO; rejected
and failed ones count against it. The paper's effective request capacity is the same share.</dd>
<dt>Goodput</dt><dd>Requests a second that finished within every SLO, over the time from the start
to the last arrival or the last finish, whichever is later.</dd>
<dt>Load</dt><dd>Predicted TTFT (prefill) or TBT (decode) over its SLO.</dd>
<dt>Prefix hit ratio</dt><dd>Input tokens whose KVCache was reused, over all input tokens of the
requests that were served.</dd></dl>
<p class="small quiet">Written by mooncake-bench. This page loads nothing from the network.</p>"""
