"""What does a prefill instance do? It computes prompts one by one, reusing what its pool holds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from reference_cluster.blocks import reusable_tokens
from reference_cluster.cost_model import CostModel
from reference_cluster.engines.base import Engine
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool, OnChange, PoolUse, ignore
from reference_cluster.kvpool.quota import TenantQuota
from reference_cluster.kvpool.ssd import SsdTier
from reference_cluster.messenger import Delivery
from reference_cluster.policies.batching import chunks
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import Holder
from reference_cluster.reports import LoadChanged, nobody
from reference_cluster.request import Block, Request


@dataclass(slots=True, eq=False)
class Queued:
    """A request that waits here. Its first `pinned` blocks are in the pool and will stay."""

    request: Request
    predicted_s: float
    pinned: int
    awaited: int  # Of a fetch from another instance and a read from SSD, how many are under way.

    @property
    def is_fetching(self) -> bool:
        """Blocks that it counts on are on their way."""
        return self.awaited > 0


class PrefillLoad:
    """What waits and runs on a prefill instance: its own books, and those of its mirror."""

    def __init__(self, id: int, cost: CostModel, block_tokens: int) -> None:
        self.id = id
        self.name = f"prefill-{id}"
        self.pool: PoolUse
        self.queue: Collection[Any]
        self.cost = cost
        self.block_tokens = block_tokens
        self.is_shunned = False  # Nobody is to be placed here.
        self.backlog_s = 0.0  # Predicted prefill time of all that waits.
        self.running: object | None = None
        self.running_end_s = 0.0  # Predicted.
        self.promised: dict[Block, int] = {}  # Blocks that what waits or runs will have stored.
        # Who follows `promised`, and the load.
        self.on_promised: OnChange = ignore
        self.on_settled: OnChange = ignore
        self.load_changed: LoadChanged = nobody

    def queue_s(self, now_s: float) -> float:
        """Predicted time until a request that comes now could start; infinite where it is lost."""
        if self.is_shunned:
            return float("inf")
        if self.running is None or self.running_end_s <= now_s:
            return self.backlog_s
        return self.backlog_s + (self.running_end_s - now_s)

    def queue_load(self) -> tuple[float, float]:
        """Seconds of work that wait, and until when it is busy with what runs."""
        if self.is_shunned:
            return float("inf"), 0.0
        return self.backlog_s, 0.0 if self.running is None else self.running_end_s

    def detach(self) -> None:
        """It is lost: what it promised is void, whatever still happens to it concerns nobody."""
        self.on_settled([*self.promised])
        self.on_promised = self.on_settled = ignore
        self.load_changed = nobody

    @property
    def tiered_blocks(self) -> int | None:
        """With SSD below its DRAM: how many blocks of a prompt can be in DRAM; else None."""
        return None

    def read_s(self, request: Request, held_blocks: int, now_s: float) -> float:
        """Seconds until all of a prompt's first blocks could be in DRAM: all of them are there."""
        return 0.0

    def follow_promises(self, index: PrefixIndex) -> None:
        """Tell this index from now on what it will have stored and has not."""
        self.on_promised = partial(index.promised, self.id)
        self.on_settled = partial(index.settled, self.id)

    def promise(self, blocks: Sequence[Block]) -> None:
        """Somebody here will have stored them."""
        promised, fresh = self.promised, []
        for block in blocks:
            already = promised.get(block, 0)
            promised[block] = already + 1
            if not already:
                fresh.append(block)
        self.on_promised(fresh)

    def forget_promises(self, blocks: Sequence[Block]) -> None:
        promised, settled = self.promised, []
        for block in blocks:
            left = promised.pop(block) - 1
            if left:
                promised[block] = left
            else:
                settled.append(block)
        self.on_settled(settled)


