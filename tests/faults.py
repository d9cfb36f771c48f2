"""Who fails when? A schedule of faults drawn from a seed: the same live and in virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "stop"]


@dataclass(frozen=True)
class Fault:
    """A worker is killed, or stops for good without a word until somebody notices."""

    at_s: float
    kind: Kind
    name: str


def schedule(
    seed: int, names: Sequence[str], count: int, first_s: float, every_s: float
) -> list[Fault]:
    """`count` faults in time order, one in each `every_s` from `first_s` on.

    Each falls into the first tenth of its stretch, so that what comes after it has the rest.
    """
    rng = random.Random(seed)
    starts = [first_s + position * every_s for position in range(count)]
    return [
        Fault(start_s + rng.uniform(0.0, 0.1 * every_s), rng.choice(("kill", "stop")), name)
        for start_s, name in zip(starts, drawn(rng, names, count), strict=True)
    ]


def drawn(rng: random.Random, names: Sequence[str], count: int) -> list[str]:
    """Names in random order, each as often as the others."""
    found: list[str] = []
    while len(found) < count:
        found += rng.sample(list(names), len(names))
    return found[:count]
