"""Are the tokens of a live torch cluster under Locust those of one engine alone, all bytes counted?

    OMP_NUM_THREADS=1 .venvs/torch/bin/python -m tests.bench.engine.live_tokens [--check]

The first 300 requests of Mooncake's conversation trace, lengths a 64th (blocks of 8 tokens), go by
Locust to a live 2P+2D of tiny engines (--instances 1: 1P+1D): every block is verified where it
decodes, by its sender's checksum. Then one engine alone says what it would have answered to each,
the simulator how much of the prompts could be reused, and the books how many bytes there were to
move. `--check` ends with 1 where a token or a block differs, the hit ratios are two points apart,
or the bytes do not add up. Two minutes.

The trace is looked for in MOONCAKE_TRACES (default ../shared/traces beside the repository).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
from rich.console import Console

from mooncake_bench.demo import LOCUSTFILE
from mooncake_bench.records import Run, read_run
from mooncake_bench.simulation import simulate_trace
from reference_cluster.api import Front
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import load_profile
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.scheduler import Scheduler
from reference_cluster.launch.local import LocalWorkers
from reference_cluster.request import Request, Sampling
from tests.bench.cluster_bytes import MissingTraceError, the_trace
from tests.reference_cluster.live import serving
from workloads.trace import Trace, open_trace, write_mooncake
from workloads.transform import jitter, limit, scale_lengths

DIVISOR = 64
HIT_POINTS = 0.02
PROFILE = "tiny-torch-cpu"

results = Console(width=110)


class Listening(Front):
    """A front that remembers what was answered."""

    answered: list[Request]

    def ended(self, request: Request) -> None:
        super().ended(request)
        self.answered.append(request)


@dataclass(frozen=True, slots=True)
class Lived:
    run: Run
    answered: list[Request]
    workers: Sequence[dict[str, Any]]

    def total(self, count: str) -> float:
        return float(sum(row.get(count, 0.0) for row in self.workers))


def config_of(block_tokens: int, transport: str, instances: int) -> ClusterConfig:
    return msgspec.convert(
        {
            "prefill_instances": instances,
            "decode_instances": instances,
            "profile": PROFILE,
            "block_tokens": block_tokens,
            "slo": {"ttft_s": 60.0, "tbt_s": 5.0},
            "prefill": {"dram_tokens": 98_304},
            "network": {"transport": transport, "verify": "always"},
            "engine": {"kind": "torch", "page_tokens": block_tokens},
        },
        ClusterConfig,
    )


def locust(url: str, trace: Path, block_tokens: int, speed: float, out: Path) -> Run:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--url", url, "--trace", str(trace), "--block-tokens", str(block_tokens)]
    command += ["--speed", str(speed), "--out", str(out), "--loglevel", "ERROR", "--only-summary"]
    command += ["--exit-code-on-error", "0"]
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=file, timeout=600, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"locust ended with {done.returncode}: {log.read_text()[-500:]}")
    return read_run(out)


def lived(config: ClusterConfig, trace: Trace, scratch: Path, speed: float) -> Lived:
    profile = load_profile(config.profile)
    path = scratch / "trace.jsonl"
    write_mooncake(trace, path)
    with LocalWorkers(config, profile) as workers:
        front = Listening(config, profile, None, workers.directory)
        front.answered = []
        for client, _ in serving(front):
            run = locust(str(client.base_url), path, config.block_tokens, speed, scratch / "locust")
            rows = client.get("/cluster/info").json()["workers"]
    return Lived(run, front.answered, rows)


def differing(answered: Sequence[Request], page_tokens: int) -> list[str]:
    """Requests whose tokens are not what one engine alone says."""
    scheduler = Scheduler(build_runner(ReplicaConfig(page_tokens=page_tokens, kv_tokens=131_072)))
    found = []
    for request in answered:
        wish = Sampling(request.output_tokens, ignore_eos=True)
        job = scheduler.add(request.id, request.prompt, wish)
        scheduler.run_all()
        if job.tokens.produced != request.output:
            found.append(f"request {request.id}: {request.output} is not {job.tokens.produced}")
    return found


def wrong(of: Lived, simulated: Run, block_bytes: int, block_tokens: int) -> list[str]:
    """What is not as it must be, but for the tokens; prints the figures."""
    frame, summary = of.run.requests, of.run.summary
    streamed = frame.filter(pl.col("output_tokens_asked") > 1)
    blocks = int((-(-streamed["input_tokens"] // block_tokens)).sum())
    fetched = int((-(-frame["fetched_tokens"].fill_null(0) // block_tokens)).sum())
    hits = summary["prefix_hit_ratio"], simulated.summary["prefix_hit_ratio"]
    lines = {
        "finished": (summary["finished"], summary["offered"]),
        "blocks sent and verified": (of.total("verified_blocks"), blocks + fetched),
        "blocks damaged": (of.total("mismatched_blocks"), 0),
        "bytes streamed": (of.total("sent_bytes"), blocks * block_bytes),
        "bytes fetched": (of.total("fetched_bytes"), fetched * block_bytes),
    }
    for name, (seen, due) in lines.items():
        results.print(f"{name}: {seen:,.0f} of {due:,.0f}", highlight=False)
    results.print(f"prefix hit ratio: {hits[0]:.2%}, simulated {hits[1]:.2%}", highlight=False)
    found = [
        f"{name}: {seen:,.0f} is not {due:,.0f}"
        for name, (seen, due) in lines.items()
        if seen != due
    ]
    if abs(hits[0] - hits[1]) > HIT_POINTS:
        found.append("the hit ratios are more than two points apart")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where something is wrong")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--speed", type=float, default=2.0, help="of the replay")
    parser.add_argument("--transport", default="shm", help="shm or tcp")
    parser.add_argument("--instances", type=int, default=2, help="of prefill, and of decode")
    options = parser.parse_args()
    try:
        trace = open_trace(str(the_trace()))
    except MissingTraceError as error:
        Console(stderr=True).print(str(error), soft_wrap=True)
        return 2
    trace = jitter(scale_lengths(limit(trace, options.requests), DIVISOR), seed=1)
    config = config_of(trace.block_tokens, options.transport, options.instances)
    profile = load_profile(PROFILE)
    with tempfile.TemporaryDirectory(prefix="bench-live-tokens-") as scratch:
        of = lived(config, trace, Path(scratch), options.speed)
        simulated = simulate_trace(
            trace, config, profile, Path(scratch, "simulated"), options.speed
        )
    block_bytes = trace.block_tokens * profile.kv_bytes_per_token
    problems = wrong(of, simulated, block_bytes, trace.block_tokens)
    problems += differing(of.answered, trace.block_tokens)
    tokens = sum(len(request.output) for request in of.answered)
    results.print(f"{tokens} tokens of {len(of.answered)} answers compared", highlight=False)
    for problem in problems:
        results.print(problem, style="red")
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
