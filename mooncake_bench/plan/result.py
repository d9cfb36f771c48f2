"""What does a plan say? The content of plan.json, which the page shows."""

from __future__ import annotations

from typing import Any

import msgspec

from mooncake_bench.plan.bound import Bound
from mooncake_bench.plan.candidate import Candidate
from mooncake_bench.plan.interval import Estimate
from mooncake_bench.plan.lab import Counts
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.search import Tried
from mooncake_bench.plan.spec import Spec


class Choice(msgspec.Struct, frozen=True):
    """A cluster with its price and how it did; `verified` is (seed, attainment) of other seeds."""

    candidate: Candidate
    title: str
    nodes: int
    gpus: int
    price_per_hour: float
    outcome: Outcome
    attainment: Estimate
    confidence: float
    goodput_rps_per_gpu: float
    requests_per_money: float
    verified: tuple[tuple[int, float], ...] = ()


class Offer(msgspec.Struct, frozen=True):
    """The best of one machine: what holds at which price; None where nothing does."""

    profile: str
    bound: Bound
    disaggregated: Candidate | None
    price_per_hour: float | None
    colocated: Candidate | None
    colocated_price_per_hour: float | None
    colocated_looked_for: int
    binding: str = ""


class WithError(msgspec.Struct, frozen=True):
    """The same with the profile's stated error: all times longer, or all shorter, by it."""

    prefill_error: float
    decode_error: float
    attainment_low: float
    attainment_high: float
    capacity_low_rps: float
    capacity_high_rps: float
    nodes_low: int | None
    nodes_high: int | None


class GrowthPlan(msgspec.Struct, frozen=True):
    """The plan at one growth; `choice` is None where no cluster within the limits holds."""

    growth: float
    rate_rps: float
    offers: tuple[Offer, ...]
    choice: Choice | None
    infeasible: str = ""
    dropped: tuple[str, ...] = ()  # Held at first, but not over the other seeds.
    tried: tuple[Tried, ...] = ()
    disaggregated: Choice | None = None
    colocated: Choice | None = None
    colocated_same_nodes: Choice | None = None
    capacity_rps: Estimate | None = None
    bottleneck: str = ""
    with_error: WithError | None = None

    @property
    def headroom(self) -> float | None:
        """Capacity over the planned rate, less 1."""
        return self.capacity_rps.value / self.rate_rps - 1.0 if self.capacity_rps else None


class CurvePoint(msgspec.Struct, frozen=True):
    """Capacity of one cluster."""

    system: str
    title: str
    nodes: int
    capacity_rps: Estimate


class Cell(msgspec.Struct, frozen=True):
    """One split of the heat map."""

    prefill: int
    decode: int
    attainment: float
    is_upper_bound: bool


class Sensed(msgspec.Struct, frozen=True):
    """The plan with one thing changed; `is_plan` where it is as planned."""

    axis: str
    label: str
    value: float
    is_plan: bool
    attainment: Estimate
    hit_ratio: float | None
    ttft_p90_s: float | None
    tbt_p90_s: float | None


class Overloaded(msgspec.Struct, frozen=True):
    """An admission policy over capacity."""

    admission: str
    speed: float
    outcome: Outcome


class Details(msgspec.Struct, frozen=True):
    """What is told of the plan at the first growth that is feasible."""

    growth: float
    curve: tuple[CurvePoint, ...]
    heat: tuple[Cell, ...]
    sensitivity: tuple[Sensed, ...]
    overload: tuple[Overloaded, ...]
    overload_factor: float


class PlanReport(msgspec.Struct, frozen=True):
    """All of it. `growths` are in the order asked for."""

    spec: Spec
    trace: dict[str, Any]
    profiles: dict[str, dict[str, Any]]
    growths: tuple[GrowthPlan, ...]
    details: Details | None
    counts: Counts
    wall_s: float
    versions: dict[str, str]
    machine: dict[str, Any]
