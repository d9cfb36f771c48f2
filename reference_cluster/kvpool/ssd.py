"""What becomes of blocks that DRAM lets go? They go to SSD and come back for a prompt with them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block


class SsdTier:
    """The SSD below one instance's DRAM pool, least recently used out first.

    A block is in one tier only. What a prompt needs comes up to DRAM over one link, on which reads
    wait for each other; a block counts as in DRAM while it is read, and who needs it waits for it.
    Writing is taken to happen in the background and to cost no reads.
    """

    def __init__(
        self, dram: BlockPool, capacity: int, block_bytes: float, bytes_per_s: float
    ) -> None:
        self.dram = dram
        self.blocks = BlockPool(capacity, on_evicted=dram.on_evicted)
        self.block_s = block_bytes / bytes_per_s
        self.on_stored = dram.on_stored
        dram.on_stored, dram.on_evicted = self.came, self.sink
        self.free_s = 0.0  # When the link has read all that was asked for.
        self.arrival_s: dict[Block, float] = {}  # Of blocks under way.
        self.under_way: deque[tuple[float, Sequence[Block]]] = deque()
        self.read_blocks = 0

    def came(self, blocks: Sequence[Block]) -> None:
        """DRAM has them now, computed anew or read: they leave the SSD."""
        for block in blocks:
            if block in self.blocks:
                self.blocks.discard(block)
        self.on_stored(blocks)

    def sink(self, blocks: Sequence[Block]) -> None:
        """DRAM has let them go; the SSD may let go of others for them."""
        for block in blocks:
            self.blocks.store_pinned((block,))
            self.blocks.unpin((block,))

    def match(self, blocks: Sequence[Block]) -> int:
        """How many leading blocks are in either tier."""
        matched = 0
        for block in blocks:
            if block not in self.dram and block not in self.blocks:
                break
            matched += 1
        return matched

    def hold(self, blocks: Sequence[Block], now_s: float) -> tuple[int, float]:
        """Pin the leading blocks that are in either tier, reading those on SSD.

        Returns how many (as many as DRAM has room for) and when all of them are in DRAM.
        """
        self.settle(now_s)
        wanted = blocks[: self.match(blocks)]
        below = [block for block in wanted if block in self.blocks]
        # First out of the SSD: what DRAM lets go for them must not push them out there.
        for block in below:
            self.blocks.discard(block)
        held = self.dram.store_pinned(wanted)
        self.sink([block for block in below if block not in self.dram])
        self.read([block for block in below if block in self.dram], now_s)
        return held, self.ready_s(wanted[:held], now_s)

    def read(self, blocks: Sequence[Block], now_s: float) -> None:
        """Queue a read; its blocks arrive together."""
        if blocks:
            self.free_s = max(self.free_s, now_s) + len(blocks) * self.block_s
            self.arrival_s.update(dict.fromkeys(blocks, self.free_s))
            self.under_way.append((self.free_s, blocks))
            self.read_blocks += len(blocks)

    def ready_s(self, blocks: Sequence[Block], now_s: float) -> float:
        """When these would all be in DRAM, if they were wanted now."""
        arrival_s, below = now_s, 0
        for block in blocks:
            arrival_s = max(arrival_s, self.arrival_s.get(block, now_s))
            below += block in self.blocks
        if below:
            arrival_s = max(self.free_s, now_s) + below * self.block_s
        return arrival_s

    def when_read(self, blocks: Sequence[Block], ready_s: float, call: Callable[[], None]) -> None:
        """Call back when these, that were held, have been read: predicted for `ready_s`."""
        asyncio.get_running_loop().call_at(ready_s, call)

    def arrived(self, blocks: Sequence[Block], now_s: float) -> int:
        """How many leading blocks, all of them in DRAM, have nothing still to be read."""
        self.settle(now_s)
        for count, block in enumerate(blocks):
            if block in self.arrival_s:
                return count
        return len(blocks)

    def are_awaited(self, blocks: Sequence[Block], ready_s: float, now_s: float) -> bool:
        """Is any of these, which `hold` said are in DRAM at `ready_s`, still to be read?"""
        return ready_s > now_s

    def intact(self, blocks: Sequence[Block]) -> int:
        """How many leading blocks, held and waited for, have been read without damage."""
        return len(blocks)

    def settle(self, now_s: float) -> None:
        """Forget the reads that have arrived."""
        while self.under_way and self.under_way[0][0] <= now_s:
            arrived_s, blocks = self.under_way.popleft()
            for block in blocks:
                # It may have been let go, sunk and asked for once more meanwhile.
                if self.arrival_s.get(block) == arrived_s:
                    del self.arrival_s[block]

    def check_integrity(self) -> None:
        """Raise AssertionError where this tier's books do not balance, or both have a block."""
        self.blocks.check_integrity()
        assert not self.blocks.pins, f"{self.blocks!r} is pinned"
        both = [block for block in self.blocks.idle if block in self.dram]
        assert not both, f"{len(both)} blocks are on SSD and in DRAM"
