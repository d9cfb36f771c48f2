"""What does a result look like? One function a figure: frames in, a figure out, no metric here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from dashboards import theme
from mooncake_bench.slo import percent, seconds

STAGE_NAMES = {
    "queue": "queue",
    "reuse_load": "load of reused prefix",
    "prefill": "prefill",
    "transfer": "KV transfer",
    "decode_queue": "decode queue",
    "decode": "decode",
    "other": "other",
}
UNTIL_FIRST_TOKEN = ("queue", "reuse_load", "prefill", "transfer", "other")
AFTER_FIRST_TOKEN = ("decode_queue", "decode")


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's frame in a figure, with the label and the colour the run has everywhere.

    Labels are shown as they are: escape `<`, `>` and `&` before, Plotly reads tags in them. With a
    `key` and a column request in the frame, a point knows which request of which run it is.
    """

    label: str
    colour: str
    frame: pl.DataFrame
    key: str = ""

    @property
    def clickable(self) -> list[list[Any]]:
        """(key, request) of each row, as a trace's customdata; empty without requests."""
        if "request" not in self.frame.columns:
            return []
        return [[self.key, request] for request in self.frame["request"].to_list()]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of stages: mean seconds by stage, None where the stage is not known."""

    label: str
    stages_s: dict[str, float | None]


def capacity_bars(
    labels: Sequence[str], colours: Sequence[str], shares: Sequence[dict[str, float | None]]
) -> go.Figure:
    """Share of offered requests within the SLOs, at each TBT bound, side by side for each run.

    `shares[i]` maps a bound in seconds, written as in summary.json, to run i's attainment.
    """
    figure = go.Figure()
    bounds = list(shares[0])
    for label, colour, share in zip(labels, colours, shares, strict=True):
        values = [share[bound] for bound in bounds]
        figure.add_bar(
            name=label,
            x=[f"≤ {float(bound) * 1e3:g} ms" for bound in bounds],
            y=values,
            marker={"color": colour, "line_width": 0},
            text=[percent(value) for value in values],
            textposition="outside",
            constraintext="none",  # Plotly would shrink some labels beside others.
            textangle=0,
            cliponaxis=False,
            textfont={"color": theme.INK, "size": 10},
            hovertemplate="%{text} of requests<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=300, x="TBT bound", y="offered requests within SLO")
    figure.update_layout(bargap=0.08, bargroupgap=0.06)
    figure.update_xaxes(showgrid=False, tickangle=0, tickfont={"color": theme.INK})
    figure.update_yaxes(**_SHARE_AXIS)
    return figure


def cumulative(curves: Sequence[Curve], bound_s: float | None, what: str) -> go.Figure:
    """The share of offered requests that reached `what` within a time, with its SLO bound, if any.

    Frames are of `metrics.cumulative_shares`: value_s (log axis), share.
    """
    figure = go.Figure()
    values = [value for curve in curves for value in curve.frame["value_s"] if value > 0]
    beside = [bound_s / 3, bound_s * 2] if bound_s is not None else [] if values else [0.1, 1.0]
    low, high = min([*beside, *values]), max([*beside, *values])
    for curve in curves:
        _step_line(figure, curve, low, high)
    theme.styled(figure, height=320, x=what, y="share of offered requests")
    figure.update_xaxes(**theme.seconds_log_axis(low * 0.9, high * 1.1))
    figure.update_yaxes(**_SHARE_AXIS)
    if bound_s is not None:
        _bound_line(figure, bound_s)
    return figure


def attainment_curve(curves: Sequence[Curve], bound_s: float) -> go.Figure:
    """Attainment over the TBT bound one might promise: tbt_bound_s, attainment."""
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["tbt_bound_s"] * 1e3,
            y=curve.frame["attainment"],
            mode="lines",
            line={"color": curve.colour, "width": 2.5},
            hovertemplate="TBT ≤ %{x:.0f} ms: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=300, x="TBT bound (ms)", y="offered requests within SLO")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(**_SHARE_AXIS)
    _bound_line(figure, bound_s, scale=1e3)
    return figure


def attainment_by_rate(curves: Sequence[Curve], target: float) -> go.Figure:
    """Attainment over offered rate, a point a run, with the target: offered_rps, attainment."""
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["offered_rps"],
            y=curve.frame["attainment"],
            mode="lines+markers",
            line={"color": curve.colour, "width": 2.5},
            marker={"size": 8},
            cliponaxis=False,
            hovertemplate="%{x:.3g} req/s: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=320, x="offered requests/s", y="offered requests within SLO")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(**_SHARE_AXIS)
    figure.add_hline(y=target, line={"color": theme.QUIET, "width": 1, "dash": "4px,3px"})
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=target,
        yanchor="top",
        showarrow=False,
        text=f"target {percent(target)}",
        font={"color": theme.QUIET, "size": 12},
    )
    return figure


def stage_bars(bars: Sequence[Bar], stages: Sequence[str]) -> go.Figure:
    """Where the mean request spent its seconds: one stacked bar a run (or a class of a run)."""
    shown = visible_stages(bars, stages)
    longest = max((_total(bar, shown) for bar in bars), default=0.0)
    figure = go.Figure()
    # A bar of one label twice would be one bar: the position is the bar's, the label only its tick.
    rows = list(range(len(bars)))
    for stage in shown:
        lengths = [bar.stages_s.get(stage) or 0.0 for bar in bars]
        figure.add_bar(
            name=STAGE_NAMES[stage],
            y=rows,
            x=lengths,
            orientation="h",
            marker={"color": theme.STAGE_COLOURS[stage], "line_width": 0},
            text=[
                # The whole bar is named at its end, a sliver has no room for a name.
                seconds(value) if 0.16 * longest < value < 0.97 * _total(bar, shown) else ""
                for value, bar in zip(lengths, bars, strict=True)
            ],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#ffffff"},
            customdata=[bar.label for bar in bars],
            hovertemplate="%{customdata}<br>%{x:.3f} s<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=72 + 34 * len(bars), x="mean seconds a finished request")
    figure.update_layout(barmode="stack", bargap=0.3, margin_t=4)
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        tickvals=rows,
        ticktext=[bar.label for bar in bars],
        tickfont={"color": theme.INK},
    )
    figure.update_xaxes(rangemode="tozero", nticks=6)
    for row, bar in zip(rows, bars, strict=True):
        figure.add_annotation(
            x=_total(bar, shown), y=row, text=f" {seconds(_total(bar, shown))}", **_RIGHT_OF_BAR
        )
    # Room for the totals right of the bars.
    figure.update_xaxes(range=[0, longest * 1.16 or 1.0])
    return figure


def visible_stages(bars: Sequence[Bar], stages: Sequence[str]) -> list[str]:
    """Those of `stages` that take more than a thousandth of the longest bar in any bar."""
    least = 1e-3 * max((_total(bar, stages) for bar in bars), default=0.0)
    return [s for s in stages if any((bar.stages_s.get(s) or 0.0) > least for bar in bars)]


def load_over_time(curves: Sequence[Curve]) -> go.Figure:
    """Load of the instances, one panel a run and role: mean line, band from lowest to highest.

    Frames are of `metrics.load_over_time`, filtered to one role. 1.0 is the SLO's limit.
    """
    figure = make_subplots(
        rows=len(curves), cols=1, shared_xaxes=True, vertical_spacing=0.26 / max(len(curves), 1)
    )
    for row, curve in enumerate(curves, start=1):
        _band(figure, curve, row)
    theme.styled(figure, height=70 + 132 * len(curves))
    figure.update_yaxes(nticks=4)
    for row, curve in enumerate(curves, start=1):
        # The limit is in every panel, however far the load stays below it.
        highest = max(1.0, *curve.frame["high"]) if curve.frame.height else 1.0
        figure.update_yaxes(range=[0, highest * 1.1], row=row, col=1)
        figure.add_hline(
            y=1.0, row=row, col=1, line={"color": theme.QUIET, "width": 1, "dash": "4px,3px"}
        )
        figure.add_annotation(
            **_PANEL_TITLE,
            xref="x domain" if row == 1 else f"x{row} domain",
            yref="y domain" if row == 1 else f"y{row} domain",
            text=curve.label,
            font={"color": curve.colour, "size": 12.5, "weight": 600},
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="minutes since start", row=len(curves), col=1)
    return figure


def shares_over_time(curves: Sequence[Curve], column: str) -> go.Figure:
    """A share that changes over time, one line a run: time_s and `column` (0 to 1)."""
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["time_s"] / 60,
            y=curve.frame[column],
            mode="lines",
            line={"color": curve.colour, "width": 2},
            hovertemplate="%{x:.0f} min: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=260, x="minutes since start")
    figure.update_xaxes(rangemode="tozero")
    highest = max((value for curve in curves for value in curve.frame[column]), default=1.0)
    figure.update_yaxes(tickformat=".0%", range=[0, max(highest * 1.15, 0.05)], nticks=5)
    return figure


def counts_over_time(curves: Sequence[Curve], column: str) -> go.Figure:
    """A count that holds until it changes, one line a run: time_s and `column`."""
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            name=curve.label,
            x=curve.frame["time_s"] / 60,
            y=curve.frame[column],
            mode="lines",
            line={"color": curve.colour, "width": 2, "shape": "hv"},
            hovertemplate="%{x:.1f} min: %{y:,.0f}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=260, x="minutes since start")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero", nticks=5)
    return figure


def refusals_over_time(curves: Sequence[Curve], bin_s: float) -> go.Figure:
    """Rejected and failed requests a second by reason, one panel a run; bins of `bin_s`."""
    colours = reason_colours(curves)
    figure = make_subplots(
        rows=len(curves), cols=1, shared_xaxes=True, vertical_spacing=0.26 / max(len(curves), 1)
    )
    for row, curve in enumerate(curves, start=1):
        for (reason,), part in curve.frame.group_by("reason", maintain_order=True):
            figure.add_bar(
                name=str(reason),
                x=part["time_s"] / 60,
                y=part["requests_per_s"],
                width=bin_s / 60 * 0.92,
                marker={"color": colours[str(reason)], "line_width": 0},
                row=row,
                col=1,
                hovertemplate="%{x:.0f} min: %{y:.2f}/s<extra>%{fullData.name}</extra>",
            )
    theme.styled(figure, height=70 + 120 * len(curves))
    figure.update_layout(barmode="stack")
    figure.update_yaxes(rangemode="tozero", nticks=4)
    for row, curve in enumerate(curves, start=1):
        figure.add_annotation(
            **_PANEL_TITLE,
            xref="x domain" if row == 1 else f"x{row} domain",
            yref="y domain" if row == 1 else f"y{row} domain",
            text=f"{curve.label} (requests/s)",
            font={"color": curve.colour, "size": 12.5, "weight": 600},
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="minutes since start", row=len(curves), col=1)
    return figure


def reason_colours(curves: Sequence[Curve]) -> dict[str, str]:
    """A colour for each reason in the curves' frames."""
    reasons = sorted({reason for curve in curves for reason in curve.frame["reason"]})
    return dict(zip(reasons, theme.REASON_COLOURS * len(reasons), strict=False))


