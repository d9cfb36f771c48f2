"""How sure is it? Bootstrap over runs of time blocks and over seeds.

Requests that queue behind one another miss together, so the unit that is drawn is a stretch of
time, not a request (a moving-block bootstrap); where there are several seeds, seeds are drawn too.
Two loads are compared under the same draws (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_bench.plan.outcome import BLOCKS, Outcome
from workloads.model import seeded

Floats = npt.NDArray[np.float64]

REPLICATES = 2000
RUN = 5  # Blocks drawn together: a twelfth of the trace.
LEVELS = (0.025, 0.975)


class Estimate(msgspec.Struct, frozen=True):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def resampled(outcomes: Sequence[Outcome]) -> Floats:
    """REPLICATES attainments of whole outcomes (one a seed), drawn anew; always the same draws."""
    offered = np.array([one.offered for one in outcomes], dtype=np.float64)
    met = np.array([one.met for one in outcomes], dtype=np.float64)
    assert offered.shape == met.shape == (len(outcomes), BLOCKS)
    random = seeded(0)
    count = len(outcomes)
    seeds = (random.random((REPLICATES, count)) * count).astype(np.int64)
    starts = (random.random((REPLICATES, count, BLOCKS // RUN)) * BLOCKS).astype(np.int64)
    blocks = (starts[..., None] + np.arange(RUN)) % BLOCKS
    blocks = blocks.reshape(REPLICATES, count, -1)
    drawn_met = met[seeds[..., None], blocks].sum(axis=(1, 2))
    drawn_offered = offered[seeds[..., None], blocks].sum(axis=(1, 2))
    return np.asarray(drawn_met / np.maximum(drawn_offered, 1.0))


def attainment(outcomes: Sequence[Outcome]) -> Estimate:
    """Pooled attainment over seeds."""
    offered = sum(sum(one.offered) for one in outcomes)
    met = sum(sum(one.met) for one in outcomes)
    low, high = np.quantile(resampled(outcomes), LEVELS)
    return Estimate(met / max(offered, 1), float(low), float(high))


def confidence(outcomes: Sequence[Outcome], target: float) -> float:
    """Share of the replicates in which the target is met."""
    return float(np.mean(resampled(outcomes) >= target))


def capacity(
    held: tuple[float, Sequence[Outcome]], missed: tuple[float, Sequence[Outcome]], target: float
) -> Estimate:
    """Where attainment crosses the target, between a load that holds and one that does not.

    Loads in any unit. Linear between the two in each replicate; a replicate whose crossing lies
    outside is cut at half the distance beyond.
    """
    (low, low_outcomes), (high, high_outcomes) = held, missed
    value = crossing(
        np.array([attainment(low_outcomes).value]),
        np.array([attainment(high_outcomes).value]),
        low,
        high,
        target,
    )
    drawn = crossing(resampled(low_outcomes), resampled(high_outcomes), low, high, target)
    bounds = np.quantile(drawn, LEVELS)
    return Estimate(float(value[0]), float(bounds[0]), float(bounds[1]))


def crossing(at_low: Floats, at_high: Floats, low: float, high: float, target: float) -> Floats:
    slope = np.minimum(at_high - at_low, -1e-6)
    share = np.clip((target - at_low) / slope, -0.5, 1.5)
    return np.asarray(low + share * (high - low))
