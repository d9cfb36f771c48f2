"""What does a closer look at a run show? One function a figure: frames in, a figure out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from dashboards import theme
from dashboards.figures import STAGE_NAMES, Curve
from mooncake_bench.slo import Slo, seconds

# Light is little and dark is much, on both papers; made for colour-blind eyes.
SHADES = "Cividis"
FRAMED_MAX = 40
SOURCE_NAMES = {
    "own": "reused, of the same instance",
    "fetched": "reused, fetched from another",
    "computed": "computed",
}
SOURCE_COLOURS = {"own": "#4f8f7b", "fetched": "#c2a84f", "computed": "#9aa0a8"}
_DASHES = {"p50": "2px,3px", "p90": "7px,4px", "p99": "solid"}


def quantiles_over_time(curves: Sequence[Curve], what: str, bound_s: float | None) -> go.Figure:
    """p50, p90 and p99 by arrival: time_s, p50, p90, p99 (seconds), request."""
    figure = go.Figure()
    values = [
        value
        for curve in curves
        for name in _DASHES
        for value in curve.frame[name].drop_nulls()
        if value > 0
    ]
    for curve in curves:
        for name, dash in _DASHES.items():
            figure.add_scatter(
                name=f"{curve.label} {name}",
                x=curve.frame["time_s"] / 60,
                y=curve.frame[name],
                customdata=curve.clickable,
                mode="lines+markers" if name == "p99" else "lines",
                marker={"size": 5},
                line={"color": curve.colour, "width": 2, "dash": dash},
                hovertemplate="%{x:.1f} min: %{y:.3g} s<extra>%{fullData.name}</extra>",
            )
    theme.styled(figure, height=320, x="minutes since start", y=what)
    figure.update_xaxes(rangemode="tozero")
    if values:
        shown = [*values, bound_s] if bound_s else values
        figure.update_yaxes(**theme.seconds_log_axis(min(shown) * 0.8, max(shown) * 1.3))
    if bound_s:
        _across(figure, bound_s)
    return figure


def points(curves: Sequence[Curve], x: str, y: str, what: str, bound_s: float | None) -> go.Figure:
    """A point a request: columns `x` (tokens) and `y` (seconds), request."""
    figure = go.Figure()
    values = [v for curve in curves for v in curve.frame[y].drop_nulls() if v > 0]
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame[x],
            y=curve.frame[y],
            customdata=curve.clickable,
            mode="markers",
            marker={"color": curve.colour, "size": 6, "opacity": 0.55},
            hovertemplate="request %{customdata[1]}: %{x:,} tokens, %{y:.3g} s"
            "<extra>%{fullData.name}</extra>",
        )
    titles = {"input_tokens": "input length (tokens)", "reused_tokens": "reused (tokens)"}
    theme.styled(figure, height=340, x=titles[x], y=what)
    figure.update_xaxes(rangemode="tozero", nticks=6)
    if values:
        shown = [*values, bound_s] if bound_s else values
        figure.update_yaxes(**theme.seconds_log_axis(min(shown) * 0.8, max(shown) * 1.3))
    if bound_s:
        _across(figure, bound_s)
    return figure


def surface(frame: pl.DataFrame, slo: Slo) -> go.Figure:
    """Attainment at pairs of bounds: ttft_bound_s, tbt_bound_s, attainment; `slo` is marked."""
    ttft = frame["ttft_bound_s"].unique().sort().to_list()
    tbt = frame["tbt_bound_s"].unique().sort().to_list()
    shares = frame["attainment"].to_numpy().reshape(len(ttft), len(tbt))
    figure = go.Figure(
        go.Heatmap(
            x=[bound * 1e3 for bound in tbt],
            y=ttft,
            z=shares,
            customdata=[[["slo", a, b] for b in tbt] for a in ttft],
            colorscale=SHADES,
            zmin=0,
            zmax=1,
            colorbar=_colour_bar("within SLO", ".0%"),
            hovertemplate="TTFT ≤ %{y:.3g} s, TBT ≤ %{x:.3g} ms: %{z:.1%}<extra></extra>",
        )
    )
    theme.styled(figure, height=320, x="TBT bound (ms)", y="TTFT bound (s)")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    figure.add_scatter(
        x=[slo.tbt_s * 1e3],
        y=[slo.ttft_s],
        mode="markers",
        marker={"symbol": "circle-open", "size": 15, "color": "#d5681c", "line_width": 4},
        hovertemplate=f"{slo}<extra>chosen</extra>",
    )
    figure.update_xaxes(range=[0, tbt[-1] * 1e3])
    figure.update_yaxes(range=[0, ttft[-1]])
    return figure


def heat(
    frame: pl.DataFrame,
    run: str,
    unit: str,
    silences: pl.DataFrame | None = None,
    limit: float | None = None,
) -> go.Figure:
    """A value of every instance over time: instance, time_s, value and, to click, request.

    `limit` fixes the top of the colours; `silences` (instance, start_s, end_s) are framed.
    """
    names = frame["instance"].unique(maintain_order=True).to_list()
    times = frame["time_s"].unique().sort().to_list()
    rows = {name: at for at, name in enumerate(names)}
    columns = {time: at for at, time in enumerate(times)}
    values = np.full((len(names), len(times)), np.nan)
    worst: list[list[Any]] = [[None] * len(times) for _ in names]
    requests = frame["request"] if "request" in frame.columns else [None] * frame.height
    cells = zip(frame["instance"], frame["time_s"], frame["value"], requests, strict=True)
    for name, time, value, request in cells:
        values[rows[name], columns[time]] = value
        worst[rows[name]][columns[time]] = None if request is None else [run, request]
    figure = go.Figure(
        go.Heatmap(
            x=[time / 60 for time in times],
            y=[escape(name) for name in names],
            z=[[None if np.isnan(v) else float(v) for v in row] for row in values],
            customdata=worst,
            colorscale=SHADES,
            zmin=0,
            zmax=limit or float(np.nanmax(values, initial=0.0)) or 1.0,
            colorbar=_colour_bar(unit, ".3~f" if limit else ".3~s"),
            hovertemplate="%{y}, %{x:.1f} min: %{z:.3~s} " + unit + "<extra></extra>",
        )
    )
    theme.styled(figure, height=110 + max(24 * len(names), 60), x="minutes since start")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category", title_text="")
    if len(names) <= 40:
        figure.update_yaxes(tickvals=names, ticktext=names)
    silent = silences.head(FRAMED_MAX).iter_rows() if silences is not None else ()
    # All at once: Plotly looks at every shape again for each one that is added.
    figure.update_layout(shapes=[_frame(rows[name], *times_s) for name, *times_s in silent])
    return figure


def _frame(row: int, start_s: float, end_s: float) -> dict[str, Any]:
    """An orange frame around a row's cells from start to end."""
    return {
        "type": "rect",
        "x0": start_s / 60,
        "x1": end_s / 60,
        "y0": row - 0.5,
        "y1": row + 0.5,
        "line": {"color": "#d5681c", "width": 2},
    }


