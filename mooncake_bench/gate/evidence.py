"""What does a run say to a gate? Its numbers by name, its decisions, and what it was run on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.gate.errors import GateError
from mooncake_bench.metrics import Floats
from mooncake_bench.records import Run, RunInfo, read_run

DECISIONS = ("request", "prefill", "decode", "status", "reason", "reused_tokens", "fetched_tokens")
"""Columns of a request that say what was decided about it."""
TIMES = ("ttft_s", "ttft_from_send_s", "tbt_s", "tbt_s_max", "tbt_s_p99", "tpot_s", "e2e_s")
"""Times of a request, of which any percentile may be asked: ttft_s.p95, e2e_s.p99.9, tbt_s.max."""
NO_NUMBERS = ("valid", "source", "slo", "measured")
"""Parts of summary.json that say what was run and not how it went."""
_QUANTILE = re.compile(r"(?P<column>\w+)\.(?:p(?P<percent>\d{1,2}(?:\.\d+)?)|mean|max)")


@dataclass(frozen=True, slots=True)
class Evidence:
    """One run, or one scenario in virtual time, as a gate sees it.

    `numbers` are the leaves of summary.json by dotted name; `frame` is the `per_request` frame of
    the requests that count, empty where only numbers were kept; `info` is None for a scenario.
    """

    name: str
    numbers: Mapping[str, float | None]
    decisions: pl.DataFrame
    frame: pl.DataFrame = field(default_factory=pl.DataFrame)
    info: RunInfo | None = None

    @property
    def is_simulated(self) -> bool:
        return self.info is None or self.info.source == "simulated"

    def value(self, metric: str) -> float | None:
        """A number of summary.json by its dotted name, or a percentile of one of TIMES.

        Raises GateError naming the neighbours of a metric that does not exist.
        """
        if metric in self.numbers:
            return self.numbers[metric]
        values = self.times(metric)
        if values is None:
            raise GateError(f"{self.name}: no metric {metric!r}; did you mean {self.near(metric)}?")
        return statistic(metric, values)

    def times(self, metric: str) -> Floats | None:
        """The values of finished requests that `metric` sums up, in order of arrival, or None."""
        match = _QUANTILE.fullmatch(metric)
        if match is None or match["column"] not in TIMES or match["column"] not in self.frame:
            return None
        finished = self.frame.filter(pl.col("status") == "finished").sort("arrival_s")
        return finished[match["column"]].drop_nulls().to_numpy()

    def near(self, metric: str) -> str:
        """Names like `metric` that exist."""
        known = [*self.numbers, *(f"{column}.p95" for column in TIMES)]
        kin = [name for name in known if name.split(".")[0] == metric.split(".")[0]]
        close = difflib.get_close_matches(metric, known, n=3, cutoff=0.5)
        return ", ".join(close or kin[:4] or known[:6])


def statistic(metric: str, values: Floats) -> float | None:
    """The mean, the maximum or the percentile of `values` that the metric's last part names."""
    if not values.size:
        return None
    kind = metric.split(".", 1)[1]
    if kind == "mean":
        return float(values.mean())
    if kind == "max":
        return float(values.max())
    return float(np.quantile(values, float(kind[1:]) / 100))


def read_evidence(directory: Path) -> Evidence:
    """A run directory. Raises RecordsError, and GateError for a run without a request."""
    return of_run(read_run(directory), str(directory))


def of_run(run: Run, name: str) -> Evidence:
    """A run as evidence; raises GateError where no request was offered in what was measured."""
    frame = metrics.per_request(run.requests, run.spans)
    frame = metrics.measured(frame, run.info.measured_s)
    if not frame.height:
        raise GateError(f"{name}: no request was offered; give the run a trace with some")
    numbers = leaves(run.summary)
    return Evidence(name, numbers, run.requests.select(DECISIONS), frame, run.info)


def leaves(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """The numbers of a summary by dotted name; counts and shares as floats, texts left out."""
    found: dict[str, float | None] = {}
    for key, value in summary.items():
        name = f"{prefix}{key}"
        if name in NO_NUMBERS or key == "slo":
            continue
        if isinstance(value, Mapping):
            found |= leaves(value, f"{name}.")
        elif value is None or isinstance(value, int | float):
            found[name] = None if value is None else float(value)
    return found
