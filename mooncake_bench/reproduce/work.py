"""What does one run leave? A small dict of numbers, computed in a worker process."""

from __future__ import annotations

import time
from collections import Counter
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.records import conform
from mooncake_bench.reproduce.plan import ClusterRun, Job, PoolRun, Workload, load_workload
from mooncake_bench.simulation import simulated_run
from mooncake_bench.slo import Slo
from reference_cluster.cluster import Cluster
from reference_cluster.config import load_config
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.kvpool.replay import replay_chains
from reference_cluster.simulate import collector_paused
from workloads.trace import Trace

WITHIN_TTFT_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
WITHIN_TBT_S = (
    0.025, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0,
)  # fmt: skip
KEY_RANKS = (1, 10, 100, 1000)


def do(job: Job) -> dict[str, Any]:
    """Run it; {"cpu_s": ..., "values": {...}}. Deterministic but for the CPU seconds."""
    start_s = time.process_time()
    with collector_paused():
        trace = loaded(job.plan.workload, job.source)
        if isinstance(job.plan, PoolRun):
            values = pool_run(job.plan, trace)
        else:
            values = cluster_run(job.plan, trace)
    return {"cpu_s": time.process_time() - start_s, "values": values}


@lru_cache(maxsize=2)
def loaded(workload: Workload, source: str) -> Trace:
    """Runs come sorted by workload, so that two are enough."""
    return load_workload(workload, source)


# ---- one pool --------------------------------------------------------------------------------


def pool_run(plan: PoolRun, trace: Trace) -> dict[str, Any]:
    """Hit ratios by capacity, weighted by tokens and by blocks."""
    chains = list(zip(trace.frame["hash_ids"].to_list(), trace.frame["input_tokens"], strict=True))
    rows = []
    for capacity in plan.capacities:
        hits = replay_chains(chains, capacity, plan.eviction, trace.block_tokens)
        rows.append([capacity, hits.token_ratio, hits.block_ratio])
    return {"capacity_token_block_ratio": rows}


# ---- a cluster -------------------------------------------------------------------------------


def cluster_run(plan: ClusterRun, trace: Trace) -> dict[str, Any]:
    """Summary, distributions of TTFT and TBT, load over time."""
    config = load_config(None, plan.cluster)
    profile = adjusted(load_profile(config.profile), plan.profile)
    keys = HotKeys(trace) if plan.hot_keys_every_s else None
    watch = (plan.hot_keys_every_s, keys.look) if keys and plan.hot_keys_every_s else None
    info, requests, spans, samples = simulated_run(trace, config, profile, plan.speed, watch=watch)
    last_arrival_s = float(trace.frame["arrival_s"][-1]) / plan.speed
    samples = conform(samples, "samples")
    requests, spans = conform(requests, "requests"), conform(spans, "spans")
    frame = metrics.per_request(requests, spans)
    summary = metrics.summarise_frame(info, frame, samples)
    values = {
        "title": config.title,
        "profile": profile.name,
        "summary": {key: summary[key] for key in KEPT},
        "ttft_box_s": box(frame["ttft_s"].drop_nulls().to_numpy()),
        "ttft_within": shares(frame, "ttft_s", WITHIN_TTFT_S),
        "tbt_within": shares(frame, "tbt_s", WITHIN_TBT_S),
        "effective": effective(frame, WITHIN_TBT_S, config.slo.ttft_s),
        "last_arrival_s": last_arrival_s,
        "load": load(samples, last_arrival_s),
    }
    if plan.is_with_gaps:
        gaps = metrics.token_gaps(requests, spans)["gap_s"]
        values["gap_p90_s"] = gaps.quantile(0.9, "linear")
    if keys is not None:
        values["hot_keys"] = {"ranks": KEY_RANKS, "seen": keys.seen}
    return values


KEPT = (
    "offered", "finished", "rejected", "failed", "rejected_by_reason", "duration_s", "offered_rps",
    "ttft_s", "tbt_s", "stages_s", "attainment", "attainment_by_tbt", "goodput_rps",
    "prefix_hit_ratio", "prefill_busy_s_mean", "wasted_prefill_tokens",
)  # fmt: skip


def adjusted(profile: Profile, overrides: dict[str, float]) -> Profile:
    """The profile with some numbers replaced: {"decode.base_s": 0.05}."""
    for dotted, value in overrides.items():
        profile = replaced(profile, dotted.split("."), value)
    return profile


def replaced(struct: Any, path: list[str], value: float) -> Any:
    first, *rest = path
    inner = replaced(getattr(struct, first), rest, value) if rest else value
    return msgspec.structs.replace(struct, **{first: inner})


def box(values: npt.NDArray[np.float64]) -> list[float]:
    """Whisker, quartile, median, quartile, whisker: Tukey's, 1.5 quartile ranges at most."""
    if not values.size:
        return []
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return [float(inside.min()), float(low), float(middle), float(high), float(inside.max())]


def shares(frame: pl.DataFrame, column: str, bounds_s: tuple[float, ...]) -> list[list[float]]:
    """[bound, share of finished requests within it]; one without gaps is within any TBT bound."""
    values = frame.filter(pl.col("status") == "finished")[column].fill_null(0.0).to_numpy()
    return [[bound, float((values <= bound).mean()) if values.size else 0.0] for bound in bounds_s]


def effective(frame: pl.DataFrame, bounds_s: tuple[float, ...], ttft_s: float) -> list[list[float]]:
    """[TBT bound, share of offered requests within it and the run's TTFT bound]."""
    curve = metrics.attainment_curve(frame, Slo(ttft_s, 0.1), bounds_s)
    return [list(row) for row in curve.iter_rows()]


def load(samples: pl.DataFrame, end_s: float) -> dict[str, list[float]]:
    """Mean load over the instances of a role at each sample, while requests arrive."""
    means = (
        samples.filter(pl.col("time_s") <= end_s)
        .group_by("role", "time_s", maintain_order=True)
        .agg(pl.col("load").mean())
    )
    found: dict[str, list[float]] = {}
    for (role,), part in means.group_by("role", maintain_order=True):
        found["time_s"] = [round(value, 3) for value in part["time_s"]]
        found[str(role)] = [round(value, 4) for value in part["load"]]
    return found


class HotKeys:
    """On how many prefill instances are the most requested blocks of a trace, over time?"""

    def __init__(self, trace: Trace) -> None:
        counts = Counter(block for blocks in trace.frame["hash_ids"].to_list() for block in blocks)
        # Of equals the first seen: Counter keeps the order.
        self.hottest = [block for block, _ in counts.most_common(max(KEY_RANKS))]
        self.seen: list[tuple[float, list[int]]] = []

    def look(self, cluster: Cluster) -> None:
        holders = cluster.conductor.index.holders
        counts = [holders.get(self.hottest[rank - 1], 0).bit_count() for rank in KEY_RANKS]
        self.seen.append((cluster.loop.time(), counts))
