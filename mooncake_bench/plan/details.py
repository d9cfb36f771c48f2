"""What lies around the plan? Splits beside it, other sizes, other circumstances, overload."""

from __future__ import annotations

import asyncio

import msgspec

from mooncake_bench.plan import interval
from mooncake_bench.plan.candidate import Candidate, Load, Value
from mooncake_bench.plan.interval import Estimate
from mooncake_bench.plan.lab import at
from mooncake_bench.plan.result import Cell, CurvePoint, Details, GrowthPlan, Overloaded, Sensed
from mooncake_bench.plan.search import Hunt
from mooncake_bench.plan.study import Study

OVERLOAD = 1.2
ADMISSIONS = ("accept-all", "load-based", "early-rejection", "predictive")
PREFILL_AROUND, DECODE_AROUND = (-2, -1, 0, 1, 2), (-1, 0, 1, 2)
SIZES_AROUND = (-1, 1, 2)
LINKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
CACHES = (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0)
UNSHARED = (0.0, 0.25, 0.5, 1.0)
REPORTS_S = (0.0, 1.0, 5.0, 20.0)
GROWTHS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


async def details(study: Study, plan: GrowthPlan, others: list[GrowthPlan]) -> Details:
    """Around the plan at one growth; `others` are the plans at the other growths."""
    assert plan.choice is not None
    candidate = plan.choice.candidate
    machine = next(one for one in study.spec.profiles if one.profile == candidate.profile)
    hunt = study.hunt(machine, plan.growth)
    split = plan.disaggregated.candidate if plan.disaggregated is not None else None
    heat, curve, sensitivity, overload = await asyncio.gather(
        heat_map(hunt, split),
        sizes(study, hunt, plan, others),
        sensed(hunt, candidate),
        overloaded(hunt, candidate, plan),
    )
    return Details(plan.growth, curve, heat, sensitivity, overload, OVERLOAD)


async def heat_map(hunt: Hunt, best: Candidate | None) -> tuple[Cell, ...]:
    """Attainment of the splits around the best; of hopeless ones only a bound."""
    if best is None:
        return ()
    width = int(best.option("prefill.nodes_per_group", 1))
    splits = [
        best.with_split(best.prefill + more * width, best.decode + decode)
        for more in PREFILL_AROUND
        for decode in DECODE_AROUND
        if best.prefill + more * width > 0 and best.decode + decode > 0
    ]
    outcomes = await hunt.lab.outcomes([hunt.trial(one) for one in splits], is_whole=False)
    return tuple(
        Cell(one.prefill, one.decode, outcome.attainment, outcome.is_stopped)
        for one, outcome in zip(splits, outcomes, strict=True)
    )


# ---- capacity against nodes ------------------------------------------------------------------


async def sizes(
    study: Study, hunt: Hunt, plan: GrowthPlan, others: list[GrowthPlan]
) -> tuple[CurvePoint, ...]:
    """Capacity of the plan's kind at other sizes, and of colocated instances on as many nodes."""
    assert plan.choice is not None
    around = [
        resized(plan.choice.candidate, plan.choice.nodes + more, hunt) for more in SIZES_AROUND
    ]
    clusters = [one for one in around if one is not None]
    if plan.colocated_same_nodes is not None:
        same = plan.colocated_same_nodes.candidate
        if plan.choice.candidate.system != "colocated":
            counts = (plan.choice.nodes, 2 * plan.choice.nodes)
            clusters += [msgspec.structs.replace(same, colocated=one) for one in counts]
    found = await asyncio.gather(
        *(study.capacity(hunt, one, plan.rate_rps, seeds=1) for one in clusters)
    )
    points = [
        CurvePoint(one.system, one.title, one.nodes, capacity)
        for one, (capacity, _) in zip(clusters, found, strict=True)
    ]
    for one in (plan, *others):
        if one.choice is not None and one.capacity_rps is not None:
            chosen = one.choice
            system = chosen.candidate.system
            points.append(CurvePoint(system, chosen.title, chosen.nodes, one.capacity_rps))
    return tuple(sorted(points, key=lambda point: (point.system, point.nodes)))


