"""What does Dynamo's offline replay make of a trace? Run by simulators.py in Dynamo's environment.

`python dynamo_replay.py TRACE.jsonl REPORT.json BLOCK_TOKENS PREFILL DECODE BLOCKS`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Installed only in the environment that simulators.py makes.
from dynamo.replay import run_trace_replay  # type: ignore[import-not-found,unused-ignore]


def main(trace: str, out: Path, block_tokens: int, prefill: int, decode: int, blocks: int) -> None:
    """Replay `trace` in virtual time with Dynamo's KV router and write its own summary to `out`."""
    engine = {"num_gpu_blocks": blocks, "block_size": block_tokens}
    report = run_trace_replay(
        [trace],
        trace_format="mooncake",
        trace_block_size=block_tokens,
        prefill_engine_args={"engine": {**engine, "worker_type": "prefill"}},
        decode_engine_args={"engine": {**engine, "worker_type": "decode"}},
        num_prefill_workers=prefill,
        num_decode_workers=decode,
        router_mode="kv_router",
        sla_ttft_ms=30_000.0,
        sla_itl_ms=100.0,
    )
    out.write_text(json.dumps(report.summary, default=str))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:7]))
