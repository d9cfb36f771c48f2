"""Is a run the same each time, in every process and under any PYTHONHASHSEED?"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from reference_cluster.config import Scheduling
from reference_cluster.request import Request
from reference_cluster.simulate import simulate
from tests.reference_cluster.small import ROUGH, a_config, random_requests

REPO = Path(__file__).resolve().parents[2]
TIGHT = {"admission": "early-rejection"}
SLO = {"ttft_s": 1.5, "tbt_s": 0.036}
CLUSTERS: list[dict[str, Any]] = [
    *({"conductor": {"scheduling": name}} for name in get_args(Scheduling)),
    {"conductor": TIGHT, "slo": SLO, "prefill": {"dram_tokens": 900}},
    {"system": "colocated", "colocated": {"prefix_caching": True, "device_tokens": 2000}},
    {"system": "colocated", "colocated": {"batching": "chunked"}, "conductor": TIGHT, "slo": SLO},
]


def digest(seed: int = 5) -> str:
    """Of every Timeline, placement and status of runs on all kinds of clusters, to the last bit."""
    total = hashlib.sha256()
    for fields in CLUSTERS:
        counts = {"prefill_instances": 3, "decode_instances": 2, "colocated_instances": 3}
        requests = random_requests(seed, 120, 0.05)
        simulated = simulate(a_config(seed=seed, **counts, **fields), ROUGH, requests)
        for request in simulated.requests:
            total.update(repr(told(request)).encode())
        total.update(repr(simulated.samples).encode())
    return total.hexdigest()


def told(request: Request) -> tuple[Any, ...]:
    """All that a run's results tell of a request."""
    fields = {one.name for one in dataclasses.fields(request)} - {"timeline", "memberships", "sink"}
    spans = [(first, past) for _, first, past in request.memberships]
    values = [(name, getattr(request, name)) for name in sorted(fields)]
    return dataclasses.astuple(request.timeline), values, spans


def test_the_same_run_twice_is_the_same() -> None:
    """In one process; and another seed is another run."""
    assert digest() == digest()
    assert digest() != digest(seed=6)


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_the_hash_seed_does_not_matter(hash_seed: str) -> None:
    """Block keys are strings, whose hashes differ from process to process."""
    code = "from tests.reference_cluster.test_determinism import digest; print(digest())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()
