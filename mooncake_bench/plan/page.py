"""What does the plan say, at a glance and in full? plan.json as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import msgspec

from dashboards import page, planned, theme
from mooncake_bench.plan.bottleneck import WORDS
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.interval import Estimate
from mooncake_bench.plan.result import Choice, Details, GrowthPlan, PlanReport
from mooncake_bench.slo import NOTHING, percent, seconds

TITLE = "Capacity plan"
SYSTEMS = {"disaggregated": "prefill and decode apart", "colocated": "colocated"}


def write_page(report: PlanReport, out: Path) -> None:
    """One HTML page that loads nothing from anywhere. Raises PlanError."""
    body = (
        f"<header><h1>{TITLE}</h1>{headline(report)}{cards(report)}</header><main>"
        f"{numbers(report)}{around(report)}{settings(report)}{method(report)}</main>"
        f"<footer>{page.paragraph(FOOT, 'small quiet')}</footer>"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page.document(TITLE, body), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{out}: {error.strerror}; choose another --out") from None


# ---- the top ---------------------------------------------------------------------------------


def headline(report: PlanReport) -> str:
    """The answer in one sentence, what it rests on, and what is infeasible."""
    spec = report.spec
    promise = f"TTFT ≤ {seconds(spec.slo.ttft_s)} and TBT ≤ {seconds(spec.slo.tbt_s)}"
    parts = []
    first = next((one for one in report.growths if one.choice is not None), None)
    if first is None or first.choice is None:
        parts.append(
            page.paragraph(
                f"No cluster within the limits keeps {promise} for "
                f"{percent(spec.slo.target)} of requests.",
                "headline",
            )
        )
    else:
        choice = first.choice
        parts.append(
            page.paragraph(
                f"{first.rate_rps:.3g} req/s of {report.trace['name']} need {choice.nodes} nodes: "
                f"{choice.title} keeps {promise} for {percent(choice.attainment.value)} of "
                f"requests, at {money(choice, spec.currency)} an hour.",
                "headline",
            )
        )
    failed = [f"{one.growth:g}x: {one.infeasible}" for one in report.growths if one.infeasible]
    if failed:
        parts.append(page.banner("Infeasible", failed))
    parts += [
        page.paragraph(
            f"Simulated: no GPU was used. Times come from the profile {one['name']}. Its stated "
            f"error: {one['error']}.",
            "modelled",
        )
        for one in report.profiles.values()
    ]
    return "".join(parts)


def cards(report: PlanReport) -> str:
    """One a growth."""
    shown = []
    for one in report.growths:
        label = f"{one.growth:g}x: {one.rate_rps:.3g} req/s"
        if one.choice is None:
            shown.append(page.card(label, planned.MISSES, "none", [one.infeasible]))
            continue
        choice, bound = one.choice, min(offer.bound.nodes for offer in one.offers)
        lines = [
            choice.title,
            f"{choice.gpus} GPUs, {money(choice, report.spec.currency)} an hour",
            f"{percent(choice.attainment.value)} within the SLOs",
            f"head-room {room(one)}; first to give out: {short(one.bottleneck)}",
            f"a perfect system would need {bound}",
        ]
        shown.append(page.card(label, planned.HOLDS, f"{choice.nodes} nodes", lines))
    return f'<div class="cards">{"".join(shown)}</div>'


def money(choice: Choice, currency: str) -> str:
    return f"{choice.price_per_hour:,.4g} {currency}"


def room(one: GrowthPlan) -> str:
    return NOTHING if one.headroom is None else f"{one.headroom:+.0%}"


def short(bottleneck: str) -> str:
    return WORDS.get(bottleneck, bottleneck).partition(":")[0]


def spread(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    """'96 % (95 to 97 %)'."""
    if estimate is None:
        return NOTHING
    return f"{show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)})"


def rate(value: float) -> str:
    return f"{value:.3g}"


def share(value: float) -> str:
    """With a digit more than people say: intervals are narrow."""
    return f"{100 * value:.1f} %"


# ---- numbers ---------------------------------------------------------------------------------


def numbers(report: PlanReport) -> str:
    """A column a growth."""
    plans = report.growths
    heads = [(f"{one.growth:g}x", "") for one in plans]
    currency = report.spec.currency

    def chosen(show: Callable[[Choice], str]) -> list[str]:
        return [NOTHING if one.choice is None else show(one.choice) for one in plans]

    def planned_at(show: Callable[[GrowthPlan], str]) -> list[str]:
        return [show(one) for one in plans]

    rows: list[tuple[str, list[str]] | None] = [
        ("offered (req/s)", planned_at(lambda one: rate(one.rate_rps))),
        ("cheapest plan that holds", chosen(lambda one: one.title)),
        ("nodes, GPUs", chosen(lambda one: f"{one.nodes}, {one.gpus}")),
        (f"price ({currency} an hour)", chosen(lambda one: f"{one.price_per_hour:,.4g}")),
        None,
        ("within SLO, all seeds", chosen(lambda one: spread(one.attainment, share))),
        ("the other seeds", chosen(seeds)),
        ("target met in the bootstrap", chosen(lambda one: percent(one.confidence))),
        ("TTFT p90, p99", chosen(lambda one: times(one.outcome.ttft_s))),
        ("TBT p90, p99", chosen(lambda one: times(one.outcome.tbt_s))),
        ("prefix hits", chosen(lambda one: percent(one.outcome.hit_ratio))),
        None,
        ("capacity (req/s)", planned_at(lambda one: spread(one.capacity_rps, rate))),
        ("head-room", planned_at(room)),
        ("first bottleneck", planned_at(lambda one: short(one.bottleneck) or NOTHING)),
        None,
        *error_rows(plans),
        None,
        ("goodput per GPU (req/s)", chosen(lambda one: rate(one.goodput_rps_per_gpu))),
        (f"requests kept per {currency}", chosen(lambda one: rate(one.requests_per_money))),
        None,
        *baseline_rows(plans, currency),
        None,
        ("perfect system: nodes", planned_at(perfect)),
    ]
    foot = page.paragraph(
        "In parentheses: 95 % intervals, from a bootstrap over stretches of time and seeds. With "
        "the profile's error: all times longer, or all shorter, by what it states.",
        "small quiet",
    )
    return f"<h3>The plan</h3>{page.table('numbers', heads, rows)}{foot}"


def seeds(choice: Choice) -> str:
    if not choice.verified:
        return NOTHING
    shares = [share for _, share in choice.verified]
    return f"{len(shares)}: {share(min(shares))} to {share(max(shares))}"


def times(values: dict[str, float | None]) -> str:
    return f"{seconds(values.get('p90'))}, {seconds(values.get('p99'))}"


def error_rows(plans: Sequence[GrowthPlan]) -> list[tuple[str, list[str]] | None]:
    def each(show: Callable[[GrowthPlan], str]) -> list[str]:
        return [NOTHING if one.with_error is None else show(one) for one in plans]

    def within(one: GrowthPlan) -> str:
        error = one.with_error
        assert error is not None
        return f"{share(error.attainment_low)} to {share(error.attainment_high)}"

    def capacity(one: GrowthPlan) -> str:
        error = one.with_error
        assert error is not None
        return f"{rate(error.capacity_low_rps)} to {rate(error.capacity_high_rps)}"

    def nodes(one: GrowthPlan) -> str:
        error = one.with_error
        assert error is not None
        most = "more than allowed" if error.nodes_high is None else error.nodes_high
        return f"{error.nodes_low or NOTHING} to {most}"

    return [
        ("with the profile's error: within SLO", each(within)),
        ("capacity (req/s)", each(capacity)),
        ("nodes needed", each(nodes)),
    ]


def baseline_rows(plans: Sequence[GrowthPlan], currency: str) -> list[tuple[str, list[str]] | None]:
    def of(one: Choice | None) -> str:
        return NOTHING if one is None else f"{one.candidate.split}: {money(one, currency)}"

    def cheapest(one: GrowthPlan) -> str:
        if one.colocated is None and one.choice is not None:
            return f"none up to {max(offer.colocated_looked_for for offer in one.offers)} nodes"
        return of(one.colocated)

    def kept(one: Choice | None) -> str:
        if one is None:
            return NOTHING
        return f"{percent(one.attainment.value)}, {rate(one.requests_per_money)} per {currency}"

    return [
        ("cheapest disaggregated", [of(one.disaggregated) for one in plans]),
        ("cheapest colocated", [cheapest(one) for one in plans]),
        (
            "colocated on as many nodes: within SLO",
            [kept(one.colocated_same_nodes) for one in plans],
        ),
    ]


def perfect(one: GrowthPlan) -> str:
    bound = min((offer.bound for offer in one.offers), key=lambda bound: bound.nodes)
    return f"{bound.nodes} ({bound.prefill_nodes:.2f} prefill, {bound.decode_nodes:.2f} decode)"


# ---- around the plan -------------------------------------------------------------------------


def around(report: PlanReport) -> str:
    found = report.details
    if found is None:
        return ""
    figures = [capacity_figure(report, found), heat_figure(report, found)]
    sensitivity = [sensed(report, found, axis) for axis in AXES]
    return (
        f"<h3>Around the plan at {found.growth:g}x</h3>{page.figures([f for f in figures if f])}"
        f"<h3>What if something is different?</h3>"
        f"{page.figures([one for one in sensitivity if one])}{overload(report, found)}"
    )


def capacity_figure(report: PlanReport, found: Details) -> str:
    series, legend = [], []
    colours = dict(zip(SYSTEMS, theme.system_colours(SYSTEMS), strict=True))
    for system, points in groupby(found.curve, key=lambda point: point.system):
        sized = [
            planned.Sized(
                escape(point.title),
                point.nodes,
                point.capacity_rps.value,
                point.capacity_rps.low,
                point.capacity_rps.high,
            )
            for point in points
        ]
        series.append((SYSTEMS[system], colours[system], sized))
        legend.append((SYSTEMS[system], colours[system]))
    needed = [(f"{one.growth:g}x", one.rate_rps) for one in report.growths]
    bound = [(0.0, 0.0)]
    for one in sorted(report.growths, key=lambda one: one.rate_rps):
        best = min(offer.bound.prefill_nodes + offer.bound.decode_nodes for offer in one.offers)
        bound.append((best, one.rate_rps))
    return page.figure(
        planned.capacity_against_nodes(series, needed, bound),
        "capacity",
        "Capacity against nodes",
        "The highest rate at which the target is met, with 95 % intervals; dashed: the planned "
        "rates; dotted: the perfect system, that no cluster beats.",
        legend=legend,
        wide=True,
    )


def heat_figure(report: PlanReport, found: Details) -> str:
    if not found.heat:
        return ""
    best = next(one.disaggregated for one in report.growths if one.growth == found.growth)
    cells = [(one.prefill, one.decode, one.attainment, one.is_upper_bound) for one in found.heat]
    split = (best.candidate.prefill, best.candidate.decode) if best is not None else None
    return page.figure(
        planned.heat_map(cells, report.spec.slo.target, split),
        "splits",
        "Prefill and decode nodes",
        "Requests within the SLOs at the planned rate; framed: the cheapest that holds. 'misses': "
        "stopped as soon as the target was out of reach.",
        legend=[("holds", planned.HOLDS), ("misses the target", planned.MISSES)],
        wide=True,
    )


AXES = {
    "growth": ("More or less traffic", "times the planned rate"),
    "prefixes": ("Fewer shared prefixes", "sessions that still share prefixes"),
    "cache": ("Pool memory", "DRAM for KVCache a prefill node"),
    "link": ("Link bandwidth", "of a node, each direction"),
    "reports": ("Stale load reports", "time between an instance's load reports"),
}


def sensed(report: PlanReport, found: Details, axis: str) -> str:
    points = [one for one in found.sensitivity if one.axis == axis]
    if not points:
        return ""
    title, x = AXES[axis]
    shown = [
        planned.Share(
            one.label, one.attainment.value, one.attainment.low, one.attainment.high, one.is_plan
        )
        for one in points
    ]
    hits = [one.hit_ratio for one in points if one.hit_ratio is not None]
    note = "Diamond: as planned; dashed: the target."
    if hits and axis in ("cache", "prefixes"):
        note += f" Prefix hits from {percent(min(hits))} to {percent(max(hits))}."
    target = report.spec.slo.target
    return page.figure(planned.shares(shown, target, x), f"if-{axis}", title, note)


def overload(report: PlanReport, found: Details) -> str:
    """What each admission policy does over capacity."""
    if not found.overload:
        return ""
    names = [one.admission for one in found.overload]
    kinds = {
        "within SLO": (planned.HOLDS, ()),
        "rejected": ("#9aa0a8", ("rejected",)),
        "too late or too slow": (
            planned.MISSES,
            ("late_first_token", "slow_tokens", "both", "failed"),
        ),
    }
    parts = []
    for part, (colour, causes) in kinds.items():
        values = [
            sum(one.outcome.misses.get(cause, 0) for cause in causes) / one.outcome.requests
            if causes
            else one.outcome.attainment
            for one in found.overload
        ]
        parts.append((part, colour, values))
    plain, early = found.overload[0].outcome, found.overload[2].outcome
    times = f"{early.goodput_rps / plain.goodput_rps:.3g} times" if plain.goodput_rps else "all of"
    rows: list[tuple[str, list[str]] | None] = [
        ("goodput (req/s)", [rate(one.outcome.goodput_rps) for one in found.overload]),
        ("TTFT p90", [seconds(one.outcome.ttft_s["p90"]) for one in found.overload]),
        ("TBT p90", [seconds(one.outcome.tbt_s["p90"]) for one in found.overload]),
        (
            "prompt tokens prefilled and then refused",
            [f"{one.outcome.wasted_prefill_tokens:,}" for one in found.overload],
        ),
    ]
    plot = page.figure(
        planned.stacked(names, parts, "share of offered requests"),
        "overload",
        "Who is served, and how",
        f"Offered: {found.overload[0].speed:.3g} times the planned rate.",
        legend=[(part, colour) for part, colour, _ in parts],
        wide=True,
    )
    said = page.paragraph(
        f"At {found.overload_factor:g} times its capacity, early rejection gives {times} the "
        f"goodput of accepting everything ({rate(early.goodput_rps)} against "
        f"{rate(plain.goodput_rps)} req/s)."
    )
    table = page.table("numbers", [(name, "") for name in names], rows)
    return f"<h3>Overload</h3>{said}{page.figures([plot])}{table}"


# ---- how it was found ------------------------------------------------------------------------


def settings(report: PlanReport) -> str:
    """What each other setting came to: the smallest cluster that it made hold, or the best miss."""
    rows: list[tuple[str, list[str]] | None] = []
    for one in report.growths:
        rows.append(None)
        for (name, value), group in groupby(
            one.tried, key=lambda tried: (tried.setting, tried.value)
        ):
            attempts = list(group)
            taken = [tried for tried in attempts if tried.is_adopted]
            best = taken[-1] if taken else max(attempts, key=lambda tried: tried.attainment)
            kept = ("under " if best.is_upper_bound else "") + percent(best.attainment)
            setting = f"{one.growth:g}x: {name.rpartition('.')[2]} {value}"
            rows.append((setting, [best.split, kept, "taken" if taken else "saves no node"]))
        rows += [
            (f"{one.growth:g}x: held for one seed only", [*said.split(": "), "dropped"])
            for said in one.dropped
        ]
    if not any(rows):
        return ""
    heads = [("on", ""), ("within SLO", ""), ("", "")]
    table = page.table("numbers", heads, rows[1:] if rows[0] is None else rows)
    return f"<h3>Settings that were tried to save nodes</h3>{table}"


def method(report: PlanReport) -> str:
    counts, trace, spec = report.counts, report.trace, report.spec
    growth = {
        "speed": "the same requests in less time (think times and reuse distances shrink too)",
        "users": "as many times the users, in the same time",
    }[spec.growth_by]
    baselines = [one.colocated or one.colocated_same_nodes for one in report.growths]
    titles = dict.fromkeys(", ".join(one.title.split(", ")[1:]) for one in baselines if one)
    ways = ", ".join(spec.search.colocated_batching)
    baseline = f"the best of {ways}: {'; '.join(titles) or 'none'}"
    facts: list[tuple[str, Sequence[str]] | None] = [
        ("traffic", [f"{trace['name']}, {trace['requests']:,} requests over "
                     f"{trace['duration_s']:,.0f} s, sha256 {trace['sha256']}"]),
        ("transforms", ["; ".join(trace["transforms"]) or "none"]),
        ("growth means", [growth]),
        ("colocated baseline", [baseline]),
        ("profiles", ["; ".join(
            f"{one['name']} ({one['model']} on {one['node']}, {one['gpus_per_node']} GPUs at "
            f"{one['price_per_gpu_hour']:g} {spec.currency} an hour): {one['source']}"
            for one in report.profiles.values())]),
        ("effort", [f"{counts.run} runs of the whole trace ({counts.stopped} stopped as soon as "
                    f"the target was out of reach), {counts.reused} kept from before, "
                    f"{counts.cpu_s:.0f} CPU s, {report.wall_s:.0f} s"]),
        ("machine", [", ".join(f"{key} {value}" for key, value in report.machine.items())]),
        ("versions", [", ".join(f"{key} {value}" for key, value in report.versions.items())]),
    ]  # fmt: skip  # a fact a line
    text = msgspec.json.format(msgspec.json.encode(spec), indent=2).decode()
    return (
        f"<h3>How it was found</h3>{''.join(page.paragraph(one, 'small') for one in NOTES)}"
        f"{page.table('facts', [('', '')], facts)}{page.folded('The whole input', text)}"
    )


NOTES = (
    "Every candidate serves the whole trace in virtual time, with the live cluster's own code; all "
    "meet the same requests at the same times. The search takes more nodes never to do worse.",
    "The perfect system has one endless cache that every node reads, an even load, no waiting, and "
    "leaves out the dearest requests that the target allows it to miss.",
    "Rejected requests count as misses. A plan that rejects can hold with fewer nodes, because it "
    "spends nothing on what it cannot serve in time.",
    "The intervals know the traffic's own variation inside this trace, not that of another day.",
)
FOOT = "Written by mooncake-bench plan. This page loads nothing from the network."