class PrefillInstance(PrefillLoad):
    """A model replica that only prefills. One request at a time, first come first served.

    In a pipeline of nodes (CPP) the next request starts when the first stage is free. `fetch` asks
    for a longer prefix than is here, `hand_over` opens the way of a prefill's KV to its decode
    instance; how the peers are reached is the business of whoever makes the instance.
    """

    def __init__(
        self,
        id: int,
        cost: CostModel,
        engine: Engine,
        pool: BlockPool,
        ssd: SsdTier | None,
        block_tokens: int,
        chunk_tokens: int,
        fetch: Callable[[Queued, Holder], None],
        hand_over: Callable[[Request, float], Delivery | None],
        on_prefilled: Callable[[Request, Delivery | None], None],
        quota: TenantQuota | None = None,
    ) -> None:
        super().__init__(id, cost, block_tokens)
        self.engine = engine
        self.pool: BlockPool = pool
        self.ssd = ssd
        self.quota = quota
        self.chunk_tokens = chunk_tokens
        self.keep = self.take_in
        self.fetch = fetch
        self.hand_over = hand_over
        self.on_prefilled = on_prefilled
        self.loop = asyncio.get_running_loop()
        self.queue: deque[Queued] = deque()
        self.running: Queued | None = None
        self.draining: list[Queued] = []  # Their last chunks are in later stages of the pipeline.
        self.lending = 0  # Fetches by other instances, which pin blocks here.
        self.changed = asyncio.Event()

    @property
    def tiered_blocks(self) -> int | None:
        return None if self.ssd is None else self.pool.capacity

    def read_s(self, request: Request, held_blocks: int, now_s: float) -> float:
        if self.ssd is None:
            return 0.0
        return self.ssd.ready_s(request.blocks[:held_blocks], now_s) - now_s

    def detach(self) -> None:
        super().detach()
        self.pool.on_stored = self.pool.on_evicted = ignore
        if self.ssd is not None:
            self.ssd.on_stored = self.ssd.blocks.on_evicted = ignore

    def accept(self, request: Request, placement: Placement) -> None:
        """Take a place in the queue, hold on to what the pool has of the prefix, fetch the rest."""
        held, read_s = self.hold(request.blocks)
        self.claim(request, request.blocks[:held])
        self.promise(request.blocks[held:])
        predicted_s = self.cost.occupied_s(request.input_tokens, placement.reused_tokens)
        queued = Queued(request, predicted_s, held, awaited=int(placement.fetch is not None))
        ssd, here = self.ssd, request.blocks[:held]
        if ssd is not None and ssd.are_awaited(here, read_s, self.loop.time()):
            queued.awaited += 1
            ssd.when_read(here, read_s, partial(self.arrived, queued))
        self.queue.append(queued)
        self.backlog_s += predicted_s
        self.load_changed()
        self.changed.set()
        if not queued.is_fetching:
            request.timeline.fetched_s = request.timeline.placed_s
        if placement.fetch is not None:
            self.fetch(queued, placement.fetch)

    def fetched(self, queued: Queued, blocks: int) -> None:
        """The prefix's first `blocks` have come from another instance: store and keep them."""
        self.store(queued, blocks)
        self.arrived(queued)

    def arrived(self, queued: Queued) -> None:
        """A fetch or a read is done; after the last the prefill may start."""
        queued.awaited -= 1
        if not queued.awaited:
            if not queued.request.is_cancelled:
                queued.request.timeline.fetched_s = self.loop.time()
            self.changed.set()

    def hold(self, blocks: Sequence[Block]) -> tuple[int, float]:
        """Pin the leading blocks that are here; how many, and when all are in DRAM."""
        if self.ssd is not None:
            return self.ssd.hold(blocks, self.loop.time())
        held = self.pool.match(blocks)
        self.pool.pin(blocks[:held])
        return held, 0.0

    def store(self, queued: Queued, blocks: int) -> None:
        """Extend what is stored and pinned of a request's chain to `blocks`, where room is."""
        wanted = queued.request.blocks[queued.pinned : blocks]
        self.forget_promises(wanted)
        stored = self.keep(queued.request, self.within_quota(queued.request, wanted))
        self.claim(queued.request, wanted[:stored])
        # What found no room is promised still, so that the books stay balanced until the end.
        self.promise(wanted[stored:])
        queued.pinned += stored

    def within_quota(self, request: Request, blocks: Sequence[Block]) -> Sequence[Block]:
        """As many of them as the request's tenant may have stored."""
        if self.quota is None or request.tenant is None:
            return blocks
        return blocks[: self.quota.room(request.tenant, blocks)]

    def claim(self, request: Request, blocks: Sequence[Block]) -> None:
        """The pool has these for the request's tenant."""
        if self.quota is not None and request.tenant is not None:
            self.quota.claim(request.tenant, blocks)

    async def run(self) -> None:
        """Prefill for ever."""
        free_s = self.loop.time()
        while True:
            queued = self.take_next()
            if queued is None:
                self.running = None
                self.changed.clear()
                await self.changed.wait()
                free_s = self.loop.time()
                continue
            free_s = await self.prefill(queued, free_s)

    def take_next(self) -> Queued | None:
        """The first that waits for nothing: blocks under way do not hold up the others."""
        for position, queued in enumerate(self.queue):
            if not queued.awaited:
                del self.queue[position]
                self.backlog_s -= queued.predicted_s
                if not self.queue:
                    self.backlog_s = 0.0  # No rounding residue.
                self.load_changed()
                return queued
        return None

    async def prefill(self, queued: Queued, start_s: float) -> float:
        """Compute one prompt; returns when the engine was free again."""
        request = queued.request
        if request.is_cancelled:
            self.let_go(queued)
            return start_s
        self.reuse(queued)
        remaining_s = self.cost.prefill_s(request.input_tokens, request.reused_tokens)
        occupied_s = self.cost.occupied_s(request.input_tokens, request.reused_tokens)
        self.running, self.running_end_s = queued, start_s + occupied_s
        self.load_changed()
        stamps = request.timeline
        # A live loop wakes late: the engine was free, on paper, before the request was here.
        stamps.prefill_start_s = max(start_s, stamps.fetched_s or start_s)
        handover = self.hand_over(request, remaining_s)
        end_s = start_s
        for chunk in chunks(request, self.chunk_tokens):
            began_s = max(end_s, stamps.prefill_start_s)
            end_s = await self.engine.prefill(end_s, chunk)
            request.prefilled_tokens = chunk.end
            if not chunk.is_all:
                stamps.computed(began_s, end_s, chunk.end - chunk.start)
            if request.is_cancelled:
                break
        request.prefill_busy_s += end_s - start_s
        self.running = None
        self.load_changed()
        drained_s = self.engine.drained_s(end_s)
        if drained_s == end_s:
            self.prefilled(queued, handover, end_s)
        else:
            self.draining.append(queued)
            self.loop.call_at(drained_s, self.drained, queued, handover, drained_s)
        return end_s

    def drained(self, queued: Queued, handover: Delivery | None, end_s: float) -> None:
        """The last chunk has left the last stage; other prompts are in the stages before."""
        self.draining.remove(queued)
        self.prefilled(queued, handover, end_s)

    def prefilled(self, queued: Queued, handover: Delivery | None, end_s: float) -> None:
        """All is computed, or as much as was before a cancel: keep it and hand it over."""
        request = queued.request
        if not request.is_cancelled:
            request.timeline.prefill_end_s = end_s
            self.store(queued, len(request.blocks))
        self.let_go(queued)
        self.on_prefilled(request, handover)

    def take_in(self, request: Request, blocks: Sequence[Block]) -> int:
        """Store blocks of this request's, pinned; how many found room. Where there are real bytes
        `keep` is the worker's own, which knows where they are."""
        return self.pool.store_pinned(blocks)

    def reuse(self, queued: Queued) -> None:
        """Count on what the pool holds now: fetched, or stored by a request before this one."""
        request = queued.request
        held = self.pool.match(request.blocks)
        if self.ssd is not None:
            held = self.ssd.arrived(request.blocks[:held], self.loop.time())
        if held > queued.pinned:
            self.store(queued, held)
        intact = queued.pinned
        if self.ssd is not None:
            intact = self.ssd.intact(request.blocks[:intact])
        request.reused_tokens = reusable_tokens(intact, request.input_tokens, self.block_tokens)
        request.prefilled_tokens = request.reused_tokens

    def let_go(self, queued: Queued) -> None:
        """Unpin the chain; it stays in the pool until room is needed."""
        blocks = queued.request.blocks
        self.pool.unpin(blocks[: queued.pinned])
        self.forget_promises(blocks[queued.pinned :])

    def cancel(self, request: Request) -> None:
        """Nobody waits for it: leave at the next chunk's end (`is_cancelled` is set)."""
        self.changed.set()

    def check_integrity(self) -> None:
        """Idle: nothing promised, nothing pinned, the pool's books balanced."""
        self.pool.check_integrity()
        if self.ssd is not None:
            self.ssd.check_integrity()
        if self.quota is not None:
            self.quota.check_integrity()
        is_idle = not (self.queue or self.running or self.draining)
        assert not (is_idle and self.promised), f"{self.name} promises blocks"
        assert not (is_idle and not self.lending and self.pool.pins), f"{self.name} pins blocks"


def only_token(request: Request) -> None:
    """A request for one token has ended with its prefill: nothing is left to decode."""
    stamps = request.timeline
    stamps.transferred_s = stamps.first_token_s = stamps.prefill_end_s
    stamps.finished_s = stamps.prefill_end_s
    request.produced_tokens = 1
    if request.sink is not None:
        request.sink.tokens(1)
    request.status = "finished"