_SHARE_AXIS = {"range": [0, 1.06], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
_RIGHT_OF_BAR = {"showarrow": False, "xanchor": "left", "font": {"color": theme.INK}}
_PANEL_TITLE = {"showarrow": False, "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom"}


def _step_line(figure: go.Figure, curve: Curve, low: float, high: float) -> None:
    """Draw from the left edge to the right one: a share not reached stays visibly unreached."""
    values = [max(value, low * 0.9) for value in curve.frame["value_s"]]
    shares = curve.frame["share"].to_list()
    last = shares[-1] if shares else 0.0
    known = curve.clickable
    figure.add_scatter(
        name=curve.label,
        x=[low * 0.9, *values, high * 1.1],
        y=[0.0, *shares, last],
        # The ends are no request: they answer for the nearest.
        customdata=[known[0], *known, known[-1]] if known else None,
        mode="lines",
        line={"color": curve.colour, "width": 2.5, "shape": "hv"},
        hovertemplate="%{y:.1%} within %{x:.3g} s<extra>%{fullData.name}</extra>",
    )


def _bound_line(figure: go.Figure, bound_s: float, scale: float = 1.0) -> None:
    figure.add_vline(
        x=bound_s * scale,
        line={"color": theme.QUIET, "width": 1, "dash": "4px,3px"},
    )
    log = figure.layout.xaxis.type == "log"
    figure.add_annotation(
        x=math.log10(bound_s) if log else bound_s * scale,
        y=1.0,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        text=f"SLO {seconds(bound_s)}",
        font={"color": theme.QUIET, "size": 12},
    )


def _band(figure: go.Figure, curve: Curve, row: int) -> None:
    minutes = curve.frame["time_s"] / 60
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "row": row, "col": 1}
    figure.add_scatter(x=minutes, y=curve.frame["high"], **edge)
    figure.add_scatter(
        x=minutes,
        y=curve.frame["low"],
        fill="tonexty",
        fillcolor=_translucent(curve.colour, 0.25),
        **edge,
    )
    figure.add_scatter(
        name=curve.label,
        x=minutes,
        y=curve.frame["mean"],
        mode="lines",
        line={"color": curve.colour, "width": 2},
        row=row,
        col=1,
        hovertemplate="%{x:.0f} min: %{y:.2f}<extra>%{fullData.name}</extra>",
    )


def _translucent(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _total(bar: Bar, stages: Sequence[str]) -> float:
    return sum(bar.stages_s.get(stage) or 0.0 for stage in stages)
