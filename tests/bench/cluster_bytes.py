"""Do real bytes of a real trace arrive whole, and are they on their way while prompts are computed?

    .venv/bin/python -m tests.bench.cluster_bytes [--check] [--transports shm,tcp] [--window 0-600]

A live 2P+2D of modelled engines serves ten minutes of Mooncake's conversation trace at twice its
speed, with 4 KiB of KV a token (14,000 tokens and 57 MB a request), once a transport: every block
of every request is verified where it decodes. Then two minutes of it on links held to 1 GB/s,
layer by layer and serialised: how much of the transfer is hidden? `--check` ends with 1 where a
block is missing or wrong, or less than 80 % is hidden (71 % on a machine with seven others at work
for each core, where streams wait for their turn). Thirteen minutes; 3 GB of shared memory.

Mooncake's own engine (--transports mooncake --overlap "") is slower: two cores carry the trace's
bytes with it at --speed 0.5, not at 2, where hand-overs run into their deadline of 10 s.

The trace is looked for in MOONCAKE_TRACES (default ../shared/traces beside the repository). The
profile is that of no real node: six times an H100 node's speed, so that two of each carry it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from mooncake_bench.metrics import per_request
from mooncake_bench.records import Run, read_run
from reference_cluster.api import Front
from reference_cluster.blocks import prefix_hashes
from reference_cluster.cost_model import DecodeCost, PrefillCost, Profile
from tests.bench.live_cluster import REPO, replaying
from tests.reference_cluster.live import live
from tests.reference_cluster.small import a_config
from workloads.prompts import prompt_token_ids

TRACE = "conversation_trace.jsonl"
SPEED = 2.0
BLOCK_TOKENS = 512
KV_BYTES = 4096  # A token.
HIDDEN_MIN = 0.8
LINK_BYTES_PER_S = 1e9
OVERLAP_WINDOW = "0-120"
SLO = "ttft<5s,tbt<100ms"
PROFILE = Profile(
    name="cluster-bytes",
    model="none",
    node="none",
    source="made to carry the conversation trace at twice its speed on 2P+2D",
    error="none",
    prefill=PrefillCost(base_s=0.010, token_s=1.2e-5, token2_s=0.0),
    decode=DecodeCost(base_s=0.008, sequence_s=5e-5, context_token_s=0.0),
    layers=32,
    kv_bytes_per_token=KV_BYTES,
    device_kv_tokens=400_000,
    dram_kv_tokens=98_304,
    link_bytes_per_s=1e9,
)

results = Console(width=120)


class MissingTraceError(Exception):
    """The trace is not on this machine."""


def the_trace() -> Path:
    directory = Path(os.environ.get("MOONCAKE_TRACES", REPO / ".." / "shared" / "traces"))
    if not (directory / TRACE).exists():
        raise MissingTraceError(f"{TRACE} is not here; set MOONCAKE_TRACES to its directory")
    return directory / TRACE


def config_of(transport: str, working_tokens: int, **fields: Any) -> Any:
    """2P+2D that move real bytes; `fields` are more of the sections prefill and network."""
    return a_config(
        prefill_instances=2,
        decode_instances=2,
        block_tokens=BLOCK_TOKENS,
        slo={"ttft_s": 60.0, "tbt_s": 1.0},
        workers={"placement": "processes"},
        prefill={"dram_tokens": 98_304, **fields.get("prefill", {})},
        pool={"kv_bytes_per_token": KV_BYTES, "working_tokens": working_tokens},
        network={"transport": transport, "verify": "always", **fields.get("network", {})},
    )


def carried(config: Any, trace: Path, out: Path, profile: Profile, *flags: str) -> dict[str, Any]:
    """Serve, replay, and compare what was moved with what had to be."""
    with live(config, profile) as (client, front):
        with replaying(str(client.base_url), trace, out, "--slo", SLO, *flags):
            pass
        rows = front.cluster.house.rows()
        run = read_run(out)
        holders = hot_block_holders(front, run, trace)
    block_bytes = profile.layers * (
        config.block_tokens * config.pool.kv_bytes_per_token // profile.layers // 8 * 8
    )
    return figures(run, rows, config.block_tokens, block_bytes) | {
        "transport": config.network.transport,
        "layerwise": config.prefill.layerwise,
        "cap": config.network.cap_bytes_per_s,
        "hot_block_holders": holders,
    }


def hot_block_holders(front: Front, run: Run, trace: Path) -> int:
    """On how many prefill workers is the block that most of this trace's prompts begin with?"""
    size = front.config.block_tokens
    first = json.loads(trace.read_text().partition("\n")[0])["hash_ids"][:1]
    tokens = prompt_token_ids(run.info.trace["sha256"], first, size, size)
    return front.cluster.index.match(prefix_hashes(tokens, size)).count(1)


