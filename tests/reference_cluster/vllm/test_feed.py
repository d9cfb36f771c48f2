"""What a worker of vLLM tells of itself, and what it is started with; without vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.vllm.connectors import make_connector
from reference_cluster.engines.vllm.feed import DECODER, Beat, Event, Feed, Hello, Removed, Stored
from reference_cluster.engines.vllm.store import Index
from reference_cluster.launch.vllm import role_of, words

HELLO = Hello("prefill-0", "model", None)


def a_feed() -> Feed:
    return Feed(asyncio.get_running_loop(), HELLO, lambda: Beat(3, {"held_blocks": 2}))


async def told(lines: AsyncIterator[bytes], count: int) -> list[Event]:
    """The next `count` events."""
    found: list[Event] = []
    while len(found) < count:
        text = (await anext(lines)).decode()
        found += [DECODER.decode(line[6:]) for line in text.splitlines() if line]
    return found


def test_a_follower_hears_what_is_held_and_then_every_change():
    """Slots of a pool of two, which a third block makes room in."""

    async def main() -> list[Event]:
        feed, index = a_feed(), Index(2)
        index.on_change = feed.tell
        index.release([7]) if index.hold([7]) else None
        await asyncio.sleep(0)  # What another thread tells comes by the loop.
        lines = feed.follow(60.0)
        first = await told(lines, 3)
        for block in (8, 9):
            index.release([block]) if index.hold([block]) else None
        return first + await told(lines, 3)

    assert asyncio.run(main()) == [
        HELLO,
        Stored([(7, 0)]),
        Beat(3, {"held_blocks": 2}),
        Stored([(8, 1)]),
        Removed([7]),
        Stored([(9, 0)]),
    ]


def test_a_silent_worker_says_that_it_lives():
    """A beat as often as was asked for."""

    async def main() -> list[Event]:
        lines = a_feed().follow(0.001)
        return (await told(lines, 5))[3:]

    assert asyncio.run(main()) == [Beat(3, {"held_blocks": 2})] * 2


def test_a_follower_that_has_gone_is_forgotten():
    """Its queue would grow for ever."""

    async def main() -> Feed:
        feed = a_feed()
        lines = feed.follow(60.0)
        await anext(lines)
        await lines.aclose()
        return feed

    assert not asyncio.run(main()).followers


def started_with(tmp_path: Path, name: str, **fields: Any) -> dict[str, Any]:
    """What an instance of this name is started with, by option."""
    (tmp_path / "config.json").write_text("{}")
    given = {
        "engine": {"kind": "vllm", "model": str(tmp_path)},
        "network": {"transport": "shm"},
        "prefill": {"chunk_tokens": 512},
        "block_tokens": 64,
    }
    config = msgspec.convert({**given, **fields}, ClusterConfig)
    setting = make_connector(config).setting(config, role_of(name), "mcb-1-2-")
    found = words(config, name, setting)
    return dict(zip((key[2:] for key in found[::2]), found[1::2], strict=True))


def test_workers_of_a_pair_get_the_pool_and_their_own_arguments(tmp_path):
    """A prefill worker also fetches; a role's arguments win over those of all."""
    vllm = {"arguments": {"seed": 1, "x": 2}, "decode_arguments": {"x": 3}, "pool_bytes": 1000}
    prefill = started_with(tmp_path, "prefill-1", vllm=vllm)
    decode = started_with(tmp_path, "decode-0", vllm=vllm)
    transfer = json.loads(prefill["kv-transfer-config"])
    assert transfer["kv_role"] == "kv_both"
    assert transfer["kv_connector_extra_config"]["pool_bytes"] == 1000
    assert json.loads(decode["kv-transfer-config"])["kv_role"] == "kv_consumer"
    assert json.loads(prefill["engine-arguments"]) == {
        "block_size": 64,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "seed": 1,
        "x": 2,
    }
    assert json.loads(decode["engine-arguments"])["x"] == 3


def test_colocated_workers_cache_and_chunk_as_the_config_says(tmp_path):
    """Without chunked prefill a step must have room for the longest prompt."""
    colocated = {"prefix_caching": True, "batch_max": 32}
    given = started_with(tmp_path, "colocated-0", system="colocated", colocated=colocated)
    assert "kv-transfer-config" not in given
    assert json.loads(given["engine-arguments"]) == {
        "block_size": 64,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8448,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": False,
    }
    chunked = colocated | {"batching": "chunked", "step_tokens_max": 1024}
    given = started_with(tmp_path, "colocated-0", system="colocated", colocated=chunked)
    arguments = json.loads(given["engine-arguments"])
    assert arguments["max_num_batched_tokens"] == 1024
    assert "enable_chunked_prefill" not in arguments
