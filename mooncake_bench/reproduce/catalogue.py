"""Which figures are there? Their experiments by name, in the order of the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from mooncake_bench.reproduce.errors import ReproduceError
from mooncake_bench.reproduce.experiment import Experiment
from mooncake_bench.reproduce.experiments import (
    ablations,
    arxiv_admission,
    arxiv_end_to_end,
    arxiv_parts,
    fast25_cache,
    fast25_end_to_end,
    fast25_sweeps,
)

MODULES = (
    fast25_end_to_end,
    fast25_cache,
    fast25_sweeps,
    arxiv_parts,
    arxiv_admission,
    arxiv_end_to_end,
    ablations,
)


def place(experiment: Experiment) -> tuple[int, int]:
    """By paper, then by number: fast25-fig9 is before fast25-fig10."""
    paper, _, figure = experiment.name.partition("-")
    number = re.search(r"\d+", figure)
    return ("fast25", "arxiv", "ablations").index(paper), int(number.group()) if number else 0


EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in sorted((one for module in MODULES for one in module.EXPERIMENTS), key=place)
}


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Those asked for, in the page's order; all if none is. Raises ReproduceError."""
    for name in names:
        if name not in EXPERIMENTS:
            close = get_close_matches(name, EXPERIMENTS, n=3, cutoff=0.4) or list(EXPERIMENTS)
            raise ReproduceError(f"no figure {name!r}; did you mean {', '.join(close)}?")
    return [one for one in EXPERIMENTS.values() if not names or one.name in names]
