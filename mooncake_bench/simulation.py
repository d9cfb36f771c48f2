"""How does a trace become a simulated run? Requests in, the cluster in virtual time, frames out."""

from __future__ import annotations

import datetime
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench.records import Run, RunInfo, fingerprint, installed_versions, write_run
from mooncake_bench.slo import Slo
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.request import Request, Timeline
from reference_cluster.samples import SAMPLE_COLUMNS
from reference_cluster.simulate import Watch, collector_paused, simulate
from reference_cluster.spans import span_columns
from workloads.trace import Trace

STAMPS = [field.name for field in fields(Timeline)]
AS_THEY_ARE = (
    "input_tokens",
    "reused_tokens",
    "fetched_tokens",
    "prefill_busy_s",
    "predicted_ttft_s",
    "predicted_tbt_s",
    "prefill",
    "decode",
    "status",
    "reason",
)


def simulate_trace(
    trace: Trace,
    config: ClusterConfig,
    profile: Profile,
    out: Path,
    speed: float = 1.0,
    name: str | None = None,
) -> Run:
    """Run the whole trace, `speed` times faster, and write the run directory `out`."""
    with collector_paused():
        return write_run(out, *simulated_run(trace, config, profile, speed, name))


def simulated_run(
    trace: Trace,
    config: ClusterConfig,
    profile: Profile,
    speed: float = 1.0,
    name: str | None = None,
    watch: Watch | None = None,
) -> tuple[RunInfo, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The run's description, requests, spans and samples, as `records.write_run` takes them."""
    requests = as_requests(trace, speed)
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    simulated = simulate(config, profile, requests, watch=watch)
    info = RunInfo(
        name=name or config.description,
        source="simulated",
        system=config.system,
        trace=describe_trace(trace, speed),
        config={"cluster": msgspec.to_builtins(config), "title": config.title},
        profile={"name": profile.name, "source": profile.source, "error": profile.error},
        slo=Slo(config.slo.ttft_s, config.slo.tbt_s),
        seed=config.seed,
        versions=installed_versions(),
        machine=fingerprint(),
        started_at=started_at,
    )
    spans = pl.DataFrame(span_columns(requests))
    samples = pl.DataFrame(simulated.samples, schema=list(SAMPLE_COLUMNS), orient="row")
    return info, request_frame(requests), spans, samples


def as_requests(trace: Trace, speed: float) -> list[Request]:
    """The trace's rows as requests of the cluster."""
    frame = trace.frame
    rows = zip(
        frame["request"].to_list(),
        frame["input_tokens"].to_list(),
        frame["output_tokens"].to_list(),
        frame["hash_ids"].to_list(),
        (frame["arrival_s"] / speed).to_list(),
        strict=True,
    )
    return [
        Request(id, input_tokens, output_tokens, blocks, Timeline(arrived_s))
        for id, input_tokens, output_tokens, blocks, arrived_s in rows
    ]


def request_frame(requests: list[Request]) -> pl.DataFrame:
    """Ended requests as rows of records.REQUESTS."""
    stamps = [request.timeline for request in requests]
    columns: dict[str, Any] = {"request": [request.id for request in requests]}
    for name in STAMPS:
        column = "arrival_s" if name == "arrived_s" else name
        columns[column] = pl.Series([getattr(stamp, name) for stamp in stamps], dtype=pl.Float64)
    for name in AS_THEY_ARE:
        columns[name] = [getattr(request, name) for request in requests]
    columns["output_tokens"] = [request.produced_tokens for request in requests]
    columns["output_tokens_asked"] = [request.output_tokens for request in requests]
    return pl.DataFrame(columns)


def describe_trace(trace: Trace, speed: float) -> dict[str, Any]:
    """What a report must say of the workload."""
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "jittered": trace.jittered,
        "transforms": list(trace.transforms),
        "block_tokens": trace.block_tokens,
        "requests": trace.frame.height,
        "duration_s": trace.duration_s / speed,
        "rate_rps": trace.rate_rps * speed,
        "speed": speed,
    }
