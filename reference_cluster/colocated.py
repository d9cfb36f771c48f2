"""What does a colocated instance do? It prefills and decodes in turns, like vLLM on one node."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reference_cluster.blocks import reusable_tokens
from reference_cluster.config import ColocatedConfig
from reference_cluster.cost_model import CostModel
from reference_cluster.engines.base import Engine
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool, PoolUse, ignore
from reference_cluster.policies.batching import Chunk, DecodeBatch, fill_step
from reference_cluster.policies.scheduling import Placement
from reference_cluster.policies.view import LOST_TOKENS, DecodeView
from reference_cluster.reports import BatchLoad, LoadChanged, nobody
from reference_cluster.request import Block, Request


@dataclass(slots=True)
class Memory:
    """Device memory of one request, in blocks: nameless ones, and the first of its prompt's."""

    reserved: int
    pinned: int


class ColocatedLoad:
    """What waits and runs on a colocated instance: its own books, and those of its mirror."""

    def __init__(self, id: int, cost: CostModel, block_tokens: int, capacity_blocks: int) -> None:
        self.id = id
        self.name = f"colocated-{id}"
        self.cost = cost
        self.block_tokens = block_tokens
        self.capacity_blocks = capacity_blocks
        self.is_shunned = False  # Nobody is to be placed here.
        self.pool: PoolUse
        self.batch = DecodeBatch()
        self.waiting: deque[Request] = deque()
        self.started: deque[Request] = deque()  # In device memory, prompt not yet done.
        self.predicted_s: dict[int, float] = {}  # Prefill time of what waits, by request.
        self.running_end_s = 0.0  # Predicted end of the prefill under way.
        self.load_changed: LoadChanged = nobody  # Who follows the load.

    @property
    def running_blocks(self) -> int:
        """Device memory that nobody can have before somebody ends."""
        raise NotImplementedError

    def blocks_needed(self, request: Request) -> int:
        return -(-request.kv_tokens // self.block_tokens)

    def queue_s(self, now_s: float) -> float:
        if self.is_shunned:
            return float("inf")
        return sum(self.predicted_s.values()) + max(0.0, self.running_end_s - now_s)

    def queue_load(self) -> tuple[float, float]:
        """Seconds of work that wait, and until when it is busy with what runs."""
        if self.is_shunned:
            return float("inf"), 0.0
        return sum(self.predicted_s.values()), self.running_end_s

    def detach(self) -> None:
        """It is lost: whatever still happens to it concerns nobody."""
        self.load_changed = nobody

    tiered_blocks = None

    def read_s(self, request: Request, held_blocks: int, now_s: float) -> float:
        """All that it holds is in device memory."""
        return 0.0

    def follow_promises(self, index: PrefixIndex) -> None:
        """It promises nothing: what waits looks up what is there when it starts."""

    def decode_load(self) -> BatchLoad:
        """What `decode_view` is made of at any time."""
        view = self.decode_view(0.0)
        return *self.batch.load(), view.expected, view.expected_tokens, view.free_tokens

    def decode_view(self, now_s: float) -> DecodeView:
        coming = [*self.waiting, *self.started]
        waiting_blocks = sum(self.blocks_needed(request) for request in self.waiting)
        free_blocks = self.capacity_blocks - self.running_blocks - waiting_blocks
        return DecodeView(
            self.id,
            self.name,
            self.batch.size,
            self.batch.context_tokens_at(now_s, self.cost),
            len(coming),
            sum(request.input_tokens for request in coming),
            LOST_TOKENS if self.is_shunned else free_blocks * self.block_tokens,
        )


class ColocatedInstance(ColocatedLoad):
    """A model replica that does both. Device memory holds running requests and, if prefix caching
    is on, the blocks of earlier ones for as long as there is room.

    *prefill-first*: a waiting prompt stops all decoding until it is prefilled (vLLM v0.5.1).
    *chunked*: every step decodes the whole batch and fills its token budget with prompt.
    """

    def __init__(
        self,
        id: int,
        cost: CostModel,
        engine: Engine,
        pool: BlockPool,
        block_tokens: int,
        config: ColocatedConfig,
        on_end: Callable[[Request], None],
        on_started: Callable[[Request], None] = lambda request: None,
    ) -> None:
        super().__init__(id, cost, block_tokens, pool.capacity)
        self.engine = engine
        self.pool: BlockPool = pool
        self.on_evicted, pool.on_evicted = pool.on_evicted, self.evicted
        self.config = config
        self.on_end = on_end
        self.on_started = on_started  # Its prefill begins; the first token is told to its sink.
        self.loop = asyncio.get_running_loop()
        self.memory: dict[int, Memory] = {}
        self.changed = asyncio.Event()

    @property
    def running_blocks(self) -> int:
        return self.pool.reserved + len(self.pool.pins)

    def detach(self) -> None:
        super().detach()
        self.pool.on_stored = self.on_evicted = ignore

    def evicted(self, blocks: Sequence[Block]) -> None:
        self.engine.evict(blocks)
        self.on_evicted(blocks)

    def accept(self, request: Request, placement: Placement) -> None:
        self.waiting.append(request)
        request.timeline.fetched_s = request.timeline.placed_s
        predicted_s = self.cost.prefill_s(request.input_tokens, placement.reused_tokens)
        self.predicted_s[request.id] = predicted_s
        self.load_changed()
        self.changed.set()

    async def run(self) -> None:
        """Prefill and decode for ever."""
        free_s = self.loop.time()
        while True:
            self.remove_cancelled()
            self.start_waiting(free_s)
            self.changed.clear()
            self.load_changed()
            if self.started and self.config.batching == "chunked":
                free_s = await self.mixed_step(free_s)
            elif self.started:
                free_s = await self.prefill(free_s)
            elif self.batch.size:
                free_s = await self.decode(free_s)
            else:
                await self.changed.wait()
                free_s = self.loop.time()

    def start_waiting(self, start_s: float) -> None:
        """Give device memory to waiting requests, in order, while all they need fits."""
        while self.waiting and self.batch.size + len(self.started) < self.config.batch_max:
            if self.config.batching == "prefill-first" and self.started:
                return
            request = self.waiting[0]
            needed = self.blocks_needed(request)
            held = self.reuse(request)
            if not self.pool.can_make_room(needed - held):
                self.pool.unpin(request.blocks[:held])
                return
            self.waiting.popleft()
            del self.predicted_s[request.id]
            self.pool.reserve(needed - held)
            self.memory[request.id] = Memory(needed - held, held)
            predicted_s = self.cost.prefill_s(request.input_tokens, request.reused_tokens)
            self.running_end_s = max(start_s, self.running_end_s) + predicted_s
            request.timeline.prefill_start_s = max(start_s, request.timeline.fetched_s or start_s)
            self.started.append(request)
            self.on_started(request)

    def reuse(self, request: Request) -> int:
        """Pin the cached prefix; returns its blocks."""
        if not self.config.prefix_caching:
            return 0
        held = self.pool.match(request.blocks)
        if self.engine.keeps_whole_blocks:
            held = min(held, (request.input_tokens - 1) // self.block_tokens)
        self.pool.pin(request.blocks[:held])
        reused = reusable_tokens(held, request.input_tokens, self.block_tokens)
        request.reused_tokens = request.prefilled_tokens = reused
        return held

    async def prefill(self, start_s: float) -> float:
        """One whole prompt, while the batch waits."""
        request = self.started[0]
        chunk = Chunk(request, request.prefilled_tokens, request.input_tokens, is_first=True)
        end_s = await self.engine.prefill(start_s, chunk)
        request.prefill_busy_s += end_s - start_s
        self.prefilled([chunk], start_s, end_s)
        return end_s

    async def decode(self, start_s: float) -> float:
        self.batch.span_start_s = start_s
        span = await self.engine.decode(start_s, self.batch, self.changed)
        for request in self.batch.apply(span):
            self.finish(request, span.end_s)
        return span.end_s

    async def mixed_step(self, start_s: float) -> float:
        """One step: the whole batch decodes, and prompts fill what is left of the token budget.

        The prefills are charged with what the step takes longer than its decoding alone would.
        """
        budget_tokens = self.config.step_tokens_max - self.batch.size
        filled = fill_step(iter(self.started), budget_tokens)
        decoding_s = 0.0
        if self.batch.size:
            decoding_s = self.cost.step_s(self.batch.size, self.batch.context_tokens)
        span = await self.engine.mixed(start_s, self.batch, filled)
        computed = sum(chunk.end - chunk.start for chunk in filled)
        for chunk in filled:
            share = (chunk.end - chunk.start) / computed
            chunk.request.prefill_busy_s += (span.end_s - start_s - decoding_s) * share
        if self.batch.size:
            for request in self.batch.apply(span):
                self.finish(request, span.end_s)
        self.prefilled(filled, start_s, span.end_s)
        return span.end_s

    def prefilled(self, filled: list[Chunk], start_s: float, end_s: float) -> None:
        """Account for computed chunks; complete prompts give their first token and join."""
        for chunk in filled:
            request = chunk.request
            request.prefilled_tokens = chunk.end
            if not chunk.is_all:
                request.timeline.computed(start_s, end_s, chunk.end - chunk.start)
            if chunk.end < request.input_tokens or request.is_cancelled:
                continue
            self.started.remove(request)
            self.keep_for_others(request)
            stamps = request.timeline
            stamps.prefill_end_s = stamps.transferred_s = stamps.first_token_s = end_s
            request.produced_tokens = 1
            if request.sink is not None:
                request.sink.tokens(1)
            if request.output_tokens == 1 or request.has_stopped:
                self.finish(request, end_s)
            else:
                self.batch.join(request, end_s)

    def finish(self, request: Request, end_s: float) -> None:
        self.leave(request)
        if request.is_cancelled:
            return
        request.status = "finished"
        request.timeline.finished_s = end_s
        self.on_end(request)

    def keep_for_others(self, request: Request) -> None:
        """With prefix caching a computed prompt can be reused at once: name its blocks."""
        if self.config.prefix_caching:
            memory, kept = self.memory[request.id], len(request.blocks)
            if self.engine.keeps_whole_blocks:
                kept = request.input_tokens // self.block_tokens
            fresh = request.blocks[memory.pinned : kept]
            self.pool.release(len(fresh))
            stored = self.pool.store_pinned(fresh)
            assert stored == len(fresh), "the room was just released"
            memory.reserved -= stored
            memory.pinned += stored
            self.engine.keep(request, request.blocks[:kept])

    def leave(self, request: Request) -> None:
        """Give its device memory back; named blocks stay for others while there is room."""
        memory = self.memory.pop(request.id)
        self.engine.forget(request)
        self.pool.release(memory.reserved)
        self.pool.unpin(request.blocks[: memory.pinned])

    def remove_cancelled(self) -> None:
        gone = [one.request for one in self.batch.members.values() if one.request.is_cancelled]
        for request in gone:
            self.batch.remove(request)
        for request in [one for one in self.started if one.is_cancelled]:
            self.started.remove(request)
            gone.append(request)
        for request in gone:
            self.leave(request)

    def cancel(self, request: Request) -> None:
        """The client has gone: leave at the next step boundary (`is_cancelled` is set)."""
        if request in self.waiting:
            self.waiting.remove(request)
            del self.predicted_s[request.id]
            self.load_changed()
        self.changed.set()

    def check_integrity(self) -> None:
        self.pool.check_integrity()
        inside = len(self.batch.members) + len(self.started)
        assert inside == len(self.memory), f"{self.name} {inside} != {len(self.memory)}"
        reserved = sum(memory.reserved for memory in self.memory.values())
        assert self.pool.reserved == reserved, f"{self.name} {self.pool.reserved} != {reserved}"
