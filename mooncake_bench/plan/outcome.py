"""What does one run tell a planner? How many requests kept the promise, when, and why not."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.slo import Slo

BLOCKS = 60
"""Parts of equal length that a trace is cut into; the bootstrap draws runs of them."""


class Outcome(msgspec.Struct, frozen=True):
    """A trial's result. One that was stopped early has an upper bound as its attainment.

    `offered` and `met` are by BLOCKS parts of the trace's time (empty where stopped); `stages` are
    mean seconds of finished requests, `stages_missed` of those that missed; `load` is the mean of
    each role's load (predicted TTFT or TBT over its SLO), `busy` its computing share.
    """

    requests: int
    attainment: float
    is_stopped: bool = False
    offered: list[int] = []
    met: list[int] = []
    misses: dict[str, int] = {}
    rejected_by_reason: dict[str, int] = {}
    goodput_rps: float = 0.0
    offered_rps: float = 0.0
    ttft_s: dict[str, float | None] = {}
    tbt_s: dict[str, float | None] = {}
    hit_ratio: float | None = None
    stages: dict[str, float | None] = {}
    stages_missed: dict[str, float | None] = {}
    load: dict[str, float] = {}
    pool_fill: float | None = None
    wasted_prefill_tokens: int = 0
    cpu_s: float = 0.0

    def holds(self, target: float) -> bool:
        return not self.is_stopped and self.attainment >= target


def outcome_of(frame: pl.DataFrame, samples: pl.DataFrame, slo: Slo) -> Outcome:
    """Of a whole run: `frame` as metrics.per_request makes it, samples as records.SAMPLES."""
    met = metrics.attained(frame, slo)
    last_s = float(frame["arrival_s"][-1])
    finished = frame.filter(pl.col("status") == "finished")
    rejected = frame.filter(pl.col("status") == "rejected")
    ended_s = max(last_s, float(frame["finished_s"].max() or 0.0))  # type: ignore[arg-type]  # of a float column
    offered_by, met_by = by_block(frame["arrival_s"].to_numpy(), met.to_numpy(), last_s)
    prompts = max(int(finished["input_tokens"].sum()), 1)
    arriving = samples.filter(pl.col("time_s") <= last_s, pl.col("load").is_finite())
    pools = arriving.filter(pl.col("pool_capacity_blocks") > 0, pl.col("role") != "decode")
    fill = (pools["pool_used_blocks"] / pools["pool_capacity_blocks"]).max()
    by_reason = rejected.group_by("reason", maintain_order=True).len().sort("reason")
    return Outcome(
        requests=frame.height,
        attainment=float(met.mean() or 0.0),  # type: ignore[arg-type]  # of a boolean column
        offered=offered_by,
        met=met_by,
        misses=metrics.misses(frame, slo),
        rejected_by_reason={str(reason): count for reason, count in by_reason.iter_rows()},
        goodput_rps=int(met.sum()) / ended_s if ended_s else 0.0,
        offered_rps=frame.height / last_s if last_s else 0.0,
        ttft_s=quantiles(finished["ttft_s"]),
        tbt_s=quantiles(finished["tbt_s"]),
        hit_ratio=int(finished["reused_tokens"].sum() or 0) / prompts,
        stages=metrics.stage_means(frame),
        stages_missed=metrics.stage_means(frame.filter(~met)),
        load=mean_load(arriving),
        pool_fill=None if fill is None else float(fill),  # type: ignore[arg-type]  # of a float column
        wasted_prefill_tokens=int(
            rejected.filter(pl.col("prefill_busy_s") > 0)["input_tokens"].sum() or 0
        ),
    )


def quantiles(values: pl.Series) -> dict[str, float | None]:
    return {
        name: values.quantile(level, "linear")
        for name, level in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def mean_load(samples: pl.DataFrame) -> dict[str, float]:
    """By role, over instances and time."""
    means = samples.group_by("role", maintain_order=True).agg(pl.col("load").mean())
    return {str(role): float(load) for role, load in means.iter_rows()}


def by_block(arrival_s: Any, met: Any, last_s: float) -> tuple[list[int], list[int]]:
    """Offered and met requests in each of BLOCKS equal parts of the time to the last arrival."""
    width = last_s / BLOCKS or 1.0
    block = np.minimum((np.asarray(arrival_s) / width).astype(np.int64), BLOCKS - 1)
    offered = np.bincount(block, minlength=BLOCKS)
    kept = np.bincount(block, weights=np.asarray(met, dtype=np.float64), minlength=BLOCKS)
    return offered.tolist(), kept.astype(np.int64).tolist()
