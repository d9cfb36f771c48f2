"""What is a page made of? Plain values, which `render` turns into what a browser shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
import polars as pl


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with what it shows, on which runs, and the data that it shows."""

    key: str
    title: str
    note: str
    figure: go.Figure
    frame: pl.DataFrame
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph; `kind` is a class of the stylesheet."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    text: str
    href: str


@dataclass(frozen=True, slots=True)
class Alarm:
    """What nobody may overlook."""

    title: str
    reasons: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, the number behind it, and where a click on it leads, if anywhere."""

    text: str
    value: float | None = None
    href: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns and rows of cells; the first cell of a row names it."""

    key: str
    heads: Sequence[tuple[str, str]]
    """(text, colour or "")."""
    rows: Sequence[Sequence[Cell]]
    is_numbers: bool = True


@dataclass(frozen=True, slots=True)
class Cards:
    """Runs in a glance: (key, label, colour, big text, its number, lines)."""

    cards: Sequence[tuple[str, str, str, str, float | None, Sequence[str]]] = field(
        default_factory=list
    )


Part = Panel | Heading | Words | Link | Alarm | Table | Cards
