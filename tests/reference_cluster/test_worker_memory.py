"""Is KV that arrived damaged told from KV that arrived whole?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reference_cluster.config import ClusterConfig
from reference_cluster.kvpool.memory import BlockMemory
from reference_cluster.transports.bytes import Endpoint, Segment
from reference_cluster.transports.shm import ShmTransport
from reference_cluster.worker_memory import WorkerMemory
from tests.reference_cluster.small import a_config

SLOTS = [2, 0, 3, 1]


def a_memory(segment: Segment, verify: str, kind: str) -> WorkerMemory:
    """Four slots of 2 layers of 8 bytes."""
    fields: dict[str, Any] = {"system": "colocated", "engine": {"kind": kind, "page_tokens": 10}}
    fields |= {"network": {"verify": verify}, "workers": {"placement": "processes"}}
    config: ClusterConfig = a_config(**fields)
    slots = BlockMemory(segment.buffer, layers=2, layer_bytes=8)
    endpoint = Endpoint("shm", "", segment.name, segment.size)
    return WorkerMemory(config, segment, slots, ShmTransport(), endpoint)


@pytest.mark.parametrize("kind", ["torch", "modelled"])
def test_a_changed_byte_is_found_in_its_block(kind: str) -> None:
    """A model's KV is known by its sender's checksums, a modelled engine's by its pattern."""
    segment = Segment.create(64)
    memory = a_memory(segment, "always", kind)
    blocks = [11, 12, 13, 14]
    for block, slot in zip(blocks, SLOTS, strict=True):
        for layer in range(2):
            memory.pattern.write(block, layer, memory.slots.view(slot, layer))

    async def main() -> tuple[int, int | None, int | None]:
        sums = await memory.sums(SLOTS)
        before = await memory.damaged(blocks, SLOTS, sums)
        memory.slots.view(3)[5] ^= 1
        return len(sums), before, await memory.damaged(blocks, SLOTS, sums)

    # The third block lies in slot 3.
    assert asyncio.run(main()) == (4 if kind == "torch" else 0, None, 2)
    assert (memory.verified_blocks, memory.mismatched_blocks) == (7, 1)
    segment.close()


def test_nothing_is_looked_at_where_it_is_off() -> None:
    """No checksums are made, and none are missed."""
    segment = Segment.create(64)
    memory = a_memory(segment, "off", "torch")

    async def main() -> int | None:
        assert await memory.sums(SLOTS) == []
        return await memory.damaged([1, 2, 3, 4], SLOTS, [])

    assert asyncio.run(main()) is None
    assert memory.verified_blocks == 0
    segment.close()
