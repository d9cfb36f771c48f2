"""Cluster, cache, rejections: which parts has each page?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import polars as pl

from dashboards import explored, figures, theme
from dashboards.app.parts import Cell, Heading, Panel, Part, Table, Words
from dashboards.app.state import MEASURES
from dashboards.app.view import Side, View, together
from dashboards.figures import Curve
from mooncake_bench import explore, metrics
from mooncake_bench.records import REUSE
from mooncake_bench.slo import NOTHING, percent

REFUSAL_BINS = 40
LISTED_MAX = 50
NO_SAMPLES = "no samples of instances: external endpoints have none"
MEMBERSHIP = ("lost-", "hand-over", "kv-damaged", "no-instance", "endpoint gone", "worker lost")
"""How the reasons begin that tell of an instance, a transfer or a process that was lost."""


def cluster(view: View) -> list[Part]:
    """What every instance did, and who was not there."""
    parts: list[Part] = []
    for side in view.sides:
        if not side.shown.run.samples.height:
            parts.append(Words(f"{side.label}: {NO_SAMPLES}.", "empty"))
            continue
        parts.append(_load_map(view, side))
        parts.extend(_links(view, side))
    parts.extend(_roles(view))
    if view.sides:
        parts.extend(_faults(view))
    return parts


def _load_map(view: View, side: Side) -> Panel:
    words, unit = MEASURES[view.state.measure]
    frame = _of_samples(view, side, explore.load_map, view.state.measure)
    silent = _of_samples(view, side, explore.silences)
    is_load = view.state.measure == "load"
    limit = "; 1 is the SLO's limit" if is_load else ""
    return Panel(
        f"cluster-map-{side.key}",
        f"{words.capitalize()} of every instance: {side.label}",
        f"Mean by instance and time, in {unit}{limit}. Framed: the instance was silent. A click "
        "opens the slowest request that it began then.",
        explored.heat(frame, side.key, unit, silent, 1.0 if is_load else None),
        frame,
    )


def _links(view: View, side: Side) -> list[Part]:
    frame = _of_samples(view, side, explore.load_map, "link_bytes_per_s")
    frame = frame.with_columns(pl.col("value") / 1e9)
    if not frame["value"].sum():
        return []  # Colocated instances send nothing.
    return [
        Panel(
            f"cluster-links-{side.key}",
            f"Link of every instance: {side.label}",
            "Mean by instance and time, in GB/s of KVCache sent.",
            explored.heat(frame, side.key, "GB/s"),
            frame,
        )
    ]


def _of_samples(
    view: View, side: Side, question: Callable[..., pl.DataFrame], *rest: Any
) -> pl.DataFrame:
    """A frame made of the samples, and of the worst requests where the question takes them."""
    run, store = side.shown.run, view.store
    first: tuple[pl.DataFrame, ...] = (run.samples,)
    if question is explore.load_map:
        name: tuple[Any, ...] = (side.key, run.version, "worst_requests")
        worst = store.remember(name, lambda: explore.worst_requests(run.samples, run.frame))
        first = (run.samples, worst)
    name = (side.key, run.version, question.__name__, *rest)
    return store.remember(name, lambda: question(*first, *rest))


def _roles(view: View) -> list[Part]:
    """Prefill load against decode load, a figure a role."""
    parts: list[Part] = []
    for role in ("prefill", "decode", "colocated"):
        curves = []
        for side in view.sides:
            frame = _of_samples(view, side, metrics.load_over_time)
            own = frame.filter(pl.col("role") == role)
            if own.height:
                label = side.label
                curves.append(Curve(theme.plain(label), side.colour, own, side.key))
        if curves:
            parts.append(
                Panel(
                    f"cluster-{role}",
                    f"Load of the {role} instances",
                    "Predicted time over its SLO: mean line, band from the lowest to the highest "
                    "instance; dashed: the limit.",
                    _titled(figures.load_over_time(curves), "load (of SLO)"),
                    together(curves),
                )
            )
    return parts


def _faults(view: View) -> list[Part]:
    """Silent instances, and requests lost with an instance, a transfer, or a process."""
    rows: list[list[Cell]] = []
    for side in view.sides:
        silent = _of_samples(view, side, explore.silences)
        if silent.height > LISTED_MAX:
            more = f"{silent.height - LISTED_MAX:,} more silences"
            rows.append([Cell(side.label), Cell(more), Cell("not listed"), Cell(NOTHING)])
        for name, start_s, end_s in silent.head(LISTED_MAX).iter_rows():
            text = f"silent from {start_s:,.0f} s to {end_s:,.0f} s"
            rows.append([Cell(side.label), Cell(name), Cell(text), Cell(NOTHING)])
        for row in view.ask(side, explore.refused).iter_rows(named=True):
            if row["reason"].startswith(MEMBERSHIP):
                href = view.link("request", run=side.key, request=row["request"])
                count = Cell(f"{row['requests']:,} requests", row["requests"], href)
                rows.append([Cell(side.label), Cell("requests"), Cell(row["reason"]), count])
    title = Heading("Membership and faults")
    if not rows:
        return [title, Words("Nothing was lost: no instance fell silent, no request was lost.")]
    heads = [(head, "") for head in ("run", "what", "happened", "requests")]
    return [title, Table("faults", heads, rows)]


def cache(view: View) -> list[Part]:
    """How much was reused, from where, and how full the pools were."""
    if not view.sides:
        return []
    hits = view.curves(metrics.hits_over_time)
    parts: list[Part] = [
        Panel(
            "cache-hits",
            "Prefix hits over time",
            "Reused over input tokens, by arrival.",
            _titled(figures.shares_over_time(hits, "hit_ratio"), "prefix hits (share of tokens)"),
            together(hits),
            view.legend,
        )
    ]
    fills = [
        Curve(
            theme.plain(s.label), s.colour, _of_samples(view, s, metrics.pool_fill_over_time), s.key
        )
        for s in view.sides
        if s.shown.run.samples["pool_used_blocks"].count()
    ]
    if fills:
        parts.append(
            Panel(
                "cache-fill",
                "Fill of the KVCache pools",
                "Used over capacity, all instances of a run together.",
                _titled(figures.shares_over_time(fills, "fill"), "pool in use (share of blocks)"),
                together(fills),
                view.legend,
            )
        )
    for side in view.sides:
        frame = view.ask(side, explore.sources_over_time)
        if frame.height:
            parts.append(_sources(side, frame))
    more = [*_replicas(view), *_evictions(view), *_reuse(view)]
    parts += [part for part in more if isinstance(part, Panel)]
    for side in view.sides:
        if side.shown.run.samples["pool_used_blocks"].count():
            pools = _of_samples(view, side, explore.load_map, "pool_used_blocks")
            parts.append(
                Panel(
                    f"cache-pools-{side.key}",
                    f"Pool of every instance: {side.label}",
                    "Blocks in use, mean by instance and time.",
                    explored.heat(pools, side.key, "blocks"),
                    pools,
                    wide=True,
                )
            )
    unknown = [part for part in more if not isinstance(part, Panel)]
    return [*parts, *unknown, *_scraped(view)]


def _sources(side: Side, frame: pl.DataFrame) -> Panel:
    names = explored.SOURCE_NAMES
    return Panel(
        f"cache-sources-{side.key}",
        f"Where prompts came from: {side.label}",
        "Shares of the input tokens, by arrival.",
        explored.sources(frame),
        frame,
        [(names[name], explored.SOURCE_COLOURS[name]) for name in names],
    )


def _replicas(view: View) -> list[Part]:
    curves = view.curves(explore.replicas_over_time)
    known, parts = _known(view, curves, "replicas of blocks")
    if known:
        panel = Panel(
            "cache-replicas",
            "Replicas of hot blocks",
            "How many instances held a block of the prefix that a request asked for, mean by "
            "arrival: a block counts as often as it is asked for.",
            explored.lines(known, "replicas", "instances that hold a block"),
            together(known),
            view.legend,
        )
        parts.insert(0, panel)
    return parts


def _evictions(view: View) -> list[Part]:
    curves = [
        Curve(
            theme.plain(s.label), s.colour, _of_samples(view, s, explore.evictions_over_time), s.key
        )
        for s in view.sides
    ]
    known, parts = _known(view, curves, "evictions")
    if known:
        panel = Panel(
            "cache-evictions",
            "Evictions",
            "Blocks that the pools of a run together let go to make room, by time.",
            explored.lines(known, "blocks_per_s", "evicted (blocks/s)"),
            together(known),
            view.legend,
        )
        parts.insert(0, panel)
    return parts


def _reuse(view: View) -> list[Part]:
    """Reuse distances of the trace, with the sizes of the pools on them."""
    empty = pl.DataFrame(schema=REUSE)
    found = [(side, side.shown.run.reuse()) for side in view.sides]
    curves = [
        Curve(theme.plain(s.label), s.colour, empty if frame is None else frame, s.key)
        for s, frame in found
    ]
    known, parts = _known(view, curves, "reuse distances")
    if known:
        keys = [curve.key for curve in known]
        sizes = [explore.pool_sizes(s.shown.run.samples) for s in view.sides if s.key in keys]
        panel = Panel(
            "cache-reuse",
            "Reuse distance",
            "Of all uses of blocks in the trace, those with at most so many other blocks since "
            "the last use of the same: an LRU pool of that size would have them. Ring: one "
            "instance's pool; dot: all of a run's pools together.",
            explored.reuse(known, sizes),
            together(known),
            view.legend,
            wide=True,
        )
        parts.insert(0, panel)
    return parts


def _known(view: View, curves: list[Curve], what: str) -> tuple[list[Curve], list[Part]]:
    """The curves that have data, and a line for the runs that have none."""
    without = [
        side.label for side, curve in zip(view.sides, curves, strict=True) if not curve.frame.height
    ]
    text = f"{', '.join(without)}: no record of {what}."
    return [one for one in curves if one.frame.height], [Words(text, "quiet")] if without else []


def _scraped(view: View) -> list[Part]:
    """Whatever the server's own metrics said at the end."""
    rows = []
    for side in view.sides:
        last = explore.last_of_server(side.shown.run.server_metrics(), CACHE_METRICS)
        for name, labels, value in last.iter_rows():
            rows.append([Cell(name), Cell(side.label), Cell(labels), Cell(f"{value:,.6g}", value)])
    title = Heading("What the servers said of their caches")
    if not rows:
        text = (
            "No run here has what a server's own metrics say of its cache: give --scrape to a "
            "replay."
        )
        return [title, Words(text, "quiet")]
    heads = [(head, "") for head in ("metric", "run", "labels", "at the end")]
    return [title, Table("scraped", heads, rows)]