def lines(curves: Sequence[Curve], column: str, y: str, dash: str = "solid") -> go.Figure:
    """A value over time, one line a run: time_s and `column`, in the unit that `y` names."""
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["time_s"] / 60,
            y=curve.frame[column],
            mode="lines",
            line={"color": curve.colour, "width": 2, "dash": dash},
            hovertemplate="%{x:.1f} min: %{y:.4~s}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=260, x="minutes since start", y=y)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero", nticks=6)
    return figure


def sources(frame: pl.DataFrame) -> go.Figure:
    """Where one run's prompts came from: time_s and shares own, fetched, computed."""
    figure = go.Figure()
    for name in ("own", "fetched", "computed"):
        figure.add_scatter(
            name=SOURCE_NAMES[name],
            x=frame["time_s"] / 60,
            y=frame[name],
            mode="lines",
            stackgroup="tokens",
            line={"width": 0.5, "color": SOURCE_COLOURS[name]},
            hovertemplate="%{x:.1f} min: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=260, x="minutes since start", y="share of input tokens")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def reuse(curves: Sequence[Curve], sizes: Sequence[tuple[float, float] | None]) -> go.Figure:
    """The share of block uses within a reuse distance: distance_blocks (log axis), share.

    `sizes[i]` are the blocks of one pool of run i and of all its pools: marked on its curve.
    """
    figure = go.Figure()
    for curve, size, dash in zip(curves, sizes, _each(len(curves)), strict=True):
        distance = curve.frame["distance_blocks"].clip(lower_bound=1.0)
        figure.add_scatter(
            name=curve.label,
            x=distance,
            y=curve.frame["share"],
            mode="lines",
            line={"color": curve.colour, "width": 2, "dash": dash},
            hovertemplate="%{y:.1%} within %{x:,.3~s} blocks<extra>%{fullData.name}</extra>",
        )
        if size is not None and distance.len():
            figure.add_scatter(
                name=curve.label,
                x=list(size),
                y=np.interp(size, distance, curve.frame["share"], left=0.0).tolist(),
                customdata=["one instance's pool", "all pools together"],
                mode="markers",
                marker={
                    "symbol": ["circle-open", "circle"],
                    "color": curve.colour,
                    "size": 11,
                    "line_width": 2.5,
                },
                hovertemplate="%{customdata}: %{x:,.3~s} blocks would have %{y:.1%}"
                "<extra>%{fullData.name}</extra>",
            )
    theme.styled(figure, height=300, x="reuse distance (blocks)", y="share of block uses")
    figure.update_xaxes(type="log", dtick=1, tickformat=".0s")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", nticks=6)
    return figure


def _each(count: int) -> list[str]:
    """A dash for each of so many lines: those of one trace lie upon each other."""
    dashes = ("solid", "9px,7px", "3px,5px", "12px,4px,3px,4px")
    return [dashes[at % len(dashes)] for at in range(count)]


def predictions(curves: Sequence[Curve]) -> go.Figure:
    """TTFT predicted against TTFT as it came: predicted_s, ttft_s, request."""
    figure = go.Figure()
    values = [
        value
        for curve in curves
        for column in ("predicted_s", "ttft_s")
        for value in curve.frame[column]
        if value > 0
    ]
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["predicted_s"],
            y=curve.frame["ttft_s"],
            customdata=curve.clickable,
            mode="markers",
            marker={"color": curve.colour, "size": 6, "opacity": 0.5},
            hovertemplate="request %{customdata[1]}: predicted %{x:.3g} s, came after %{y:.3g} s"
            "<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=340, x="TTFT as predicted", y="TTFT as it came")
    if values:
        low, high = min(values) * 0.8, max(values) * 1.3
        figure.update_xaxes(**theme.seconds_log_axis(low, high, 4))
        figure.update_yaxes(**theme.seconds_log_axis(low, high))
        figure.add_scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            line={"color": theme.QUIET, "width": 1, "dash": "4px,3px"},
            hoverinfo="skip",
        )
    return figure


