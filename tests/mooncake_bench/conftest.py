"""Runs made up from a few distributions: no cluster, but the shapes and sizes of real results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mooncake_bench import records
from mooncake_bench.records import Run, RunInfo

PROFILE = {
    "name": "a800-llama3-70b",
    "source": "least-squares fit to Figure 14 of the Mooncake FAST '25 paper",
    "error": "prefill within 4.3 % of every published point; decode rough at large batches",
}


def made_up_run(
    directory: Path,
    *,
    system: str = "disaggregated",
    source: str = "simulated",
    requests: int = 300,
    rps: float = 3.3,
    instances: int = 16,
    slow: float = 1.0,
    reject: float = 0.0,
    seed: int = 0,
    trace_name: str = "conversation-like",
    **info: Any,
) -> Run:
    """A run of `requests` at `rps`; `slow` stretches gaps and queues, `reject` refuses a share."""
    rng = np.random.default_rng(seed)
    frame = _requests(rng, requests, rps, slow, reject, system, source != "simulated", instances)
    spans = _spans(rng, frame, slow, system)
    ends = spans.group_by("request").agg(
        (pl.col("start_s") + pl.col("steps") * pl.col("first_gap_s")).max().alias("end_s")
    )
    frame = frame.join(ends, on="request", how="left", maintain_order="left").with_columns(
        pl.coalesce("end_s", "finished_s").alias("finished_s")
    )
    half = instances // 2
    config = (
        {"colocated_instances": instances}
        if system == "colocated"
        else {"prefill_instances": half, "decode_instances": instances - half}
    )
    described: dict[str, Any] = {
        "name": f"{source} {system}",
        "source": source,
        "system": system,
        "trace": {
            "name": trace_name,
            "sha256": "5d1c" * 16,
            "jittered": True,
            "transforms": ["window 0-3600 s", f"jitter, seed {seed}"],
        },
        "config": {"system": system, **config, "conductor": {"scheduling": "kvcache-centric"}},
        "profile": PROFILE,
        "seed": seed,
        "versions": records.installed_versions(),
        "machine": records.fingerprint(),
        "client": {} if source == "simulated" else {"cpu": 0.31},
        "started_at": "2026-03-02T10:15:00+00:00",
    }
    samples = _samples(rng, float(frame["arrival_s"][-1]), instances, slow, system)
    return records.write_run(
        directory,
        RunInfo(**{**described, **info}),
        frame.drop("end_s"),
        spans,
        samples,
        chunks=_chunks(frame),
        reuse=pl.DataFrame({"distance_blocks": [3.0, 900.0, 60_000.0], "share": [0.1, 0.3, 0.5]}),
    )


def _chunks(frame: pl.DataFrame) -> pl.DataFrame:
    """Prompts of more than 8,192 computed tokens in two chunks of equal time."""
    rows = []
    long = frame.filter(pl.col("input_tokens") - pl.col("reused_tokens") > 8192)
    for row in long.iter_rows(named=True):
        start, end = row["prefill_start_s"], row["prefill_end_s"]
        middle, tokens = (start + end) / 2, row["input_tokens"] - row["reused_tokens"]
        rows.append((row["request"], start, middle, 8192))
        rows.append((row["request"], middle, end, tokens - 8192))
    return pl.DataFrame(rows, schema=records.CHUNKS, orient="row")


def _requests(
    rng: np.random.Generator,
    count: int,
    rps: float,
    slow: float,
    reject: float,
    system: str,
    live: bool,
    instances: int,
) -> pl.DataFrame:
    arrival = np.cumsum(rng.exponential(1 / rps, count))
    tokens = np.clip(rng.lognormal(8.9, 0.95, count), 16, 126_000).astype(int)
    output = np.clip(rng.lognormal(5.4, 0.8, count), 1, 2000).astype(int)
    # Hits grow while the pools fill.
    reused = (
        tokens * np.clip(rng.beta(1, 1.6, count) * (1 - np.exp(-arrival / 400)), 0, 1)
    ).astype(int)
    computed = tokens - reused
    busy = 0.068 + 1.1e-4 * computed + 7.4e-10 * computed**2
    wait = rng.exponential(1.4 * slow, count) * (1 + np.sin(arrival / 300) ** 2)
    placed = arrival + (0.004 if live else 0.0)
    fetched = placed + np.where(rng.random(count) < 0.3, reused * 3e-6, 0.0)
    start = fetched + wait
    end = start + busy * (1 if system == "disaggregated" else 1.3)
    transferred = end + (tokens * 4e-6 if system == "disaggregated" else 0.0)
    decode_start = transferred + rng.exponential(0.02 * slow, count)
    refused = rng.random(count) < reject * (0.4 + 1.2 * (np.sin(arrival / 240) > 0))
    stamps = {
        "placed_s": placed,
        "fetched_s": fetched,
        "prefill_start_s": start,
        "prefill_end_s": end,
        "transferred_s": transferred,
        "first_token_s": transferred,
        "decode_start_s": decode_start,
        "transfer_start_s": start,
        "prefix_replicas": 1 + rng.poisson(1.5, count),
    }
    role = "prefill" if system == "disaggregated" else "colocated"
    frame = pl.DataFrame(
        {
            "request": np.arange(count),
            "arrival_s": arrival,
            "sent_s": arrival + rng.exponential(0.0008, count),
            **stamps,
            "finished_s": np.where(refused, arrival + 0.01, transferred),
            "input_tokens": tokens,
            "output_tokens": np.where(refused, 0, output),
            "output_tokens_asked": output,
            "reused_tokens": reused,
            "prefill_busy_s": busy,
            "predicted_ttft_s": (start - placed) * 0.8 + busy,
            "prefill": [f"{role}-{index % max(instances // 2, 1)}" for index in range(count)],
            "status": np.where(refused, "rejected", "finished"),
            "reason": np.where(rng.random(count) < 0.7, "ttft", "tbt"),
        }
    )
    gone = pl.col("status") == "rejected"
    nulled = [*stamps, "reused_tokens", "prefill_busy_s", "predicted_ttft_s", "prefill"]
    return frame.with_columns(
        *[pl.when(~gone).then(pl.col(name)).alias(name) for name in nulled],
        pl.when(gone).then(pl.col("reason")).alias("reason"),
        pl.col("sent_s") if live else pl.lit(None, pl.Float64).alias("sent_s"),
    )


def _spans(rng: np.random.Generator, frame: pl.DataFrame, slow: float, system: str) -> pl.DataFrame:
    """Ten spans a request; where prefill runs beside decode, some of its steps are long."""
    rows = []
    served = frame.filter((pl.col("status") == "finished") & (pl.col("output_tokens") > 1))
    for request, start, output in served.select(
        "request", "decode_start_s", "output_tokens"
    ).iter_rows():
        gap = 0.034 + rng.gamma(2.0, 0.006) * slow
        for steps in np.diff(np.linspace(0, output - 1, 11).astype(int)).tolist():
            if steps:
                stall = (
                    rng.exponential(0.9 * slow)
                    if system == "colocated" and rng.random() < 0.25
                    else 0
                )
                rows.append((request, start + stall, steps, gap, 1e-7))
                start += stall + steps * gap + 1e-7 * steps * (steps - 1) / 2
    return pl.DataFrame(rows, schema=records.SPANS, orient="row")


def _samples(
    rng: np.random.Generator, last_s: float, instances: int, slow: float, system: str
) -> pl.DataFrame:
    half = instances // 2
    names = (
        [("colocated", index) for index in range(instances)]
        if system == "colocated"
        else [("prefill", index) for index in range(half)]
        + [("decode", index) for index in range(instances - half)]
    )
    rows = []
    for time in np.arange(5.0, last_s, max(last_s / 300, 1.0)).tolist():
        for role, index in names:
            load = 0.3 * slow * (1 + 0.5 * np.sin(time / 300 + (role == "decode"))) + rng.gamma(
                2, 0.06
            )
            used = int(5860 * min(1.0, time / 1800))
            name, evicted = f"{role}-{index}", None if role == "decode" else int(time * 2)
            row = (time, name, role, float(load), 1, 4, 90_000, used, 5860, 1e9, evicted)
            rows.append(row)
    return pl.DataFrame(rows, schema=records.SAMPLES, orient="row")


@pytest.fixture
def a_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run in a directory of its own: `a_run("directory", system=..., ...)`."""
    return lambda directory, /, **options: made_up_run(tmp_path / directory, **options)


@pytest.fixture
def four_runs(a_run: Callable[..., Run]) -> list[Run]:
    """Live 2P+2D against 4 colocated, and simulated 8P+8D against 16 colocated."""
    return [
        a_run("live-d", source="live-modelled", requests=480, rps=0.8, instances=4, reject=0.06),
        a_run(
            "live-c",
            source="live-modelled",
            requests=480,
            rps=0.8,
            instances=4,
            system="colocated",
            slow=1.5,
        ),
        a_run("sim-d", requests=2000),
        a_run("sim-c", requests=2000, system="colocated", slow=1.4),
    ]


@pytest.fixture
def chromium() -> Iterator[Any]:
    """The system's Chromium, headless, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
