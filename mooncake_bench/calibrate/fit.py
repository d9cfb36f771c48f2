"""Which profile fits what was measured, and how well? Least squares with coefficients >= 0."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from reference_cluster.cost_model import CostModel, DecodeCost, Overheads, PrefillCost, Profile

Floats = npt.NDArray[np.float64]
ROUNDS = 30
# Points that are further off count by their distance, not its square: a wake-up that came late
# says nothing about the cost of what it was late for.
NEAR = 0.05


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """From the request to its first token, without waiting for others; or, where the hand-over has
    points of its own, what the prefill instance was busy for."""

    input_tokens: int
    reused_tokens: int
    ttft_s: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A decode step; `count` such steps were seen, of which this is the median."""

    batch: int
    context_tokens: float  # Of all sequences together, in the middle of the steps.
    step_s: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class HandoverPoint:
    """Of the time to a first token what was neither waiting nor prefill."""

    input_tokens: int
    seconds: float


class Points(NamedTuple):
    """What was measured."""

    prefills: Sequence[PrefillPoint]
    decodes: Sequence[DecodePoint]
    handovers: Sequence[HandoverPoint] = ()


def fit_prefill(points: Sequence[PrefillPoint]) -> PrefillCost:
    """base + token (n-p) + token2 (n^2-p^2) + reused p, none negative."""
    n = np.array([point.input_tokens for point in points], dtype=np.float64)
    p = np.array([point.reused_tokens for point in points], dtype=np.float64)
    seconds = np.array([point.ttft_s for point in points])
    columns = np.stack([np.ones_like(n), n - p, n * n - p * p, p], axis=1)
    base_s, token_s, token2_s, reused_s = fit(columns, seconds, np.ones_like(n))
    return PrefillCost(base_s, token_s, token2_s, reused_s)


def fit_decode(points: Sequence[DecodePoint]) -> DecodeCost:
    """base + sequence B + context C, none negative."""
    batch = np.array([point.batch for point in points], dtype=np.float64)
    context = np.array([point.context_tokens for point in points])
    counts = np.array([point.count for point in points], dtype=np.float64)
    columns = np.stack([np.ones_like(batch), batch, context], axis=1)
    return DecodeCost(*fit(columns, np.array([point.step_s for point in points]), counts))


def fit_handover(points: Sequence[HandoverPoint], overheads: Overheads) -> Overheads:
    """base + token n, none negative."""
    if not points:
        return overheads
    n = np.array([point.input_tokens for point in points], dtype=np.float64)
    seconds = np.array([point.seconds for point in points])
    columns = np.stack([np.ones_like(n), n], axis=1)
    handover_s, token_s = fit(columns, seconds, np.ones_like(n))
    return msgspec.structs.replace(overheads, handover_s=handover_s, handover_token_s=token_s)


def fit(columns: Floats, seconds: Floats, counts: Floats) -> list[float]:
    """Coefficients >= 0 for the least errors relative to what is fitted.

    Relative to what was seen they would come out too small: of two points that are equally far
    from the truth the lower one would count for more.
    """
    scale, weights = seconds, counts
    for _ in range(ROUNDS):
        roots = np.sqrt(weights) / scale
        found = not_negative(columns * roots[:, None], seconds * roots)
        scale = np.maximum(columns @ found, seconds * 1e-3)
        weights = counts / np.maximum(np.abs(seconds / scale - 1), NEAR)
    return [float(one) for one in found]


def not_negative(columns: Floats, values: Floats) -> Floats:
    """Least squares: the most negative coefficient goes to zero until there is none."""
    kept = [number for number in range(columns.shape[1]) if columns[:, number].any()]
    while True:
        # Columns of like size: squares of thousands beside ones are next to singular.
        sizes = np.linalg.norm(columns[:, kept], axis=0)
        found, *_ = np.linalg.lstsq(columns[:, kept] / sizes, values, rcond=None)
        worst = int(np.argmin(found))
        if found[worst] >= 0 or len(kept) == 1:
            break
        del kept[worst]
    coefficients = np.zeros(columns.shape[1])
    coefficients[kept] = np.maximum(found / sizes, 0.0)
    return coefficients


def fitted_profile(base: Profile, name: str, source: str, points: Points) -> Profile:
    """The base profile's sizes with fitted times; its `error` is that of the fit.

    Nine tenths of the points are within `prefill_error` and `decode_error`.
    """
    prefills, decodes, handovers = points
    profile = msgspec.structs.replace(
        base,
        name=name,
        prefill=fit_prefill(prefills),
        decode=fit_decode(decodes),
        overheads=fit_handover(handovers, base.overheads),
    )
    cost = CostModel(profile)
    first = [
        abs(cost.prefill_s(one.input_tokens, one.reused_tokens) / one.ttft_s - 1)
        for one in prefills
    ]
    steps = [
        abs(cost.step_s(one.batch, round(one.context_tokens)) / one.step_s - 1) for one in decodes
    ]
    said = [
        f"{what} within {within(errors):.0%} for nine tenths of {len(errors)} {points} "
        f"(median {statistics.median(errors):.0%})"
        for what, errors, points in (("prefill", first, "prompts"), ("a step", steps, "batches"))
    ]
    return msgspec.structs.replace(
        profile,
        source=source,
        error=", ".join(said),
        prefill_error=within(first),
        decode_error=within(steps),
    )


def within(errors: Sequence[float]) -> float:
    """What nine tenths of the errors are within."""
    return float(np.quantile(errors, 0.9))


def as_toml(profile: Profile) -> str:
    """As `reference_cluster/profiles/*.toml` are written, and read."""
    flat, sections = [], []
    for key, value in msgspec.to_builtins(profile).items():
        if isinstance(value, dict):
            lines = [f"{name} = {one!r}" for name, one in value.items()]
            sections.append("\n".join(["", f"[{key}]", *lines]))
        else:
            flat.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join([*flat, *sections, ""])
