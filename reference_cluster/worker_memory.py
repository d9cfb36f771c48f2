"""Which KV bytes does a worker have, and where? Its segment, slots, and the way to its peers'."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.pattern import Pattern
from reference_cluster.kvpool.memory import BlockMemory
from reference_cluster.parts import Parts
from reference_cluster.request import Block
from reference_cluster.transports.bytes import ByteTransport, Endpoint, Segment
from reference_cluster.transports.capped import CappedTransport

Sums = list[tuple[int, int]]  # The place of a block in a prompt, and its bytes' checksum.
SAMPLED_BLOCKS = 8  # Of so many blocks one is verified, and always the last.


class WorkerMemory:
    """Registered memory in slots of one block, and the transport that peers reach it by."""

    def __init__(
        self,
        config: ClusterConfig,
        segment: Segment,
        memory: BlockMemory,
        transport: ByteTransport,
        endpoint: Endpoint,
    ) -> None:
        self.segment = segment
        self.slots = memory
        self.transport = transport
        self.endpoint = endpoint
        self.pattern = Pattern(memory.layers, memory.layer_bytes)
        self.is_modelled = config.engine.kind == "modelled"
        self.verify = config.network.verify
        self.rng = random.Random(config.seed)
        self.verified_blocks = self.mismatched_blocks = 0

    @classmethod
    async def open(cls, parts: Parts, pool_blocks: int, cluster: str) -> WorkerMemory:
        """Room for a pool and, beside it, for what is computed and on its way."""
        config = parts.config
        layers, layer_bytes = parts.profile.layers, parts.layer_bytes
        working = -(-config.pool.working_tokens // config.block_tokens)
        size = (pool_blocks + working) * layers * layer_bytes
        segment = Segment.create(size, f"mcb-{cluster}-")
        transport = make_transport(config)
        endpoint = await transport.start(segment)
        memory = BlockMemory(segment.buffer, layers, layer_bytes)
        return cls(config, segment, memory, transport, endpoint)

    async def close(self) -> None:
        await self.transport.close()
        self.segment.close()

    async def sums(self, slots: Sequence[int]) -> Sums:
        """What whoever gets these bytes can verify: none where it is not to, or knows by itself
        what they must be."""
        if self.is_modelled:
            return []
        found = []
        for place in sampled(len(slots), self.verify, self.rng):
            await asyncio.sleep(0)
            found.append((place, self.slots.checksum(slots[place])))
        return found

    async def damaged(
        self, blocks: Sequence[Block], slots: Sequence[int], sums: Sums
    ) -> int | None:
        """The place of a block that came and is not what was sent, of those that are looked at."""
        looked_at: Sequence[tuple[int, int | None]] = sums
        if self.is_modelled:
            looked_at = [(place, None) for place in sampled(len(slots), self.verify, self.rng)]
        for place, checksum in looked_at:
            await asyncio.sleep(0)
            self.verified_blocks += 1
            if not self.is_right(blocks[place], slots[place], checksum):
                self.mismatched_blocks += 1
                return place
        return None

    def is_right(self, block: Block, slot: int, checksum: int | None) -> bool:
        """By its checksum; without one by the pattern that is a modelled engine's KV."""
        if checksum is not None:
            return self.slots.checksum(slot) == checksum
        assert isinstance(block, int)
        return self.pattern.is_right(block, self.slots.view(slot))


def sampled(count: int, verify: str, rng: random.Random) -> list[int]:
    """Which of a prompt's blocks are verified."""
    if verify == "always" or not count:
        return list(range(count))
    if verify == "off":
        return []
    some = rng.sample(range(count), -(-count // SAMPLED_BLOCKS))
    return sorted({*some, count - 1})


def make_transport(config: ClusterConfig) -> ByteTransport:
    """The transport that the configuration names; what it needs is imported only then."""
    network = config.network
    module, name = TRANSPORTS[network.transport]
    options: dict[str, Any] = {
        "shm": {},
        "tcp": {"host": network.host},
        "rdma": {
            "address": network.host,
            "preferred": network.rdma_devices,
            "secondary": network.rdma_secondary,
        },
        "mooncake": {"host": network.host, "protocol": network.mooncake_protocol},
    }
    made: ByteTransport = getattr(import_module(module), name)(**options[network.transport])
    if network.cap_bytes_per_s is not None:
        return CappedTransport(made, network.cap_bytes_per_s)
    return made


TRANSPORTS = {
    "shm": ("reference_cluster.transports.shm", "ShmTransport"),
    "tcp": ("reference_cluster.transports.tcp", "TcpTransport"),
    "rdma": ("reference_cluster.transports.rdma.transport", "RdmaTransport"),
    "mooncake": ("reference_cluster.transports.mooncake", "MooncakeTransport"),
}
