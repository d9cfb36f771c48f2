"""How do identical and slowed live runs differ? Replays against the mock, its TTFT set each time.

    python tests/bench/gate/live_runs.py --rounds 120 --out build/gate/runs.jsonl

Writes a line a run: round, slowdown, and the numbers that a gate looks at. error_rates.py reads it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import urllib.request
from pathlib import Path

from mooncake_bench.gate.evidence import of_run
from mooncake_bench.records import write_run
from mooncake_bench.replay.options import ReplayOptions
from mooncake_bench.replay.prepare import load_trace
from mooncake_bench.replay.run import replay, run_info
from tests.bench.loadgen import endpoint

TTFT_US, GAP_MS, TOKENS, REQUESTS, EVERY_MS = 50_000, 5.0, 8, 80, 8
SLOWDOWNS = (1.0, 1.0, 1.1, 1.2)
"""Of each round, in an order of its own: two identical runs, and two slower ones."""
METRICS = ("ttft_s.p50", "ttft_s.p95", "ttft_s.p99", "tbt_s.mean", "goodput_rps", "attainment")


def a_trace(path: Path) -> Path:
    rows = (
        {
            "timestamp": one * EVERY_MS,
            "input_length": 64,
            "output_length": TOKENS,
            "hash_ids": [one],
        }
        for one in range(REQUESTS)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_run(url: str, options: ReplayOptions, slowdown: float, scratch: Path) -> dict[str, object]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(f"{url}/__config?ttft_us={int(TTFT_US * slowdown)}", timeout=10).read()
    trace = load_trace(options)
    result = replay(trace, url, options)
    info = run_info(result, trace, options)
    run = write_run(scratch / "run", info, result.requests, result.spans, result.samples)
    evidence = of_run(run, "run")
    return {
        "slowdown": slowdown,
        "valid": run.info.valid,
        "numbers": {name: evidence.value(name) for name in METRICS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("build/gate/runs.jsonl"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        program = endpoint.build(Path("build/gate"))
        path = a_trace(Path(scratch) / "smoke.jsonl")
        options = ReplayOptions(
            trace=str(path), url="-", slo="ttft<65ms,tbt<20ms", max_lag=1.0, scrape=False
        )
        here = Path(scratch)
        with (
            given.out.open("w") as file,
            endpoint.running(program, here, 0, TTFT_US / 1e3, GAP_MS, TOKENS) as mock,
        ):
            for number in range(given.rounds):
                for slowdown in rng.sample(SLOWDOWNS, len(SLOWDOWNS)):
                    run = one_run(mock.url, options, slowdown, here)
                    file.write(json.dumps({"round": number, **run}) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
