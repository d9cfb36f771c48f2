"""What can be changed on which page? Controls whose values are the address's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dash import dcc, html

from dashboards.app.pages import chosen_side
from dashboards.app.state import MEASURES, SORTS, THEMES, TIMES
from dashboards.app.view import View
from mooncake_bench.explore import TBT_STATISTICS

SHOWN_AS_BOXES = 8
OF_PAGE = {
    "overview": ("find", "sort"),
    "slo": ("ttft", "tbt", "stat"),
    "latency": ("time", "by"),
    "request": ("run", "request"),
    "cluster": ("measure",),
    "plan": ("plan",),
}


def value_of(view: View, name: str) -> Any:
    """What a control shows for this state."""
    state = view.state
    if name == "runs":
        return state.chosen or view.store.at_first()
    if name == "ttft":
        return view.slo.ttft_s
    if name == "tbt":
        return round(view.slo.tbt_s * 1e3, 9)
    if name == "run":
        side = chosen_side(view)
        return side.key if side is not None else None
    if name == "request":
        return state.request if state.request >= 0 else None
    if name == "plan":
        return state.plan or next(iter(view.store.plans()), None)
    return getattr(state, name)


def changes(view: View, given: dict[str, Any]) -> dict[str, Any]:
    """Of the controls' values those that differ from what the state has them show."""
    found = {}
    for name, value in given.items():
        if value is None or value == value_of(view, name):
            continue
        found[name] = ",".join(value) if name == "runs" else value
    return found


def controls(view: View, page: str) -> list[Any]:
    """All controls of a page, each under its label."""
    names = ("runs", *OF_PAGE.get(page, ()), "theme")
    return [_BUILDERS[name](view) for name in names]


def _labelled(name: str, label: str, control: Any, kind: str = "") -> Any:
    return html.Div(
        [html.Div(label, className="label", id=f"label-{name}"), control],
        className=f"control {kind}",
        role="group",
        **{"aria-labelledby": f"label-{name}"},
    )


def _id(name: str) -> dict[str, str]:
    return {"control": name}


def _runs(view: View) -> Any:
    keys = list(view.store.runs())
    value = value_of(view, "runs")
    options = [{"label": key, "value": key} for key in dict.fromkeys([*keys, *value])]
    if len(keys) <= SHOWN_AS_BOXES:
        boxes = dcc.Checklist(options=options, value=value, id=_id("runs"), inline=True)
        return _labelled("runs", "Runs", boxes, "wide")
    menu = dcc.Dropdown(options=options, value=value, id=_id("runs"), multi=True)
    return _labelled("runs", "Runs", menu, "wide")


def _choice(view: View, name: str, label: str, options: dict[str, str]) -> Any:
    radio = dcc.RadioItems(options=options, value=value_of(view, name), id=_id(name), inline=True)
    return _labelled(name, label, radio)


def _bound(view: View, name: str, label: str, least: float, usual: float, step: float) -> Any:
    """A slider with a field beside it: the one to try, the other to be exact."""
    value = value_of(view, name)
    slider = dcc.Slider(
        id=_id(name),
        min=least,
        max=max(usual, round(2 * value, 3)),
        step=step,
        value=value,
        marks=None,
        updatemode="mouseup",
    )
    return _labelled(name, label, slider, "slider")


def _find(view: View) -> Any:
    field = dcc.Input(id=_id("find"), type="search", value=view.state.find, debounce=0.3)
    return _labelled("find", "Name contains", field)


def _run(view: View) -> Any:
    labels = {side.key: side.label for side in view.sides}
    return _choice(view, "run", "Run", labels)


def _request(view: View) -> Any:
    field = dcc.Input(
        id=_id("request"), type="number", min=0, step=1, value=value_of(view, "request"),
        debounce=0.5, placeholder="number",
    )  # fmt: skip  # One field.
    return _labelled("request", "Request (number in the trace)", field)


def _plan(view: View) -> Any:
    return _choice(view, "plan", "Plan", {key: key for key in view.store.plans()})


_SORT_NAMES = dict(
    zip(
        SORTS,
        ("name", "attainment", "goodput", "TTFT p99", "TBT p99", "offered", "start"),
        strict=True,
    )
)
_BUILDERS: dict[str, Callable[[View], Any]] = {
    "runs": _runs,
    "find": _find,
    "sort": lambda view: _choice(view, "sort", "Sort by", _SORT_NAMES),
    "ttft": lambda view: _bound(view, "ttft", "TTFT bound (s)", 0.1, 60.0, 0.1),
    "tbt": lambda view: _bound(view, "tbt", "TBT bound (ms)", 1.0, 500.0, 1.0),
    "stat": lambda view: _choice(view, "stat", "TBT of a request", TBT_STATISTICS),
    "time": lambda view: _choice(view, "time", "Time", TIMES),
    "by": lambda view: _choice(
        view, "by", "Points by", {"input_tokens": "input length", "reused_tokens": "reused tokens"}
    ),
    "run": _run,
    "request": _request,
    "measure": lambda view: _choice(
        view, "measure", "Of each instance", {name: words for name, (words, _) in MEASURES.items()}
    ),
    "plan": _plan,
    "theme": lambda view: _choice(view, "theme", "Theme", {name: name for name in THEMES}),
}


def navigation(view: View, page: str, titles: dict[str, str]) -> Sequence[Any]:
    """Links to all pages with the same choices."""
    return [
        html.Span(
            dcc.Link(title, href=view.link(name), className="here" if name == page else ""),
            **({"aria-current": "page"} if name == page else {}),
        )
        for name, title in titles.items()
    ]
