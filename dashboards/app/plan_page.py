"""A capacity plan: which cluster holds the SLO, what it costs, and what if something differs?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from dashboards import planned, theme
from dashboards.app.parts import Alarm, Cell, Heading, Panel, Part, Table, Words
from dashboards.app.view import View
from mooncake_bench.slo import NOTHING, percent

AXES = {
    "growth": ("More or less traffic", "times the planned rate"),
    "prefixes": ("Fewer shared prefixes", "share of sessions that still share prefixes"),
    "cache": ("Pool memory", "DRAM for KVCache a prefill node"),
    "link": ("Link bandwidth", "of a node, each direction"),
    "reports": ("Stale load reports", "time between an instance's load reports"),
}
SYSTEMS = {"disaggregated": "disaggregated", "colocated": "colocated"}


def plan(view: View) -> list[Part]:
    """The plan that the address names, or the first."""
    plans = view.store.plans()
    if not plans:
        text = "No plan among these directories; mooncake-bench plan --config plan.toml makes one."
        return [Words(text, "empty")]
    key = view.state.plan if view.state.plan in plans else next(iter(plans))
    try:
        report = json.loads((plans[key] / "plan.json").read_bytes())
        return [Heading(f"Plan {key}"), *_parts(report)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [Alarm("This plan cannot be shown", [_problem(plans[key], error)])]


def _problem(path: Path, error: Exception) -> str:
    return f"{path / 'plan.json'}: not a plan of this version ({error}); make it anew"


def _parts(report: dict[str, Any]) -> list[Part]:
    slo = report["spec"]["slo"]
    trace = report["trace"]
    said = (
        f"{trace['name']}, {trace['rate_rps']:.3g} req/s; {percent(slo['target'])} of the requests "
        f"with TTFT ≤ {slo['ttft_s']:g} s and TBT ≤ {slo['tbt_s'] * 1e3:g} ms."
    )
    parts: list[Part] = [Words(said), _choices(report)]
    details = report["details"]
    if details is None:
        return [*parts, Words("No cluster within the limits holds.", "empty")]
    parts.append(_capacity(report, details))
    if details["heat"]:
        parts.append(_splits(report, details))
    parts.append(Heading("What if something is different?"))
    return [*parts, *_sensitivities(report, details)]


def _choices(report: dict[str, Any]) -> Table:
    rows = []
    money = report["spec"].get("currency", "")
    for one in report["growths"]:
        choice = one["choice"]
        name = Cell(f"{one['growth']:g}x, {one['rate_rps']:.3g} req/s")
        if choice is None:
            rows.append([name, Cell(one["infeasible"] or "none holds"), *[Cell(NOTHING)] * 4])
            continue
        capacity = one["capacity_rps"]
        rows.append(
            [
                name,
                Cell(choice["title"]),
                Cell(f"{choice['nodes']}", choice["nodes"]),
                Cell(f"{choice['price_per_hour']:g} {money}/h", choice["price_per_hour"]),
                Cell(percent(choice["attainment"]["value"]), choice["attainment"]["value"]),
                Cell(f"{capacity['value']:.3g} req/s" if capacity else NOTHING),
            ]
        )
    heads = ["traffic", "cheapest that holds", "nodes", "price", "attainment", "capacity"]
    return Table("plan", [(head, "") for head in heads], rows)


def _capacity(report: dict[str, Any], details: dict[str, Any]) -> Panel:
    colours = dict(zip(SYSTEMS, theme.system_colours(SYSTEMS), strict=True))
    series, legend = [], []
    for system, name in SYSTEMS.items():
        own = [point for point in details["curve"] if point["system"] == system]
        sized = [
            planned.Sized(
                theme.plain(point["title"]),
                point["nodes"],
                point["capacity_rps"]["value"],
                point["capacity_rps"]["low"],
                point["capacity_rps"]["high"],
            )
            for point in own
        ]
        if sized:
            series.append((name, colours[system], sized))
            legend.append((name, colours[system]))
    growths = sorted(report["growths"], key=lambda one: float(one["rate_rps"]))
    needed = [(f"{one['growth']:g}x", one["rate_rps"]) for one in growths]
    bound = [(0.0, 0.0)]
    for one in growths:
        bounds = [offer["bound"] for offer in one["offers"]]
        best = min(float(b["prefill_nodes"] + b["decode_nodes"]) for b in bounds)
        bound.append((best, one["rate_rps"]))
    frame = pl.DataFrame([{**point, **point["capacity_rps"]} for point in details["curve"]]).drop(
        "capacity_rps"
    )
    return Panel(
        "plan-capacity",
        "Capacity against nodes",
        "The highest rate at which the target is met, with 95 % intervals; dashed: the planned "
        "rates; dotted: the perfect system, that no cluster beats.",
        planned.capacity_against_nodes(series, needed, bound),
        frame,
        legend,
        wide=True,
    )


def _splits(report: dict[str, Any], details: dict[str, Any]) -> Panel:
    frame = pl.DataFrame(details["heat"])
    best = next(one for one in report["growths"] if one["growth"] == details["growth"])
    candidate = (best["disaggregated"] or {}).get("candidate")
    split = (candidate["prefill"], candidate["decode"]) if candidate else None
    cells = list(frame.select("prefill", "decode", "attainment", "is_upper_bound").iter_rows())
    return Panel(
        "plan-splits",
        "Prefill and decode nodes",
        "Requests within the SLOs at the planned rate; framed: the cheapest that holds. 'misses': "
        "stopped as soon as the target was out of reach.",
        planned.heat_map(cells, report["spec"]["slo"]["target"], split),
        frame,
        [("holds", planned.HOLDS), ("misses the target", planned.MISSES)],
        wide=True,
    )


def _sensitivities(report: dict[str, Any], details: dict[str, Any]) -> list[Part]:
    target = report["spec"]["slo"]["target"]
    parts: list[Part] = []
    for axis, (title, x) in AXES.items():
        points = [one for one in details["sensitivity"] if one["axis"] == axis]
        if not points:
            continue
        shares = [
            planned.Share(
                theme.plain(one["label"]),
                one["attainment"]["value"],
                one["attainment"]["low"],
                one["attainment"]["high"],
                one["is_plan"],
            )
            for one in points
        ]
        rows = [
            {name: value for name, value in one.items() if name != "attainment"}
            | {f"attainment_{name}": value for name, value in one["attainment"].items()}
            for one in points
        ]
        note = "Share of offered requests within the SLOs. Diamond: as planned; dashed: the target."
        figure = planned.shares(shares, target, x)
        frame = pl.DataFrame(rows, infer_schema_length=None)
        parts.append(Panel(f"plan-{axis}", title, note, figure, frame))
    return parts
