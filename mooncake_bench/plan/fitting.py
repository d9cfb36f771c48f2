"""How good is a fit? The trace and what is generated from it, side by side, also simulated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec

from mooncake_bench.plan.bound import Demand
from mooncake_bench.plan.candidate import Candidate, Job, Load, Scene, Trial
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.pools import run
from mooncake_bench.plan.search import whole
from mooncake_bench.plan.spec import Promise
from reference_cluster.cost_model import load_profile
from workloads.fit import arrivals
from workloads.model import Trace
from workloads.statistics import length_quantiles, prefix_hit_ratio, session_sizes
from workloads.trace import open_trace
from workloads.transform import jitter

CAPACITIES_TOKENS = (10**6, 3 * 10**6, 10**7, 3 * 10**7, None)
SPEEDS = (0.8, 1.0, 1.25)
SPARE = 1.3  # Nodes of the simulated cluster over those of a perfect system.


class Compared(msgspec.Struct, frozen=True):
    """One number of the trace and of what is generated in its place."""

    what: str
    trace: float
    fitted: float
    unit: str = ""


def compare(trace: Trace, fitted: Trace) -> list[Compared]:
    """Rates, lengths, sessions, and prefix hits of one LRU cache at several sizes."""
    found = [Compared("rate", trace.rate_rps, fitted.rate_rps, "req/s")]
    spread = [arrivals(one.frame["arrival_s"].to_numpy())[1] for one in (trace, fitted)]
    found.append(Compared("burstiness", spread[0], spread[1]))
    for column in ("input_tokens", "output_tokens"):
        ours, theirs = length_quantiles(trace, column), length_quantiles(fitted, column)
        found += [
            Compared(f"{column.replace('_', ' ')} {name}", ours[name], theirs[name], "tokens")
            for name in ("mean", "p50", "p90", "p99")
        ]
    sessions = [sum(session_sizes(one).values()) for one in (trace, fitted)]
    found.append(Compared("sessions", sessions[0], sessions[1]))
    for capacity in CAPACITIES_TOKENS:
        size = "endless cache" if capacity is None else f"{capacity / 1e6:g}M tokens of cache"
        hits = [prefix_hit_ratio(one, capacity) for one in (trace, fitted)]
        found.append(Compared(f"prefix hits, {size}", hits[0], hits[1], "share"))
    return found


def simulated(
    source: str, is_jittered: bool, out: Path, slo: Promise, profile: str, seed: int
) -> list[Compared]:
    """Goodput and latency of both on one small cluster, at several speeds."""
    trace = prepared(source, is_jittered, seed)
    bound = Demand(trace).bound(Load(), load_profile(profile), slo)
    nodes = whole(SPARE * bound.prefill_nodes), whole(SPARE * bound.decode_nodes)
    cluster = Candidate(profile, "disaggregated", prefill=nodes[0], decode=nodes[1])
    cluster = cluster.with_options(conductor__admission="early-rejection")
    scenes = [Scene(source, "", is_jittered, slo), Scene(str(out), "", False, slo)]
    jobs = [
        Job(scene, Trial(cluster, Load(speed=speed, seed=seed)), is_whole=True)
        for speed in SPEEDS
        for scene in scenes
    ]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        outcomes = list(pool.map(run, jobs))
    return [
        one
        for place, speed in enumerate(SPEEDS)
        for one in in_numbers(f"{cluster.split} at {speed:g}x", outcomes[2 * place : 2 * place + 2])
    ]


def in_numbers(where: str, pair: Sequence[Outcome]) -> list[Compared]:
    ours, theirs = pair
    late = [one.ttft_s["p90"] or 0.0 for one in pair]
    slow = [one.tbt_s["p90"] or 0.0 for one in pair]
    return [
        Compared(f"{where}: goodput", ours.goodput_rps, theirs.goodput_rps, "req/s"),
        Compared(f"{where}: within SLO", ours.attainment, theirs.attainment, "share"),
        Compared(f"{where}: TTFT p90", late[0], late[1], "s"),
        Compared(f"{where}: TBT p90", slow[0], slow[1], "s"),
    ]


def prepared(source: str, is_jittered: bool, seed: int) -> Trace:
    trace = open_trace(source, seed=seed)
    return jitter(trace, seed) if is_jittered and not trace.transforms else trace
