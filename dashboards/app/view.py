"""The runs that somebody has chosen, each with the name and colour it has on every page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import polars as pl

from dashboards import theme
from dashboards.app.parts import Alarm, Part, Words
from dashboards.app.state import State
from dashboards.app.store import Broken, Shown, Store
from dashboards.figures import Curve
from mooncake_bench import explore
from mooncake_bench.opened import INCOMPLETE, RUNNING
from mooncake_bench.slo import Slo

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Side:
    """A chosen run."""

    shown: Shown
    label: str
    colour: str

    @property
    def key(self) -> str:
        return self.shown.key

    @property
    def frame(self) -> pl.DataFrame:
        return self.shown.frame

    @property
    def slo(self) -> Slo:
        return self.shown.run.info.slo


@dataclass(frozen=True, slots=True)
class View:
    """All that a page is drawn from."""

    store: Store
    state: State
    path: str
    sides: list[Side]
    broken: list[Broken]

    @classmethod
    def of(cls, store: Store, state: State, path: str = "/") -> View:
        chosen = state.chosen or store.at_first()
        opened = [store.open(key) for key in chosen]
        shown = [one for one in opened if isinstance(one, Shown)]
        names = [one.run.info.name for one in shown]
        labels = [
            one.run.info.name if names.count(one.run.info.name) == 1 else one.key for one in shown
        ]
        systems = [one.run.info.system for one in shown]
        known = [system if system in theme.SYSTEMS else "external" for system in systems]
        colours = theme.system_colours(known)
        sides = [Side(*one) for one in zip(shown, labels, colours, strict=True)]
        return cls(store, state, path, sides, [one for one in opened if isinstance(one, Broken)])

    @property
    def slo(self) -> Slo:
        """The chosen bounds; those of the first run where none were chosen."""
        return self.state.slo(self.sides[0].slo) if self.sides else self.state.slo(Slo())

    def ask(self, side: Side, question: Callable[..., Answer], *rest: Any) -> Answer:
        return self.store.ask(side.shown, question, *rest)

    def judged(self, side: Side) -> dict[str, Any]:
        """Attainment, goodput and misses of a run at the chosen bounds, or at its own."""
        state, info = self.state, side.shown.run.info
        by_class = info.slo_by_class if state.is_own_slo else {}
        name = (side.key, side.shown.run.version, "judged", state.ttft, state.tbt, state.stat)
        return self.store.remember(
            name,
            lambda: explore.judged(side.frame, state.slo(info.slo), by_class, state.stat),
        )

    def curves(self, question: Callable[..., pl.DataFrame], *rest: Any) -> list[Curve]:
        """The answer of every run, for a figure."""
        return [
            Curve(escape(side.label), side.colour, self.ask(side, question, *rest), side.key)
            for side in self.sides
        ]

    @property
    def legend(self) -> list[tuple[str, str]]:
        return [(side.label, side.colour) for side in self.sides]

    def link(self, page: str, **changes: Any) -> str:
        """The address of a page with the same choices, but for these."""
        return f"/{page}{self.state.with_(**changes).search}"


def together(curves: Sequence[Curve]) -> pl.DataFrame:
    """The frames of all runs in one, with a column run: a figure's data."""
    frames = [curve.frame.select(pl.lit(curve.key).alias("run"), pl.all()) for curve in curves]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def warnings(view: View) -> list[Part]:
    """What must be known of the chosen runs before any of their numbers."""
    parts: list[Part] = []
    if view.broken:
        parts.append(Alarm("Cannot be shown", [one.problem for one in view.broken]))
    for side in view.sides:
        info, state = side.shown.run.info, side.shown.run.state
        if state == RUNNING:
            planned = info.client.get("planned")
            of = f" of {planned:,}" if planned else ""
            ended = side.shown.run.frame.height
            text = f"{side.label} is being written: {ended:,}{of} requests have ended so far."
            parts.append(Words(text, "running"))
        elif not info.valid:
            title = "Incomplete run" if state == INCOMPLETE else "Not a valid run"
            reasons = info.invalid_reasons or ["no reason was recorded"]
            parts.append(Alarm(f"{title}: {side.label}. Do not rely on it.", reasons))
        parts.extend(Words(f"{side.label}: {text}", "small modelled") for text in info.warnings)
        if not side.frame.height and state != RUNNING:
            parts.append(Words(f"{side.label}: no request was offered; the run is empty.", "empty"))
    return parts
