"""Does a live cluster move its KV by Mooncake's own Transfer Engine, and do the bytes arrive?

make test-mooncake brings the engine, in an environment of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.bench.chaos import PROFILE, trace_rows
from tests.bench.cluster_bytes import carried, wrong
from tests.bench.live_cluster import write_trace
from tests.reference_cluster.small import a_config
from tests.reference_cluster.test_processes import BYTES

pytestmark = [
    pytest.mark.mooncake,
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        importlib.util.find_spec("mooncake") is None, reason="mooncake is not installed"
    ),
]


def test_mooncakes_engine_carries_a_trace(tmp_path: Path) -> None:
    """2P+2D over its TCP: every block of every request is verified where it decodes."""
    rows = trace_rows(5, 8.0, 5.0)
    for row in rows:
        row["hash_ids"][0] = 0
    trace = write_trace(tmp_path / "trace.jsonl", rows)
    fields: dict[str, Any] = {**BYTES, "prefill": {"dram_tokens": 20_000}}
    network = {"transport": "mooncake", "verify": "always"}
    config = a_config(**fields, block_tokens=512, network=network)
    found = carried(config, trace, tmp_path / "run", PROFILE)
    assert wrong(found) == []
    assert found["offered"] == len(rows)
