"""How is a page put together? Small pieces of HTML; every text they are given is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from dashboards import theme

# A figure drawn before the page was whole may have taken the width without a scroll bar.
_FIT = "<script>addEventListener('load', () => dispatchEvent(new Event('resize')))</script>"


def document(title: str, body: str) -> str:
    """A whole page in one file: stylesheet and Plotly inlined, nothing loaded from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own a browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{theme.stylesheet()}</style>\n"
        f"<script>{theme.script()}</script>\n</head>\n<body>\n{body}\n{_FIT}\n</body>\n</html>\n"
    )


def figure(
    plot: go.Figure,
    figure_id: str,
    title: str,
    note: str = "",
    *,
    legend: Sequence[tuple[str, str]] = (),
    wide: bool = False,
) -> str:
    """A titled figure; `legend` names its colours, `wide` gives it the page's whole width."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    # Outside the plot, so that it wraps on a phone and never lies on a curve.
    names = "".join(f"<span>{_named(label, colour)}</span>" for label, colour in legend)
    key = f'<div class="legend">{names}</div>' if names else ""
    kind = ' class="wide"' if wide else ""
    head = f"<h4>{escape(title)}</h4>{caption}{key}"
    return f"<figure{kind}>{head}{theme.embed(plot, figure_id)}</figure>"


def figures(parts: Sequence[str]) -> str:
    """Figures side by side where there is room, below each other where there is none."""
    return f'<div class="figures">{"".join(parts)}</div>'


def table(
    kind: str, heads: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[str]] | None]
) -> str:
    """A table with a named column for each (label, colour) of `heads`; None in `rows` is a break.

    `kind` is "numbers" (right-aligned) or "facts" (text that wraps).
    """
    head = "".join(f'<th scope="col">{_named(label, colour)}</th>' for label, colour in heads)
    body, is_break = [], False
    for row in rows:
        if row is None:
            is_break = True
            continue
        name, cells = row
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        mark = ' class="break"' if is_break else ""
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{data}</tr>')
        is_break = False
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def card(label: str, colour: str, big: str, lines: Sequence[str]) -> str:
    """One run in one glance: its name, one big number, a few words below."""
    below = "".join(f'<div class="quiet small">{escape(line)}</div>' for line in lines)
    return (
        f'<div class="card" style="--system: {escape(colour)}"><div class="name">{escape(label)}'
        f'</div><div class="big">{escape(big)}</div>{below}</div>'
    )


def banner(title: str, reasons: Sequence[str]) -> str:
    """A warning that nobody overlooks."""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<div class="banner" role="alert"><b>{escape(title)}</b><ul>{items}</ul></div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, of a class of the stylesheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def folded(title: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _named(label: str, colour: str) -> str:
    swatch = f'<span class="swatch" style="--system: {escape(colour)}"></span>' if colour else ""
    return f"{swatch}{escape(label)}"
