"""A run of a million requests and 200 M tokens, tiled from a simulated hour: large_run.py OUT [N].

The hour is repeated, one after another, with new request numbers; no more than one hour of it is
in memory. All files are there that a run's end writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.records import RunInfo, read_run
from mooncake_bench.simulation import simulate_trace
from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from workloads.trace import open_trace

TIMES = [
    *("arrival_s", "placed_s", "fetched_s", "prefill_start_s", "prefill_end_s", "transferred_s"),
    *("first_token_s", "decode_start_s", "finished_s"),
]


def main(out: Path, requests: int = 1_000_000) -> None:
    hour = out.with_name(out.name + "-hour")
    if not (hour / "run.json").is_file():
        overrides: dict[str, Any] = {"prefill_instances": 8, "decode_instances": 8}
        config = load_config(None, {**overrides, "profile": "h100-llama3-70b"})
        trace = open_trace("conversation-like:rate_rps=8.4")
        simulate_trace(trace, config, load_profile(config.profile), hour, name="a large run")
    run = read_run(hour)
    tiles = -(-requests // run.requests.height)
    length_s = float(run.summary["duration_s"]) + 60.0
    out.mkdir(parents=True, exist_ok=True)
    tiled(run.requests, out / "requests.parquet", tiles, length_s, TIMES)
    tiled(run.spans, out / "spans.parquet", tiles, length_s, ["start_s"], run.requests.height)
    tiled(run.samples, out / "samples.parquet", tiles, length_s, ["time_s"])
    described(run.info, out, run.samples)
    tokens = int(run.requests["output_tokens"].sum()) * tiles
    spans = run.spans.height * tiles
    sys.stdout.write(
        f"{tiles * run.requests.height:,} requests, {tokens:,} tokens, {spans:,} spans\n"
    )


def tiled(
    frame: pl.DataFrame, path: Path, tiles: int, length_s: float, times: list[str], ids: int = 0
) -> None:
    """Write the frame `tiles` times, each shifted by `length_s`."""
    ids = ids or frame.height
    parts = []
    for tile in range(tiles):
        part = frame.lazy().with_columns(pl.col(times) + tile * length_s)
        if "request" in frame.columns:
            part = part.with_columns(pl.col("request") + tile * ids)
        parts.append(part)
    pl.concat(parts).sink_parquet(path, row_group_size=250_000, maintain_order=True)


def described(info: RunInfo, out: Path, samples: pl.DataFrame) -> None:
    """tbt.parquet, run.json and summary.json, as `write_run` would."""
    from mooncake_bench.opened import _in_parts
    from mooncake_bench.records import TBT_FILE, read_frame

    requests = read_frame(out / "requests.parquet", "requests")
    times = pl.concat(_in_parts(requests, out / "spans.parquet"))
    times.write_parquet(out / TBT_FILE)
    summary = metrics.summarise_frame(info, metrics.with_tbt(requests, times), samples)
    (out / "summary.json").write_bytes(msgspec.json.encode(summary))
    (out / "run.json").write_bytes(msgspec.json.encode(info))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
