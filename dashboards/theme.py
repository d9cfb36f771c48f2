"""How every figure looks: colours, type, axes; and how a figure gets into a page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from importlib import resources

import plotly.graph_objects as go
from plotly import offline

# One colour a system, the same in every figure. From the Okabe-Ito set, which colour-blind readers
# can tell apart, shifted in lightness so that each reads on white and on near-black.
_SYSTEM_COLOURS = {
    "disaggregated": ("#2b7bba", "#56b4e9", "#1b9e8f", "#6a6fc2"),
    "colocated": ("#d5681c", "#c9971c", "#b0503f", "#a8763e"),
    "external": ("#8a5fa8", "#c06c9c", "#5f8a3a", "#7d7d7d"),
}
SYSTEMS = tuple(_SYSTEM_COLOURS)
# Stages and reasons are no systems: muted colours of their own, waiting in greys.
STAGE_COLOURS = {
    "queue": "#9aa0a8",
    "reuse_load": "#c2a84f",
    "prefill": "#4f8f7b",
    "transfer": "#b3637a",
    "decode_queue": "#9aa0a8",
    "decode": "#7467a6",
    "other": "#c9c5ba",
}
REASON_COLOURS = ("#a8455a", "#c2a84f", "#7467a6", "#4f8f7b", "#9aa0a8", "#6b5a4a")

# Stand-ins which page.css repaints, so that one figure reads in light and in dark mode.
INK = "rgb(17, 17, 17)"
QUIET = "rgb(85, 85, 85)"
GRID = "rgb(221, 221, 221)"

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_CONFIG = {"displayModeBar": False, "responsive": True, "displaylogo": False}


def system_colours(systems: Iterable[str]) -> list[str]:
    """A colour for each run, by its system: the n-th run of a system gets its n-th colour."""
    seen: dict[str, int] = {}
    colours = []
    for system in systems:
        shades = _SYSTEM_COLOURS[system]
        colours.append(shades[seen.get(system, 0) % len(shades)])
        seen[system] = seen.get(system, 0) + 1
    return colours


def styled(figure: go.Figure, *, height: int, x: str = "", y: str = "") -> go.Figure:
    """Give `figure` the house style: transparent, no frame, thin grid, titles where they are read.

    `x` and `y` are axis titles; `height` is in pixels, the width is the page's.
    """
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 8, "r": 14, "t": 22, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 12.5, "color": INK},
        showlegend=False,
        # A finger that scrolls the page must not drag a zoom box.
        dragmode=False,
        hoverlabel={"font": {"family": _FONT, "size": 12.5}},
    )
    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "gridwidth": 1,
        "zeroline": False,
        "linecolor": GRID,
        "tickfont": {"color": QUIET},
        "title": {"font": {"color": QUIET, "size": 12.5}, "standoff": 8},
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def plain(text: str) -> str:
    """A text in which Plotly finds no tags."""
    return escape(text)


def seconds_log_axis(low_s: float, high_s: float, most: int = 5) -> dict[str, object]:
    """A logarithmic axis of seconds from `low_s` to `high_s`, labelled the way people say them.

    `most` labels find room side by side on a phone, where decades alone are not more.
    """
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in range(-6, 6) for digit in digits]
        ticks = [tick for tick in ticks if low_s <= tick <= high_s]
        if len(ticks) <= most:
            break
    return {
        "type": "log",
        "range": [math.log10(low_s), math.log10(high_s)],
        "tickvals": ticks,
        "tickangle": 0,
        "ticktext": [f"{tick:g} s" if tick >= 1 else f"{tick * 1e3:g} ms" for tick in ticks],
    }


def embed(figure: go.Figure, figure_id: str) -> str:
    """The figure as HTML for a page that holds `script()`; `figure_id` makes it reproducible."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=figure_id, config=_CONFIG
    )
    return html


def script() -> str:
    """Plotly's JavaScript, to be inlined once in a page (4.8 MB; it loads nothing further)."""
    source: str = offline.get_plotlyjs()
    return source


def stylesheet() -> str:
    """The page's CSS, which also repaints the figures' stand-in colours in dark mode."""
    return resources.files("dashboards").joinpath("page.css").read_text(encoding="utf-8")
