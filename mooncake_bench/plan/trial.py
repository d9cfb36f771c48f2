"""How does one candidate do? The whole trace in virtual time, unless it is plainly lost before."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import msgspec
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.plan.candidate import Job, Scene, Trial
from mooncake_bench.plan.outcome import Outcome, outcome_of
from mooncake_bench.records import conform
from mooncake_bench.simulation import as_requests, request_frame
from mooncake_bench.slo import Slo
from reference_cluster.cluster import Cluster
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.request import Request
from reference_cluster.samples import SAMPLE_COLUMNS
from reference_cluster.simulate import collector_paused, simulate
from reference_cluster.spans import span_columns
from workloads.growth import unshared, users
from workloads.trace import Trace, open_trace
from workloads.transform import jitter

LOOKS = 40  # How often a run is asked whether it can still hold, over the trace's time.
SAMPLES = 120  # Samples of every instance over the trace's time.


def run_trial(job: Job) -> Outcome:
    """Run it; deterministic but for the CPU seconds."""
    began_s = time.process_time()
    with collector_paused():
        outcome = tried(job)
    return msgspec.structs.replace(outcome, cpu_s=time.process_time() - began_s)


def tried(job: Job) -> Outcome:
    scene, trial = job.scene, job.trial
    load, slo = trial.load, Slo(scene.slo.ttft_s, scene.slo.tbt_s)
    trace = loaded(scene, load.seed, load.users, load.unshared)
    requests = as_requests(trace, load.speed)
    last_s = requests[-1].timeline.arrived_s
    config = trial.candidate.config(scene.slo, load.seed, max(last_s / SAMPLES, 0.1))
    profile = scaled(load_profile(config.profile), trial)
    lost = Lost(requests, slo, scene.slo.target)
    watch = None if job.is_whole else (max(last_s / LOOKS, 0.1), lost.look)
    done = simulate(config, profile, requests, watch=watch)
    if done.is_stopped:
        return Outcome(len(requests), 1.0 - lost.misses / len(requests), is_stopped=True)
    samples = pl.DataFrame(done.samples, schema=list(SAMPLE_COLUMNS), orient="row")
    return outcome_of(per_request(requests), conform(samples, "samples"), slo)


@lru_cache(maxsize=4)
def loaded(scene: Scene, seed: int, more_users: float, unshared_share: float) -> Trace:
    """The scene's trace as a load wants it; a worker meets few different ones in a row."""
    trace = open_trace(scene.trace, seed=seed)
    if scene.jitter and len(trace.transforms) == 0:  # A generator stamps finely.
        trace = jitter(trace, seed)
    trace = unshared(trace, unshared_share, seed)
    return users(trace, more_users, seed)


def scaled(profile: Profile, trial: Trial) -> Profile:
    """The profile with all prefill and all decode times longer or shorter by a factor."""
    return msgspec.structs.replace(
        profile,
        prefill=times(profile.prefill, trial.prefill_scale),
        decode=times(profile.decode, trial.decode_scale),
    )


def times(cost: Any, factor: float) -> Any:
    values = {name: getattr(cost, name) * factor for name in cost.__struct_fields__}
    return msgspec.structs.replace(cost, **values)


def per_request(requests: list[Request]) -> pl.DataFrame:
    """Ended requests as a frame of metrics.per_request."""
    spans = conform(pl.DataFrame(span_columns(requests)), "spans")
    return metrics.per_request(conform(request_frame(requests), "requests"), spans)


class Lost:
    """Have so many requests missed already that the target is out of reach?

    Counts only what is certain: requests that have ended outside the promise, and those that wait
    for their first token beyond it.
    """

    def __init__(self, requests: list[Request], slo: Slo, target: float) -> None:
        self.requests = requests
        self.slo = slo
        self.allowed = (1.0 - target) * len(requests)
        self.known = 0  # Requests before it have arrived.
        self.open: list[Request] = []
        self.missed_and_ended = 0
        self.misses = 0

    def look(self, cluster: Cluster) -> bool:
        now_s = cluster.loop.time()
        while self.known < len(self.requests):
            request = self.requests[self.known]
            if request.timeline.arrived_s >= now_s:
                break
            self.open.append(request)
            self.known += 1
        ended = [request for request in self.open if request.has_ended]
        self.open = [request for request in self.open if not request.has_ended]
        if ended:
            met = metrics.attained(per_request(ended), self.slo)
            self.missed_and_ended += len(ended) - int(met.sum())
        late = sum(
            request.timeline.first_token_s is None
            and now_s - request.timeline.arrived_s > self.slo.ttft_s
            for request in self.open
        )
        self.misses = self.missed_and_ended + late
        return self.misses > self.allowed