def figures(
    run: Run, rows: Sequence[dict[str, Any]], block_tokens: int, block_bytes: int
) -> dict[str, Any]:
    frame = per_request(run.requests, run.spans)
    streamed = frame.filter(pl.col("output_tokens_asked") > 1)
    blocks = int((-(-streamed["input_tokens"] // block_tokens)).sum())
    prefill = [row for row in rows if row["name"].startswith("prefill")]
    decode = [row for row in rows if row["name"].startswith("decode")]

    def total(of: Sequence[dict[str, Any]], name: str) -> float:
        return float(sum(row.get(name, 0.0) for row in of))

    ends = Counter(
        f"{status} {reason or ''}".strip()
        for status, reason in frame.select("status", "reason").rows()
    )
    last_s = float(frame["finished_s"].max() or 0.0)  # type: ignore[arg-type]
    return {
        "offered": frame.height,
        "finished": int((frame["status"] == "finished").sum()),
        "ends": ", ".join(f"{count} {what}" for what, count in ends.most_common()),
        "blocks": blocks,
        "verified_blocks": int(total(decode, "verified_blocks")),
        "mismatched_blocks": int(total(rows, "mismatched_blocks")),
        "sent_bytes": total(prefill, "sent_bytes"),
        "expected_bytes": blocks * block_bytes,
        "sent_bytes_per_s": total(prefill, "sent_bytes") / last_s,
        "fetched_bytes": total(prefill, "fetched_bytes"),
        "busy_s": total(prefill, "stream_busy_s"),
        "tail_s": total(prefill, "stream_tail_s"),
        "ttft_p50_s": frame["ttft_s"].median(),
        "reused": float(run.summary.get("reused_share") or 0.0),
        "invalid": run.info.invalid_reasons,
        "duration_s": last_s,
        "streams": streamed.height,
    }


def wrong(row: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    if row["finished"] != row["offered"]:
        found.append(f"of {row['offered']} requests: {row['ends']}")
    if row["verified_blocks"] != row["blocks"]:
        found.append(f"{row['verified_blocks']} blocks verified of {row['blocks']}")
    if row["mismatched_blocks"]:
        found.append(f"{row['mismatched_blocks']} blocks damaged")
    if row["sent_bytes"] != row["expected_bytes"]:
        found.append(f"{row['sent_bytes']:.0f} bytes sent instead of {row['expected_bytes']}")
    if row["hot_block_holders"] != 2:
        found.append(f"the hot block is on {row['hot_block_holders']} of 2 prefill workers")
    return [f"{row['transport']}: {one}" for one in found]


def hidden(layerwise: dict[str, Any], serialised: dict[str, Any]) -> float:
    """Share of a serialised transfer's time after the prefill that layer-wise streaming hides."""
    ratio = (layerwise["tail_s"] / layerwise["streams"]) / (
        serialised["tail_s"] / serialised["streams"]
    )
    return 1.0 - float(ratio)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("transport", "streams", "link", "finished", "blocks verified", "wrong", box=None)
    for name in ("moved", "rate", "fetched", "tail a request", "TTFT p50", "hot block on"):
        table.add_column(name, justify="right")
    for row in rows:
        cap = f"{row['cap'] / 1e9:g} GB/s" if row["cap"] else "-"
        table.add_row(
            row["transport"], "layer-wise" if row["layerwise"] else "serialised", cap,
            f"{row['finished']} of {row['offered']}", f"{row['verified_blocks']:,}",
            str(row["mismatched_blocks"]), f"{row['sent_bytes'] / 1e9:.1f} GB",
            f"{row['sent_bytes_per_s'] / 1e6:.0f} MB/s", f"{row['fetched_bytes'] / 1e9:.1f} GB",
            f"{1e3 * row['tail_s'] / row['streams']:.1f} ms",
            f"{1e3 * (row['ttft_p50_s'] or 0.0):.0f} ms", f"{row['hot_block_holders']} of 2",
        )  # fmt: skip  # one cell a line would hide the table
    results.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=REPO / "build" / "bench-cluster-bytes.json")
    parser.add_argument("--check", action="store_true", help="exit 1 where something is wrong")
    parser.add_argument("--transports", default="shm,tcp", help="shm, tcp, mooncake, rdma")
    parser.add_argument("--speed", type=float, default=SPEED, help="of the replay")
    parser.add_argument("--window", default="0-600", help="of the trace, in its seconds")
    parser.add_argument("--overlap", default=OVERLAP_WINDOW, help="the same; empty: not measured")
    options = parser.parse_args()
    try:
        trace = the_trace()
    except MissingTraceError as error:
        Console(stderr=True).print(str(error), soft_wrap=True)
        return 2
    flags = ["--speed", str(options.speed), "--window"]
    rows, problems = [], []
    with tempfile.TemporaryDirectory(prefix="bench-cluster-bytes-") as scratch:
        for name in options.transports.split(","):
            out = Path(scratch, name)
            config = config_of(name, 135_168)
            rows.append(carried(config, trace, out, PROFILE, *flags, options.window))
            problems += wrong(rows[-1])
        for is_layerwise in (True, False) if options.overlap else ():
            config = config_of(
                options.transports.split(",")[0],
                135_168,
                prefill={"layerwise": is_layerwise},
                network={"cap_bytes_per_s": LINK_BYTES_PER_S},
            )
            out = Path(scratch, f"layerwise-{is_layerwise}")
            rows.append(carried(config, trace, out, PROFILE, *flags, options.overlap))
            problems += wrong(rows[-1])
    show(rows)
    if options.overlap:
        share = hidden(*rows[-2:])
        results.print(f"{share:.1%} of the serialised transfer is hidden", highlight=False)
        problems += [f"less than {HIDDEN_MIN:.0%} is hidden"] * (share < HIDDEN_MIN)
    for problem in problems:
        results.print(problem, style="red")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"rows": rows, "problems": problems}, indent=2) + "\n")
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