CACHE_METRICS = (
    "vllm:prefix_cache",
    "vllm:kv_cache_usage",
    "vllm:external_prefix_cache",
    "mooncake_bench_pool",
    "mooncake_bench_replication",
    "mooncake_bench_evict",
)


def rejections(view: View) -> list[Part]:
    """When and why requests were refused, what that spared and what was wasted."""
    if not view.sides:
        return []
    refused = [(side, view.ask(side, explore.refused)) for side in view.sides]
    some = [(side, frame) for side, frame in refused if frame.height]
    parts: list[Part] = [_refused_numbers(view)]
    if not some:
        return [*parts, Words("No request was rejected and none failed.", "empty")]
    curves = [
        Curve(theme.plain(s.label), s.colour, view.ask(s, metrics.refusals_over_time, REFUSAL_BINS))
        for s, _ in some
    ]
    colours = figures.reason_colours(curves)
    last_s = max(float(side.frame["arrival_s"].max() or 0.0) for side, _ in some)  # type: ignore[arg-type]  # Floats.
    legend = list(colours.items())
    parts.append(
        Panel(
            "rejections-time",
            "When requests were refused",
            "Rejected and failed requests a second, by arrival and reason.",
            _titled(figures.refusals_over_time(curves, last_s / REFUSAL_BINS), "requests/s"),
            together(curves),
            legend,
            wide=True,
        )
    )
    for side, frame in some:
        parts.append(
            Panel(
                f"rejections-reasons-{side.key}",
                f"Why: {side.label}",
                "Requests by reason. A click opens the first of them.",
                explored.refusals(frame, side.key, colours),
                frame,
                legend,
            )
        )
    wasted = view.curves(explore.wasted_over_time)
    parts.append(
        Panel(
            "rejections-wasted",
            "Wasted prefill",
            "Prompt tokens computed for requests that did not finish, by arrival.",
            explored.lines(wasted, "tokens_per_s", "wasted (tokens/s)"),
            together(wasted),
            view.legend,
            wide=True,
        )
    )
    return [*parts, *_refused_table(view, some)]


