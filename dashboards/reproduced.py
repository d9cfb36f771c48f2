"""Does ours look like the paper's? Published and own points of the same thing in one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from dashboards import theme
from mooncake_bench.slo import percent

Point = tuple[float | str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """One system's published points and ours; either may be empty. Escape the label before."""

    label: str
    colour: str
    published: Sequence[Point]
    ours: Sequence[Point]


def lines(
    pairs: Sequence[Pair],
    x: str,
    y: str,
    *,
    is_log_x: bool = False,
    is_log_y: bool = False,
    is_share: bool = False,
    is_dense: bool = False,
) -> go.Figure:
    """Ours solid with filled markers, the published dashed with open ones.

    `is_dense` leaves the markers out, for curves over time.
    """
    figure = go.Figure()
    unit = "%{y:.1%}" if is_share else "%{y:.3g}"
    for pair in pairs:
        for name, points in (("published", pair.published), ("ours", pair.ours)):
            if not points:
                continue
            is_ours = name == "ours"
            figure.add_scatter(
                name=f"{pair.label}, {name}",
                x=[point[0] for point in points],
                y=[point[1] for point in points],
                mode="lines" if is_dense else "lines+markers",
                line={
                    "color": pair.colour,
                    "width": (1.5 if is_dense else 2.5) if is_ours else 1.5,
                    "dash": "solid" if is_ours else "4px,3px",
                },
                marker={"size": 6 if is_ours else 8, "symbol": "circle" if is_ours else _OPEN},
                hovertemplate=f"%{{x:.4g}}: {unit}<extra>%{{fullData.name}}</extra>",
            )
    theme.styled(figure, height=330, x=x, y=y)
    if is_log_x:
        xs = [float(at) for pair in pairs for at, _ in (*pair.published, *pair.ours)]
        figure.update_xaxes(**_log_axis(min(xs), max(xs)))
    else:
        figure.update_xaxes(rangemode="tozero")
    _y_axis(figure, pairs, is_share, is_log_y)
    return figure


def bars(
    pairs: Sequence[Pair], y: str, *, is_share: bool = False, is_log_y: bool = False
) -> go.Figure:
    """Side by side for each name: the published bar open, ours filled, each with its number."""
    figure = go.Figure()
    for pair in pairs:
        for name, points in (("published", pair.published), ("ours", pair.ours)):
            if not points:
                continue
            is_ours = name == "ours"
            figure.add_bar(
                name=f"{pair.label}, {name}",
                x=[_wrapped(str(point[0])) for point in points],
                y=[point[1] for point in points],
                marker={
                    "color": pair.colour if is_ours else "rgba(0,0,0,0)",
                    "line": {"color": pair.colour, "width": 0 if is_ours else 1.5},
                },
                text=[percent(v) if is_share else f"{v:.3g}" for _, v in points],
                textposition="outside",
                textangle=0,
                cliponaxis=False,
                textfont={"color": theme.INK},
                hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            )
    theme.styled(figure, height=330, y=y)
    figure.update_layout(bargap=0.3, bargroupgap=0.08)
    figure.update_xaxes(showgrid=False, tickangle=0, tickfont={"color": theme.INK})
    _y_axis(figure, pairs, is_share, is_log_y, room=1.14)
    return figure


_OPEN = "circle-open"


def _y_axis(
    figure: go.Figure, pairs: Sequence[Pair], is_share: bool, is_log: bool, room: float = 1.06
) -> None:
    values = [value for pair in pairs for _, value in (*pair.published, *pair.ours)] or [0.0, 1.0]
    if is_log:
        # Bars need room above for their numbers, and some height for the lowest.
        figure.update_yaxes(**_log_axis(min(values) / 1.5, max(values) * 1.5))
        return
    figure.update_yaxes(range=[min(0.0, *values), (max(values) or 1.0) * room])
    if is_share:
        figure.update_yaxes(tickformat=".0%", nticks=6)


def _log_axis(low: float, high: float) -> dict[str, object]:
    """From the lowest to the highest point, labelled with few round numbers."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in range(-6, 13) for digit in digits]
        ticks = [tick for tick in ticks if 0.9 * low <= tick <= 1.1 * high]
        if len(ticks) <= 6:
            break
    return {
        "type": "log",
        "range": [math.log10(low * 0.9), math.log10(high * 1.1)],
        "tickvals": ticks,
        "ticktext": [_short(tick) for tick in ticks],
        "tickangle": 0,
    }


def _short(value: float) -> str:
    """1000000 as 1M: axes have little room."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _wrapped(label: str) -> str:
    """A name on as many lines as keep it narrow."""
    found = [""]
    for word in label.split(" "):
        if found[-1] and len(found[-1]) + len(word) > 12:
            found.append(word)
        else:
            found[-1] = f"{found[-1]} {word}".strip()
    return "<br>".join(found)
