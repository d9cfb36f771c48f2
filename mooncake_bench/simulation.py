"""How does a trace become a simulated run? Requests in, the cluster in virtual time, frames out."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench.records import CHUNKS, Run, RunInfo, fingerprint, installed_versions, write_run
from mooncake_bench.segments import SegmentWriter
from mooncake_bench.slo import Slo
from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import Profile
from reference_cluster.request import Request, Timeline
from reference_cluster.samples import SAMPLE_COLUMNS
from reference_cluster.simulate import Watch, collector_paused, simulate
from reference_cluster.spans import span_columns
from workloads.statistics import reuse
from workloads.trace import Trace

QUICK_S = 2.0
"""A simulation that takes less is over before anybody has opened a page."""

STAMPS = [field.name for field in fields(Timeline) if field.name.endswith("_s")]
AS_THEY_ARE = (
    "input_tokens",
    "reused_tokens",
    "fetched_tokens",
    "prefill_busy_s",
    "predicted_ttft_s",
    "predicted_tbt_s",
    "prefix_replicas",
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
    """Run the whole trace, `speed` times faster, and write the run directory `out`.

    One that takes long can be looked at there meanwhile: see segments.py.
    """
    requests = as_requests(trace, speed)
    live = LiveSimulation(out, describe(trace, config, profile, speed, name), requests)
    with collector_paused():
        run = write_run(
            out,
            *simulated_run(trace, config, profile, speed, name, live.watch, requests),
            chunks=chunk_frame(requests),
            reuse=reuse(trace),
        )
    live.close()
    return run


def simulated_run(
    trace: Trace,
    config: ClusterConfig,
    profile: Profile,
    speed: float = 1.0,
    name: str | None = None,
    watch: Watch | None = None,
    requests: list[Request] | None = None,
) -> tuple[RunInfo, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The run's description, requests, spans and samples, as `records.write_run` takes them.

    `requests` are the trace's as the cluster's, where they were made already.
    """
    requests = as_requests(trace, speed) if requests is None else requests
    info = describe(trace, config, profile, speed, name)
    simulated = simulate(config, profile, requests, watch=watch)
    spans = pl.DataFrame(span_columns(requests))
    samples = pl.DataFrame(simulated.samples, schema=list(SAMPLE_COLUMNS), orient="row")
    return info, request_frame(requests), spans, samples


def describe(
    trace: Trace, config: ClusterConfig, profile: Profile, speed: float, name: str | None
) -> RunInfo:
    """What is run, from now on."""
    return RunInfo(
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
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


class LiveSimulation:
    """Writes segments of a simulation that has taken a while; `watch` goes to `simulate`."""

    def __init__(self, out: Path, info: RunInfo, requests: list[Request]) -> None:
        self._out, self._info = out, info
        self._due = deque(requests)
        self._open: list[Request] = []
        self._planned = len(requests)
        self._sampled_s = -1.0
        self._next_s = 0.0
        self._writer: SegmentWriter | None = None
        self._began_s = time.monotonic()
        last_s = requests[-1].timeline.arrived_s if requests else 0.0
        # Often enough for a simulation of any length, seldom enough to cost nothing.
        self.watch: Watch = (max(last_s / 2000, 0.1), self.look)

    def look(self, cluster: Cluster) -> None:
        if self._writer is None:
            if time.monotonic() - self._began_s < QUICK_S:
                return
            self._writer = SegmentWriter(self._out, self._info, self._planned)
        # A request's spans are looked up in all of its instance's: the longer, the more seldom.
        if not self._writer.is_due or time.monotonic() < self._next_s:
            return
        began_s = time.monotonic()
        self._append(cluster)
        self._next_s = began_s + 30 * (time.monotonic() - began_s)

    def _append(self, cluster: Cluster) -> None:
        assert self._writer is not None
        now_s = asyncio.get_running_loop().time()
        while self._due and self._due[0].timeline.arrived_s <= now_s:
            self._open.append(self._due.popleft())
        ended = [one for one in self._open if one.timeline.finished_s is not None]
        self._open = [one for one in self._open if one.timeline.finished_s is None]
        rows = []
        for row in reversed(cluster.samples.rows):
            if row[0] <= self._sampled_s:
                break
            rows.append(row)
        if rows:
            self._sampled_s = rows[0][0]
        samples = pl.DataFrame(rows[::-1], schema=list(SAMPLE_COLUMNS), orient="row")
        tables = {"samples": samples}
        if ended:
            tables |= {"requests": request_frame(ended), "spans": pl.DataFrame(span_columns(ended))}
        self._writer.append(**tables)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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


def chunk_frame(requests: list[Request]) -> pl.DataFrame:
    """Chunks of prompts as rows of records.CHUNKS."""
    rows = [(one.id, *chunk) for one in requests for chunk in one.timeline.chunks]
    return pl.DataFrame(rows, schema=CHUNKS, orient="row")


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
