"""Is one side's runs worse than the other's, by how much, and could we have seen it?

Every function takes one number a run. Requests inside a run are correlated: a test on pooled
requests calls identical runs different in 61 to 97 % of cases at a nominal 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import comb

import numpy as np

from mooncake_bench.gate.policy import Estimator
from mooncake_bench.gate.verdict import Better
from mooncake_bench.metrics import Floats

DRAWS = 2000
REPLICATES = 100
POWER = 0.9
REPEATS = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
SEED = 20_240_229  # Intervals are the same for the same runs.


def worse(values: Floats, better: Better) -> Floats:
    """The values with the sign that makes more of them worse."""
    return values if better == "smaller" else -values


def estimate(badness: Floats, estimator: Estimator) -> Floats:
    """One number for the runs along the last axis: the best of them, or their median."""
    found: Floats = np.min(badness, -1) if estimator == "best" else np.median(badness, -1)
    return found


def p_value(baseline: Floats, candidate: Floats, estimator: Estimator) -> float:
    """The chance of a candidate at least so much worse if both sides were the same (exact).

    Of the best of k, that so many baseline runs are all better than the best candidate run (a
    precedence test: it looks at good runs alone, as the estimator does). Of the median, Mann and
    Whitney's, one-sided; equal values count for the candidate.
    """
    if estimator == "best":
        ahead = int((baseline < candidate.min()).sum())
        rest = len(baseline) + len(candidate) - ahead
        return comb(rest, len(candidate)) / comb(rest + ahead, len(candidate))
    wins = int((candidate[:, None] > baseline[None, :]).sum())
    ways = _orders(len(baseline), len(candidate))
    return sum(ways[wins:]) / sum(ways)


@cache
def _orders(n: int, m: int) -> tuple[int, ...]:
    """In how many orders of n and m runs does the second side win 0, 1, ... n m comparisons?"""
    if n == 0 or m == 0:
        return (1,)
    # The last in order is of the second side, which beats all n of the first, or of the first.
    ways = [0] * (n * m + 1)
    for wins, count in enumerate(_orders(n, m - 1)):
        ways[wins + n] += count
    for wins, count in enumerate(_orders(n - 1, m)):
        ways[wins] += count
    return tuple(ways)


def least_p(baseline: int, candidate: int) -> float:
    """The smallest p that so many runs can give: of 3 against 3 it is 1/20."""
    return 1 / comb(baseline + candidate, candidate)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being so many (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def interval(
    baseline: Floats, candidate: Floats, reduce: Callable[[Floats], Floats]
) -> tuple[float, float]:
    """95 % of the difference of the sides' estimates, candidate - baseline.

    Both are (runs, replicates): what a run's number would have been with other parts of the run.
    Runs are drawn first, then a replicate of each: a hierarchical bootstrap, a little too wide as
    runs already differ by what is within them.
    """
    random = np.random.default_rng(SEED)
    drawn = reduce(_draw(random, candidate)) - reduce(_draw(random, baseline))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _draw(random: np.random.Generator, replicates: Floats) -> Floats:
    runs, count = replicates.shape
    which = random.integers(runs, size=(DRAWS, runs))
    return replicates[which, random.integers(count, size=(DRAWS, runs))]


def detectable(
    noise: Floats, repeats: tuple[int, int], estimator: Estimator, slack: float
) -> float:
    """The least worsening that goes beyond `slack` in POWER of all cases with so many repeats.

    `noise` are runs less the middle of their side.
    """
    random = np.random.default_rng(SEED)
    baseline, candidate = (
        estimate(noise[random.integers(len(noise), size=(DRAWS, count))], estimator)
        for count in repeats
    )
    return float(slack - np.quantile(candidate - baseline, 1 - POWER))


def repeats_needed(noise: Floats, estimator: Estimator, slack: float) -> int | None:
    """So many a side make twice the slack detectable; None: none of REPEATS does."""
    for count in REPEATS:
        if detectable(noise, (count, count), estimator, slack) <= 2 * slack:
            return count
    return None


def noise_of(baseline: Floats, candidate: Floats) -> Floats:
    """How far runs of both sides are from the middle of their own side."""
    return np.concatenate([side - np.median(side) for side in (baseline, candidate)])


def replicates(
    values: Floats, statistic: Callable[[Floats], float], count: int = REPLICATES, blocks: int = 20
) -> Floats:
    """A number of a run as it might have been: its time blocks drawn anew (values in time order).

    Blocks, because requests that queue behind one another are alike.
    """
    random = np.random.default_rng(SEED)
    parts = np.array_split(values, min(blocks, max(1, len(values) // 2)))
    drawn = random.integers(len(parts), size=(count, len(parts)))
    return np.array([statistic(np.concatenate([parts[one] for one in row])) for row in drawn])