def journey(frame: pl.DataFrame, marks: Sequence[tuple[float, str]]) -> go.Figure:
    """One request's stages in time: stage, where, part, start_s, end_s (from its arrival).

    Parts of a stage share its line, every second one in a lighter shade. `marks` are lines at
    moments of the same clock, each with its name.
    """
    figure = go.Figure()
    is_new = pl.struct("stage", "where") != pl.struct("stage", "where").shift(1)
    line = is_new.fill_null(True).cum_sum() - 1
    lines = frame.with_columns(line.cast(pl.Int64).alias("line"))
    stages = lines.group_by("line", maintain_order=True).agg(
        pl.col("stage", "where").first(), pl.col("start_s").min(), pl.col("end_s").max()
    )
    places = stages.select("stage", "where").iter_rows()
    # Two lines: on a phone the time needs the width.
    labels = [f"{STAGE_NAMES[stage]}<br>{escape(where or '?')}" for stage, where in places]
    end_s = max([*frame["end_s"].to_list(), *[at for at, _ in marks]], default=0.0)
    before = -1
    for stage, _, part, start, end, row in lines.iter_rows():
        shade, before = (0.6 if row == before else 1.0), (-1 if row == before else row)
        what = f"{labels[row].replace('<br>', ', ')}{', ' if part else ''}{part}"
        figure.add_bar(
            y=[row],
            base=[start],
            x=[end - start],
            orientation="h",
            marker={"color": theme.STAGE_COLOURS[stage], "line_width": 0, "opacity": shade},
            hovertemplate=f"{what}<br>from {start:.4g} s to {end:.4g} s<extra></extra>",
        )
    for row, start, end in stages.select("line", "start_s", "end_s").iter_rows():
        is_left, is_inside = end < 0.75 * end_s, start < 0.4 * end_s
        figure.add_annotation(
            x=end if is_left else start,
            y=row,
            text=f" {seconds(end - start)} ",
            showarrow=False,
            xanchor="left" if is_left or is_inside else "right",
            font={"color": theme.INK if is_left or not is_inside else "#ffffff"},
        )
    theme.styled(
        figure, height=80 + 17 * len(marks) + 36 * stages.height, x="seconds since arrival (s)"
    )
    figure.update_layout(bargap=0.3, barmode="overlay", margin_t=12 + 17 * len(marks))
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        tickvals=list(range(stages.height)),
        ticktext=labels,
        tickfont={"color": theme.INK, "size": 11.5},
    )
    figure.update_xaxes(range=[0, end_s * 1.04 or 1.0], nticks=4, tickangle=0)
    for step, (at, text) in enumerate(marks):
        _down(figure, at, f"{text} {seconds(at)}", step, at > 0.3 * end_s)
    return figure


