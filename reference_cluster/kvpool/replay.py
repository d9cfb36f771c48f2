"""How much of a trace would one pool have had? Its prompts one by one, without a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reference_cluster.blocks import reusable_tokens
from reference_cluster.config import Eviction
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block


@dataclass(slots=True)
class Hits:
    """What was found of what was asked for."""

    hit_blocks: int = 0
    blocks: int = 0
    hit_tokens: int = 0
    tokens: int = 0

    @property
    def block_ratio(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_ratio(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def replay_chains(
    chains: Iterable[tuple[Sequence[Block], int]],
    capacity_blocks: int | None,
    eviction: Eviction = "lru",
    block_tokens: int = 512,
) -> Hits:
    """Prefix hits of prompts, each given as its block keys and its tokens, in one shared pool.

    Each prompt is looked up, stored and released before the next comes; of one larger than the
    pool the beginning is stored. `capacity_blocks` None: nothing is ever evicted.
    """
    pool = BlockPool(sys.maxsize if capacity_blocks is None else capacity_blocks, eviction=eviction)
    hits = Hits()
    for blocks, tokens in chains:
        held = pool.match(blocks)
        hits.hit_blocks += held
        hits.blocks += len(blocks)
        hits.hit_tokens += reusable_tokens(held, tokens, block_tokens)
        hits.tokens += tokens
        pool.pin(blocks[:held])
        stored = held + pool.store_pinned(blocks[held:])
        pool.unpin(blocks[:stored])
    return hits
