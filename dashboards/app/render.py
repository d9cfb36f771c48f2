"""How do the parts of a page look in a browser?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html

from dashboards.app.parts import Alarm, Cards, Cell, Heading, Link, Panel, Part, Table, Words

_CONFIG = {"displayModeBar": False, "responsive": True, "displaylogo": False}
DATA_FORMATS = ("csv", "parquet")


def rendered(parts: Sequence[Part], query: str) -> list[Any]:
    """Components of all parts; figures that follow one another share a grid.

    `query` is the address's own, with its page: what an export needs to make the figure again.
    """
    shown: list[Any] = []
    grid: list[Any] = []
    for part in parts:
        if isinstance(part, Panel):
            grid.append(panel(part, query))
            continue
        if grid:
            shown.append(html.Div(grid, className="figures"))
            grid = []
        shown.append(_one(part))
    if grid:
        shown.append(html.Div(grid, className="figures"))
    return shown


def _one(part: Part) -> Any:
    if isinstance(part, Heading):
        return html.H3(part.text)
    if isinstance(part, Words):
        return html.P(part.text, className=part.kind)
    if isinstance(part, Link):
        return html.P(dcc.Link(part.text, href=part.href))
    if isinstance(part, Alarm):
        reasons = html.Ul([html.Li(reason) for reason in part.reasons])
        return html.Div([html.B(part.title), reasons], className="banner", role="alert")
    if isinstance(part, Cards):
        return html.Div([_card(*one) for one in part.cards], className="cards")
    assert isinstance(part, Table), part
    return table(part)


def _card(
    key: str, label: str, colour: str, big: str, value: float | None, lines: Sequence[str]
) -> Any:
    return html.Div(
        [
            html.Div(label, className="name"),
            html.Div(big, className="big", **_data(f"card:{key}", value)),
            *[html.Div(line, className="quiet small") for line in lines],
        ],
        className="card",
        style={"--system": colour},
    )


def panel(part: Panel, query: str) -> Any:
    """A figure with its title, its note, its colours, and its exports."""
    legend = [html.Span([swatch(colour), label]) for label, colour in part.legend]
    part.figure.update_layout(meta={"title": part.title})
    return html.Figure(
        [
            html.H4(part.title),
            html.Figcaption(part.note),
            html.Div(legend, className="legend"),
            dcc.Graph(
                id={"figure": part.key},
                figure=part.figure,
                config=_CONFIG,
                responsive=True,
                style={"height": f"{part.figure.layout.height}px"},
            ),
            exports(part.key, part.title, query),
        ],
        className="wide" if part.wide else "",
        **{"data-figure": part.key},
    )


def exports(key: str, title: str, query: str) -> Any:
    """Images are drawn by the browser, the rest by the server."""
    images = [
        html.Button(
            kind.upper(),
            type="button",
            **{"data-image": kind, "aria-label": f"{title} as {kind.upper()}"},
        )
        for kind in ("png", "svg")
    ]
    files = [
        html.A(
            {"html": "HTML", "csv": "CSV", "parquet": "Parquet"}[kind],
            href=f"/export/{kind}/{key}{query}",
            download="",
            **{"aria-label": f"{'figure' if kind == 'html' else 'data'} of {title} as {kind}"},
        )
        for kind in ("html", *DATA_FORMATS)
    ]
    return html.Div([*images, *files], className="exports")


def table(part: Table) -> Any:
    """A table that scrolls sideways by itself where it is wide."""
    heads = [
        html.Th([swatch(colour), text] if colour else text, scope="col")
        for text, colour in part.heads
    ]
    rows = [html.Tr(_cells(part, row)) for row in part.rows]
    kind = "numbers" if part.is_numbers else "facts"
    return html.Div(
        html.Table([html.Thead(html.Tr(heads)), html.Tbody(rows)], className=kind),
        className="scroll",
        tabIndex=0,
        role="region",
        **{"aria-label": part.key, "data-table": part.key},
    )


def _cells(part: Table, row: Sequence[Cell]) -> list[Any]:
    name = row[0].text
    first = dcc.Link(name, href=row[0].href) if row[0].href else name
    cells = []
    for head, cell in zip(part.heads[1:], row[1:], strict=True):
        text = dcc.Link(cell.text, href=cell.href) if cell.href else cell.text
        cells.append(html.Td(text, **_data(f"{name}:{head[0]}", cell.value)))
    return [html.Th(first, scope="row"), *cells]


def swatch(colour: str) -> Any:
    return html.Span(className="swatch", style={"--system": colour})


def _data(name: str, value: float | None) -> dict[str, str]:
    """What a script reads: the number as it is, beside its short form."""
    return {"data-cell": name} | ({} if value is None else {"data-value": repr(value)})


def standalone(part: Panel) -> str:
    """The figure as a page of its own, which loads nothing."""
    figure = go.Figure(part.figure)
    figure.update_layout(
        title={"text": part.title, "x": 0, "xanchor": "left"},
        margin={"t": 60, "l": 20, "r": 20, "b": 20},
        paper_bgcolor="#ffffff",
        height=max(420, int(figure.layout.height or 0)),
        showlegend=len(part.legend) > 1,
    )
    page: str = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
    return page
