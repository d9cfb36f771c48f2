"""When would an engine be done? It sleeps for as long as the cost model says, on either clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from reference_cluster.cost_model import CostModel
from reference_cluster.engines.base import OnLayer
from reference_cluster.policies.batching import Chunk, DecodeBatch
from reference_cluster.request import Block, Request
from reference_cluster.spans import Span
from reference_cluster.transports.bytes import Segment


class ModelledEngine:
    """An engine without a GPU. `steps_max=1` gives the tokens of each step as they come (live)."""

    keeps_whole_blocks = False

    def __init__(self, cost: CostModel, steps_max: int | None = None) -> None:
        self.cost = cost
        self.steps_max = steps_max
        self.loop = asyncio.get_running_loop()
        self.on_layer: OnLayer | None = None  # Where KV has bytes: they are written then.
        self.lag_s_max = 0.0  # How late the loop woke us at worst: 0 in virtual time.
        # Of a pipeline: when each stage after the first will have done all that has entered.
        self.stages_free_s = [0.0] * (cost.stages - 1)

    async def prefill(self, start_s: float, chunk: Chunk) -> float:
        end_s = start_s + self.chunk_s(chunk)
        if self.on_layer is not None:
            await self.compute(start_s, end_s, chunk, self.on_layer)
        else:
            await self.sleep_until(end_s)
        if self.stages_free_s:
            self.flow_on(chunk, end_s)
        return end_s

    async def compute(self, start_s: float, end_s: float, chunk: Chunk, on_layer: OnLayer) -> None:
        """Layer by layer: each takes an equal share of the time."""
        layers = self.cost.profile.layers
        for layer in range(layers):
            await self.sleep_until(start_s + (end_s - start_s) * (layer + 1) / layers)
            on_layer(chunk, layer)

    def flow_on(self, chunk: Chunk, left_s: float) -> None:
        """The chunk leaves the first stage and goes through the others, behind those before it."""
        stage_s = self.cost.compute_s(chunk.start, chunk.end) / self.cost.stages
        for stage, free_s in enumerate(self.stages_free_s):
            left_s = max(left_s, free_s) + stage_s
            self.stages_free_s[stage] = left_s

    def drained_s(self, end_s: float) -> float:
        return self.stages_free_s[-1] if self.stages_free_s else end_s

    def chunk_s(self, chunk: Chunk) -> float:
        """In the first stage. The chunks of a prompt add up to `CostModel.occupied_s`."""
        seconds = self.cost.compute_s(chunk.start, chunk.end) / self.cost.stages
        if chunk.is_first:
            seconds += self.cost.base_s + self.cost.reused_token_s * chunk.request.reused_tokens
        return seconds

    async def decode(self, start_s: float, batch: DecodeBatch, until: asyncio.Event) -> Span:
        size, context_tokens = batch.size, batch.context_tokens
        steps = batch.steps_until_leave
        if self.steps_max is not None:
            steps = min(steps, self.steps_max)
        end_s = start_s + self.cost.span_s(size, context_tokens, steps)
        if steps == 1:
            await self.sleep_until(end_s)
        else:
            timer = self.loop.call_at(end_s, until.set)
            await until.wait()
            timer.cancel()
            elapsed_s = self.loop.time() - start_s
            # A change ends the span at the next step boundary.
            done = math.ceil(self.cost.steps_within(size, context_tokens, elapsed_s) - 1e-9)
            if done < steps:
                steps = max(1, done)
                end_s = start_s + self.cost.span_s(size, context_tokens, steps)
            if self.loop.time() < end_s:
                await self.sleep_until(end_s)
        first_gap_s = self.cost.step_s(size, context_tokens)
        return Span(start_s, steps, first_gap_s, self.cost.growth_s(size), end_s)

    async def mixed(self, start_s: float, batch: DecodeBatch, chunks: Sequence[Chunk]) -> Span:
        compute_s = sum(self.cost.compute_s(chunk.start, chunk.end) for chunk in chunks)
        step_s = self.cost.mixed_step_s(batch.size, batch.context_tokens, compute_s)
        step_s += self.cost.caching_s * sum(chunk.is_first for chunk in chunks)
        end_s = start_s + step_s
        await self.sleep_until(end_s)
        return Span(start_s, 1, step_s, 0.0, end_s)

    def attach(self, segment: Segment) -> None:
        """Bytes are a pattern, which the carrier writes."""

    def begin(self, request: Request, slots: Sequence[int], held: int) -> None:
        """Nothing is read from slots: time alone is modelled."""

    async def take_in(self, request: Request, slots: Sequence[int]) -> None:
        """Device memory is counted by the instance; there are no pages to fill."""

    def keep(self, request: Request, blocks: Sequence[Block]) -> None:
        """The instance's pool knows."""

    def evict(self, blocks: Sequence[Block]) -> None:
        """The instance's pool knows."""

    def forget(self, request: Request) -> None:
        """Nothing was remembered."""

    def close(self) -> None:
        """Nothing is open."""

    async def sleep_until(self, end_s: float) -> None:
        """Sleep to a point of the loop's clock, at least for one turn of the loop."""
        woken = self.loop.create_future()
        self.loop.call_at(end_s, wake, woken)
        await woken
        self.lag_s_max = max(self.lag_s_max, self.loop.time() - end_s)


def wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