def resized(candidate: Candidate, nodes: int, hunt: Hunt) -> Candidate | None:
    """The candidate on so many nodes, its roles in balance with what the plan needs of each."""
    if candidate.system == "colocated":
        return msgspec.structs.replace(candidate, colocated=nodes) if nodes > 0 else None
    width = int(candidate.option("prefill.nodes_per_group", 1))
    # What the whole plan's nodes are for: its decode share by the bound, but its own prefill.
    needs = max(hunt.bound.prefill_nodes, 1e-9), max(hunt.bound.decode_nodes, 1e-9)
    splits = [
        candidate.with_split(prefill, nodes - prefill)
        for prefill in range(width, nodes, width)
        if abs(nodes - prefill - candidate.decode) <= 1
    ]
    return max(
        splits,
        key=lambda one: (min(one.prefill / needs[0], one.decode / needs[1]), one.prefill),
        default=None,
    )


# ---- other circumstances ---------------------------------------------------------------------


async def sensed(hunt: Hunt, candidate: Candidate) -> tuple[Sensed, ...]:
    """The plan with one thing changed at a time, under the planned load."""
    variants = [*own_variants(hunt, candidate), *load_variants(hunt, candidate)]
    outcomes = await hunt.lab.outcomes(
        [hunt.trial(one, load) for _, _, _, _, one, load in variants]
    )
    return tuple(
        Sensed(
            axis,
            label,
            value,
            is_plan,
            interval.attainment([outcome]),
            outcome.hit_ratio,
            outcome.ttft_s["p90"],
            outcome.tbt_s["p90"],
        )
        for (axis, label, value, is_plan, _, _), outcome in zip(variants, outcomes, strict=True)
    )


Variant = tuple[str, str, float, bool, Candidate, Load]


def own_variants(hunt: Hunt, candidate: Candidate) -> list[Variant]:
    """Link and pool, where the system has them; age of the load reports."""
    profile = hunt.profile
    link = float(candidate.option("network.link_bytes_per_s", profile.link_bytes_per_s))
    tokens = int(candidate.option("prefill.dram_tokens", profile.dram_kv_tokens))
    found: list[Variant] = []

    def add(axis: str, label: str, value: float, is_plan: bool, name: str, to: Value) -> None:
        changed = candidate if is_plan else candidate.with_options(**{name.replace(".", "__"): to})
        found.append((axis, label, value, is_plan, changed, hunt.load))

    if candidate.system == "disaggregated":
        for factor in LINKS:
            gigabits = link * factor * 8e-9
            name = "network.link_bytes_per_s"
            add("link", f"{gigabits:,.0f} Gbps", gigabits, factor == 1, name, link * factor)
        for factor in CACHES:
            size = round(tokens * factor)
            gigabytes = size * profile.kv_bytes_per_token / 1e9
            add(
                "cache", f"{gigabytes:,.0f} GB", gigabytes, factor == 1, "prefill.dram_tokens", size
            )
    for age_s in REPORTS_S:
        add("reports", f"{age_s:g} s", age_s, age_s == 0, "conductor.report_every_s", age_s)
    return found


def load_variants(hunt: Hunt, candidate: Candidate) -> list[Variant]:
    """Less sharing of prefixes, and more or fewer requests."""
    found: list[Variant] = []
    for share in UNSHARED:
        load = msgspec.structs.replace(hunt.load, unshared=share)
        found.append(("prefixes", f"{1 - share:.0%}", 1 - share, share == 0, candidate, load))
    for factor in GROWTHS:
        load = at(hunt.load, factor)
        found.append(("growth", f"{factor:g}x", factor, factor == 1, candidate, load))
    return found


async def overloaded(hunt: Hunt, candidate: Candidate, plan: GrowthPlan) -> tuple[Overloaded, ...]:
    """Every admission policy at OVERLOAD times the plan's capacity."""
    capacity = plan.capacity_rps or Estimate(plan.rate_rps, plan.rate_rps, plan.rate_rps)
    speed = float(f"{OVERLOAD * capacity.value / plan.rate_rps:.4g}")
    load = at(hunt.load, speed)
    changed = [candidate.with_options(conductor__admission=name) for name in ADMISSIONS]
    outcomes = await hunt.lab.outcomes([hunt.trial(one, load) for one in changed])
    return tuple(
        Overloaded(name, speed, outcome) for name, outcome in zip(ADMISSIONS, outcomes, strict=True)
    )
