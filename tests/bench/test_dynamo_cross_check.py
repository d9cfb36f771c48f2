"""Do we and Dynamo's offline replay (Rust) see the same trace the same way? Off unless -m bench.

Both simulate the same JSONL on 4 prefill and 2 decode nodes with pools of the same size and a
KV-aware router. What depends on the trace and the caches alone must agree: requests, tokens, reused
prefixes. What does not agree, and why:

- TTFT and TBT: each has a cost model of its own. Dynamo's default is a polynomial that is not
  calibrated to any hardware, so that its times are reported here and not compared.
- Reuse, by some points: our Conductor may fetch a prefix from another node where Dynamo's router
  sends the request to the node that has it, or computes it anew.
- Transfers: Dynamo divides bytes by a bandwidth, here transfers share links; with idle links and a
  low load it makes no difference.
- Rejection: Dynamo has none by prediction, so both accept everything here.

The environment with Dynamo is made by tests/bench/simulators.py; DYNAMO_PYTHON names another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake_bench.plan.candidate import Candidate, Job, Load, Scene, Trial
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.spec import Promise
from mooncake_bench.plan.trial import run_trial
from workloads.trace import open_trace, write_mooncake

REPO = Path(__file__).resolve().parents[2]
PREFILL, DECODE, POOL_BLOCKS, BLOCK_TOKENS = 4, 2, 2500, 512
REUSE_POINTS = 0.03


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has Dynamo, or a skip."""
    default = REPO / "build" / "bench-dynamo" / "bin" / "python"
    found = Path(os.environ.get("DYNAMO_PYTHON", default))
    if not found.exists():
        pytest.skip("no Dynamo: run tests/bench/simulators.py once, or set DYNAMO_PYTHON")
    return found


def dynamo(python: Path, trace: Path, directory: Path) -> dict[str, float]:
    report = directory / "dynamo.json"
    script = Path(__file__).with_name("dynamo_replay.py")
    numbers = map(str, (BLOCK_TOKENS, PREFILL, DECODE, POOL_BLOCKS))
    command = [str(python), str(script), str(trace), str(report), *numbers]
    environment = {**os.environ, "DYN_LOG": "off"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(report.read_text())
    return found


def ours(trace: Path) -> Outcome:
    cluster = Candidate("h100-llama3-70b", "disaggregated", PREFILL, DECODE)
    cluster = cluster.with_options(prefill__dram_tokens=POOL_BLOCKS * BLOCK_TOKENS)
    scene = Scene(str(trace), "", False, Promise(30.0, 0.1, 0.95))
    return run_trial(Job(scene, Trial(cluster, Load()), is_whole=True))


@pytest.mark.bench
def test_both_reuse_the_same_prefixes(python: Path, tmp_path: Path):
    """Ten minutes of conversation-like traffic: all done, all tokens, reuse within 3 points."""
    trace = open_trace("conversation-like:duration_s=600")
    path = tmp_path / "trace.jsonl"
    write_mooncake(trace, path)
    theirs, mine = dynamo(python, path, tmp_path), ours(path)
    assert theirs["completed_requests"] == mine.requests == trace.frame.height
    assert theirs["total_input_tokens"] == trace.frame["input_tokens"].sum()
    assert theirs["total_output_tokens"] == trace.frame["output_tokens"].sum()
    assert mine.hit_ratio == pytest.approx(theirs["prefix_cache_reused_ratio"], abs=REUSE_POINTS)
    sys.stderr.write(
        f"\nreuse: ours {mine.hit_ratio:.1%}, Dynamo {theirs['prefix_cache_reused_ratio']:.1%}; "
        f"TTFT p50: ours {mine.ttft_s['p50']:.3f} s, Dynamo {theirs['median_ttft_ms'] / 1e3:.3f} s "
        "(a cost model each, not compared)\n"
    )
