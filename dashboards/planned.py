"""What does a capacity plan look like? One function a figure: numbers in, a figure out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from dashboards import theme
from mooncake_bench.slo import percent

HOLDS, MISSES = "#1b9e8f", "#b3637a"


@dataclass(frozen=True, slots=True)
class Sized:
    """A cluster's capacity in requests a second with its interval; escape the label before."""

    label: str
    nodes: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Share:
    """Attainment at some value of a setting, with its interval; `is_plan` marks the plan's own."""

    label: str
    value: float
    low: float
    high: float
    is_plan: bool


def capacity_against_nodes(
    series: Sequence[tuple[str, str, Sequence[Sized]]],
    needed: Sequence[tuple[str, float]],
    bound: Sequence[tuple[float, float]],
) -> go.Figure:
    """Lines of (name, colour, points) with intervals; `needed` rates across; `bound` dotted.

    `bound` is (nodes, requests a second) of the perfect system.
    """
    figure = go.Figure()
    for name, colour, points in series:
        figure.add_scatter(
            name=name,
            x=[point.nodes for point in points],
            y=[point.value for point in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [point.high - point.value for point in points],
                "arrayminus": [point.value - point.low for point in points],
                "color": colour,
                "thickness": 1.5,
                "width": 4,
            },
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            marker={"size": 7},
            text=[f"{point.label}: {point.low:.3g} to {point.high:.3g}" for point in points],
            hovertemplate="%{y:.3g} req/s<br>%{text}<extra></extra>",
        )
    figure.add_scatter(
        name="perfect system",
        x=[nodes for nodes, _ in bound],
        y=[rate for _, rate in bound],
        mode="lines",
        line={"color": theme.QUIET, "width": 1.5, "dash": "2px,3px"},
        hovertemplate="%{x:.1f} nodes, %{y:.3g} req/s<extra>perfect system</extra>",
    )
    theme.styled(figure, height=360, x="nodes", y="capacity (req/s)")
    for label, rate in needed:
        figure.add_hline(
            y=rate,
            line={"color": theme.QUIET, "width": 1, "dash": "6px,4px"},
            annotation={"text": label, "font": {"color": theme.QUIET, "size": 12}},
            annotation_position="top left",
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return figure


def heat_map(
    cells: Sequence[tuple[int, int, float, bool]], target: float, plan: tuple[int, int] | None
) -> go.Figure:
    """Attainment by (prefill, decode, attainment, is only an upper bound); the plan is framed.

    What was stopped early says only that it is below.
    """
    prefill = sorted({cell[0] for cell in cells})
    decode = sorted({cell[1] for cell in cells})
    by_split = {(p, d): (value, is_bound) for p, d, value, is_bound in cells}
    shades, words = [], []
    for d in decode:
        row = [by_split.get((p, d)) for p in prefill]
        shades.append([None if one is None else shade(*one, target) for one in row])
        words.append([said(one) for one in row])
    figure = go.Figure(
        go.Heatmap(
            x=[f"{p}P" for p in prefill],
            y=[f"{d}D" for d in decode],
            z=shades,
            text=words,
            texttemplate="%{text}",
            textfont={"color": "#ffffff", "size": 13},
            colorscale=[[0, "#7d4a5a"], [0.5, MISSES], [0.5, "#5fa79d"], [1, "#12776b"]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=3,
            ygap=3,
            hovertemplate="%{x}+%{y}: %{text}<extra></extra>",
        )
    )
    theme.styled(figure, height=300, x="prefill nodes", y="decode nodes")
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, type="category")
    if plan is not None and plan in by_split:
        x, y = prefill.index(plan[0]), decode.index(plan[1])
        figure.add_shape(
            type="rect",
            x0=x - 0.5,
            x1=x + 0.5,
            y0=y - 0.5,
            y1=y + 0.5,
            line={"color": theme.INK, "width": 3},
        )
    return figure


def shade(value: float, is_bound: bool, target: float) -> float:
    """0 to 0.5 below the target, 0.5 to 1 from it on."""
    if is_bound:
        return 0.25
    if value < target:
        return 0.5 * max(value / target, 0.0) * 0.999
    return 0.5 + 0.5 * (value - target) / max(1.0 - target, 1e-9)


def said(cell: tuple[float, bool] | None) -> str:
    if cell is None:
        return ""
    value, is_bound = cell
    return "misses" if is_bound else f"{value:.1%}"


def shares(points: Sequence[Share], target: float, x: str) -> go.Figure:
    """Attainment over the values of one setting, in their order; the target across."""
    figure = go.Figure()
    figure.add_scatter(
        # In two lines, "100 Gbps" and its neighbours fit on a phone.
        x=[point.label.replace(" ", "<br>") for point in points],
        y=[point.value for point in points],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point.high - point.value for point in points],
            "arrayminus": [point.value - point.low for point in points],
            "color": theme.QUIET,
            "thickness": 1.2,
            "width": 3,
        },
        mode="lines+markers",
        line={"color": theme.QUIET, "width": 1.5},
        marker={
            "size": [13 if point.is_plan else 9 for point in points],
            "color": [HOLDS if point.value >= target else MISSES for point in points],
            "symbol": ["diamond" if point.is_plan else "circle" for point in points],
        },
        hovertemplate="%{x}: %{y:.1%}<extra></extra>",
    )
    theme.styled(figure, height=260, x=x, y="within SLO")
    figure.add_hline(y=target, line={"color": theme.QUIET, "width": 1, "dash": "6px,4px"})
    low = min(min(point.low for point in points), target)
    figure.update_yaxes(tickformat=".0%", nticks=6, range=[max(0.0, low - 0.05), 1.02])
    figure.update_xaxes(type="category", showgrid=False, tickangle=0)
    return figure


def stacked(
    names: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]], x: str
) -> go.Figure:
    """Horizontal bars of (part, colour, share for each name), from above to below."""
    figure = go.Figure()
    for part, colour, values in parts:
        figure.add_bar(
            name=part,
            y=list(names),
            x=list(values),
            orientation="h",
            marker={"color": colour},
            text=[percent(value) if value >= 0.08 else "" for value in values],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#ffffff"},
            hovertemplate="%{y}: %{x:.1%}<extra>%{fullData.name}</extra>",
        )
    theme.styled(figure, height=70 + 46 * len(names), x=x)
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"color": theme.INK})
    return figure