def gaps(frame: pl.DataFrame, colour: str, slo: Slo) -> go.Figure:
    """One request's gaps between tokens: time_s (from its arrival), gap_s."""
    figure = go.Figure()
    figure.add_scatter(
        x=frame["time_s"],
        y=frame["gap_s"] * 1e3,
        mode="lines+markers",
        line={"color": colour, "width": 1, "shape": "hv"},
        marker={"size": 3},
        hovertemplate="%{x:.3f} s: %{y:.3g} ms<extra></extra>",
    )
    theme.styled(figure, height=240, x="seconds since arrival (s)", y="gap before the token (ms)")
    figure.update_yaxes(rangemode="tozero", nticks=6)
    largest = frame["gap_s"].max()
    if isinstance(largest, float) and slo.tbt_s < 3 * largest:
        _across(figure, slo.tbt_s * 1e3, f"TBT bound {seconds(slo.tbt_s)}")
    return figure


def refusals(frame: pl.DataFrame, run: str, colours: dict[str, str]) -> go.Figure:
    """How many requests each reason cost one run: reason, requests, request."""
    figure = go.Figure(
        go.Bar(
            x=frame["requests"],
            y=[escape(reason) for reason in frame["reason"]],
            orientation="h",
            customdata=[[run, request] for request in frame["request"]],
            marker={"color": [colours[reason] for reason in frame["reason"]], "line_width": 0},
            text=[f"{count:,}" for count in frame["requests"]],
            textposition="auto",
            hovertemplate="%{y}: %{x:,} requests<extra></extra>",
        )
    )
    theme.styled(figure, height=100 + 30 * frame.height, x="requests")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(rangemode="tozero", nticks=5)
    return figure


def _colour_bar(title: str, tick: str) -> dict[str, Any]:
    return {
        # An empty line keeps it off the numbers.
        "title": {
            "text": f"<br>{title}",
            "side": "right",
            "font": {"color": theme.QUIET, "size": 12},
        },
        "thickness": 10,
        "outlinewidth": 0,
        "tickformat": tick,
        "tickfont": {"color": theme.QUIET},
        "nticks": 5,
    }


def _across(figure: go.Figure, bound: float, text: str = "") -> None:
    """A dashed line at a bound of the y axis, with its name."""
    log = figure.layout.yaxis.type == "log"
    figure.add_hline(y=bound, line={"color": theme.QUIET, "width": 1, "dash": "4px,3px"})
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=float(np.log10(bound)) if log else bound,
        yanchor="bottom",
        showarrow=False,
        text=text or f"SLO {seconds(bound)}",
        font={"color": theme.QUIET, "size": 12},
    )


def _down(figure: go.Figure, at: float, text: str, step: int, is_right: bool) -> None:
    """A line at a moment, with its name above, one line of text higher for each `step`."""
    figure.add_vline(x=at, line={"color": theme.QUIET, "width": 1.5, "dash": "4px,3px"})
    figure.add_annotation(
        x=at,
        y=1.0,
        yref="paper",
        yanchor="bottom",
        yshift=17 * step,
        xanchor="right" if is_right else "left",
        showarrow=False,
        text=text,
        font={"color": theme.QUIET, "size": 12},
    )
