"""The replay against vLLM's own server: does it measure what vLLM measures of itself?"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from mooncake_bench.metrics import token_gaps
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.run import ReplayResult, replay
from tests.reference_cluster.vllm.workers import START_S, save_tiny_model, save_tokenizer
from workloads.model import Trace, build_frame

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

ENGINE_BLOCK, TRACE_BLOCK = 128, 512
VOCABULARY = 32_000  # Prompts of the replay have token ids up to 31,000.
REQUESTS, EVERY_S = 40, 0.5


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's API server: four processes, ended as a group."""
    model = save_tiny_model(tmp_path_factory.mktemp("model"), vocabulary=VOCABULARY)
    save_tokenizer(model, VOCABULARY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 8192"
    words += " --kv-cache-memory-bytes 128M --enable-prompt-tokens-details"
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    with (tmp_path_factory.mktemp("log") / "server.log").open("w+b") as log:
        process = subprocess.Popen(
            [*server, *words.split()],
            env=os.environ | settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)
            with contextlib.suppress(ProcessLookupError):  # It took its children with it.
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(2 * START_S):
        assert process.poll() is None, f"vLLM ended with {process.returncode}"
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM does not answer within {START_S} s")


def a_trace() -> tuple[Trace, list[int]]:
    """Prompts one after the other, and of each how many tokens its block ids promise cached.

    Every fifth begins something new; the others go on from one block of it to four.
    """
    inputs, blocks, promised = [], [], []
    for number in range(REQUESTS):
        story, turn = divmod(number, 5)
        tail = 40 + 61 * number % 400
        inputs.append(TRACE_BLOCK * turn + tail)
        blocks.append([*(100 * story + i for i in range(turn)), 10_000 + number])
        promised.append(TRACE_BLOCK * max(0, turn - 1))
    counts = np.array([len(one) for one in blocks])
    flat = pl.Series(np.array([block for one in blocks for block in one]))
    arrival_s = [EVERY_S * number for number in range(REQUESTS)]
    frame = build_frame(arrival_s, inputs, [24] * REQUESTS, flat, counts)
    return Trace(frame, "stories", "b" * 64, TRACE_BLOCK), promised


@dataclass
class Histogram:
    """What one of vLLM's histograms counted between two looks."""

    bounds: list[float]
    counts: list[float]  # Up to each bound.
    sum: float

    @property
    def count(self) -> float:
        return self.counts[-1]

    def bucket(self, share: float) -> int:
        """In which bucket this quantile is."""
        return next(i for i, count in enumerate(self.counts) if count >= share * self.count)

    def bucket_of(self, value: float) -> int:
        return next(i for i, bound in enumerate(self.bounds) if value <= bound)


def look(url: str, name: str) -> tuple[list[float], list[float], float]:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}")]
    buckets = [line for line in lines if "_bucket{" in line]
    bounds = [float(line.split('le="')[1].split('"')[0]) for line in buckets]
    counts = [float(line.split()[-1]) for line in buckets]
    return bounds, counts, sum(float(line.split()[-1]) for line in lines if "_sum{" in line)


Looks = dict[str, tuple[list[float], list[float], float]]
NAMES = ("time_to_first_token_seconds", "inter_token_latency_seconds")


def between(before: Looks, after: Looks, name: str) -> Histogram:
    bounds, counts, total = after[name]
    old_counts = before[name][1] or [0.0] * len(counts)
    news = [new - old for new, old in zip(counts, old_counts, strict=True)]
    return Histogram(bounds, news, total - before[name][2])


@pytest.fixture(scope="module")
def replayed(url: str) -> tuple[ReplayResult, dict[str, Histogram], list[int]]:
    """The trace, replayed once after a warm-up; with what vLLM measured meanwhile."""
    trace, promised = a_trace()
    options = ReplayOptions(server="vllm", slo="ttft<9s,tbt<9s", max_lag=9.0, max_stall=9.0)
    warm = ReplayOptions(server="vllm", salt="warm-up", limit=3)
    replay(Trace(trace.frame.head(3), "warm-up", "c" * 64, TRACE_BLOCK), url, warm)
    before = {name: look(url, name) for name in NAMES}
    result = replay(trace, url, options)
    after = {name: look(url, name) for name in NAMES}
    return result, {name: between(before, after, name) for name in NAMES}, promised


def test_every_request_is_answered_and_nothing_is_missing(replayed):
    """All tokens, and no warning that vLLM told too little."""
    result, histograms, _ = replayed
    assert result.requests["status"].to_list() == ["finished"] * REQUESTS
    assert result.requests["output_tokens"].to_list() == [24] * REQUESTS
    assert [line for line in result.warnings if "vLLM" in line] == []
    assert histograms[NAMES[0]].count == REQUESTS


def test_cached_tokens_are_what_the_block_ids_promise(replayed):
    """By vLLM's own count, request by request; the last token is always computed."""
    result, _, promised = replayed
    assert result.requests["reused_tokens"].to_list() == promised


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_times_are_vllms_own_within_its_buckets(replayed, share):
    """Quantiles are in the bucket of vLLM's, or above: the client waits longer.

    On a quiet machine one bucket is enough; a busy one delays the way to the client.
    """
    result, histograms, _ = replayed
    requests = result.requests
    ttft_s = requests["first_token_s"] - requests["sent_s"]
    seen: dict[str, Any] = {
        NAMES[0]: ttft_s,
        NAMES[1]: token_gaps(requests, result.spans)["gap_s"],
    }
    for name, values in seen.items():
        theirs = histograms[name]
        mine = theirs.bucket_of(float(values.quantile(share, "linear")))
        assert mine - theirs.bucket(share) in (0, 1, 2), (
            f"{name}: {list(accumulate(theirs.counts))}"
        )


def test_mean_times_differ_by_the_way_to_the_client_only(replayed):
    """TTFT is no shorter than vLLM's and not twice as long; gaps differ little."""
    result, histograms, _ = replayed
    requests = result.requests
    ttft_s = float((requests["first_token_s"] - requests["sent_s"]).mean())
    theirs = histograms[NAMES[0]]
    assert 0.95 < ttft_s / (theirs.sum / theirs.count) < 2.0
    gap_s = float(token_gaps(requests, result.spans)["gap_s"].mean())
    theirs = histograms[NAMES[1]]
    # A tenth on a quiet machine; a busy one delivers tokens together.
    assert gap_s == pytest.approx(theirs.sum / theirs.count, rel=0.3)