def _refused_numbers(view: View) -> Table:
    names = ("rejected", "failed", "wasted_prefill_tokens")
    titles = ("rejected (requests)", "failed (requests)", "wasted prefill (tokens)")
    rows = []
    for name, title in zip(names, titles, strict=True):
        values = [side.shown.run.summary.get(name) for side in view.sides]
        cells = [Cell(NOTHING if v is None else f"{v:,}", v) for v in values]
        rows.append([Cell(title), *cells])
    shares = [
        (s.shown.run.summary["rejected"] + s.shown.run.summary["failed"]) / max(s.frame.height, 1)
        for s in view.sides
    ]
    rows.append([Cell("refused, of offered"), *[Cell(percent(v), v) for v in shares]])
    return Table("refused", [("", ""), *view.legend], rows)


def _refused_table(view: View, refused: list[tuple[Side, pl.DataFrame]]) -> list[Part]:
    rows = []
    for side, frame in refused:
        for row in frame.iter_rows(named=True):
            href = view.link("request", run=side.key, request=row["request"])
            numbers = (row["requests"], row["spared_tokens"], row["wasted_tokens"])
            rows.append(
                [
                    Cell(f"{row['reason']}, {side.label}", href=href),
                    Cell(row["status"]),
                    *[Cell(f"{number:,}", number) for number in numbers],
                ]
            )
    heads = ["reason", "", "requests", "prefill spared (tokens)", "prefill wasted (tokens)"]
    return [
        Heading("What each reason spared and wasted"),
        Table("reasons", [(head, "") for head in heads], rows),
    ]


def _titled(figure: go.Figure, y: str) -> go.Figure:
    figure.update_yaxes(title_text=y)
    return figure
