"""Who copies hot blocks before anybody asks? A task that keeps them on every prefill instance.

Algorithm 1 replicates on demand, when a request is placed where its prefix is not. This goes
further, for keys that no single placement would copy; it is off unless asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.messenger import Messenger
from reference_cluster.policies.replication import hottest
from reference_cluster.prefill import PrefillInstance
from reference_cluster.request import Block, Request


class Replicator:
    """Counts which blocks are asked for, and every `every_s` copies the hottest to all."""

    def __init__(
        self,
        prefill: Sequence[PrefillInstance],
        index: PrefixIndex,
        messenger: Messenger,
        keys: int,
        every_s: float,
        block_tokens: int,
    ) -> None:
        self.prefill = prefill
        self.index = index
        self.messenger = messenger
        self.keys = keys
        self.every_s = every_s
        self.block_tokens = block_tokens
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
        for target in self.prefill:
            by_holder: dict[int, list[Block]] = {}
            for block in hot:
                holders = self.index.holders.get(block, 0)
                if holders and not holders >> target.id & 1:
                    holder = (holders & -holders).bit_length() - 1
                    by_holder.setdefault(holder, []).append(block)
            for holder, blocks in by_holder.items():
                self.copy(self.prefill[holder], target, blocks)

    def copy(self, holder: PrefillInstance, target: PrefillInstance, blocks: list[Block]) -> None:
        """Move what the holder has in DRAM; what lies on its SSD is not worth reading for this."""
        here = [block for block in blocks if block in holder.pool]
        if not here:
            return
        holder.pool.pin(here)
        holder.lending += 1
        self.under_way += 1
        tokens = len(here) * self.block_tokens
        self.messenger.fetch(
            tokens, holder.id, target.id, partial(self.arrived, holder, target, here)
        )

    def arrived(
        self, holder: PrefillInstance, target: PrefillInstance, blocks: list[Block]
    ) -> None:
        """Give the holder's blocks free, and keep the copies for as long as they are used."""
        holder.pool.unpin(blocks)
        holder.lending -= 1
        self.under_way -= 1
        stored = target.pool.store_pinned(blocks)
        target.pool.unpin(blocks[:stored])
        self.copied_blocks += stored
