"""Who copies hot blocks before anybody asks? A task that keeps them on every prefill instance.

Algorithm 1 replicates on demand, when a request is placed where its prefix is not. This goes
further, for keys that no single placement would copy; it is off unless asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from reference_cluster.config import PrefillConfig
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.policies.replication import hottest
from reference_cluster.request import Block, Request

# Holder, target, blocks, and who is told how many blocks are there.
Copy = Callable[[int, int, Sequence[Block], Callable[[int], None]], None]


class Replicator:
    """Counts which blocks are asked for, and every `every_s` copies the hottest to all."""

    def __init__(self, config: PrefillConfig, index: PrefixIndex, copy: Copy) -> None:
        self.keys, self.every_s = config.replicate_keys, config.replicate_every_s
        self.index = index
        self.copy = copy
        self.uses: dict[Block, int] = {}
        self.copied_blocks = 0
        self.under_way = 0

    def asked_for(self, request: Request) -> None:
        """Count a request's blocks, admitted or not: demand is demand."""
        for block in request.blocks:
            self.uses[block] = self.uses.get(block, 0) + 1

    async def run(self) -> None:
        """Copy for ever."""
        while True:
            await asyncio.sleep(self.every_s)
            self.copy_hottest()

    def copy_hottest(self) -> None:
        hot = hottest(self.uses, self.keys)
        for target in range(self.index.instances):
            by_holder: dict[int, list[Block]] = {}
            for block in hot:
                holders = self.index.holders.get(block, 0)
                if holders and not holders >> target & 1:
                    holder = (holders & -holders).bit_length() - 1
                    by_holder.setdefault(holder, []).append(block)
            for holder, blocks in by_holder.items():
                self.under_way += 1
                self.copy(holder, target, blocks, self.copied)

    def copied(self, blocks: int) -> None:
        self.under_way -= 1
        self.copied_blocks += blocks
