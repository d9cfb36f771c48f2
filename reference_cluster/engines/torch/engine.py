"""How does an instance run a real model? Steps go to a thread of their own, one after another.

The instance's loop never waits for a computation, and whatever touches pages or sequences does so
in that thread, in the order in which it was asked for.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from reference_cluster.config import EngineConfig
from reference_cluster.engines.base import OnLayer
from reference_cluster.engines.torch.blocks import KvBlocks, Moves, load_all
from reference_cluster.engines.torch.replica import ReplicaConfig, build_runner
from reference_cluster.engines.torch.runner import Tokens, Work
from reference_cluster.engines.torch.sampling import has_stopped
from reference_cluster.engines.torch.tokenizer import speaker
from reference_cluster.policies.batching import Chunk, DecodeBatch
from reference_cluster.request import Request
from reference_cluster.spans import Span


def replica_of(config: EngineConfig) -> ReplicaConfig:
    return ReplicaConfig(
        config.model,
        config.seed,
        config.dtype,
        config.device,
        config.kv_tokens,
        config.page_tokens,
        native=config.native,
    )


Result = TypeVar("Result")


class TorchEngine:
    """The Engine Protocol over a Runner.

    A request's pages are reserved whole when it comes, as the instances reserve device memory, so
    that running out of them is a matter of admission: it waits, with its KV in the worker's slots.
    """

    def __init__(self, config: ReplicaConfig, block_tokens: int) -> None:
        torch.set_num_threads(1)
        self.runner = build_runner(config)
        self.block_tokens = block_tokens
        self.say = speaker(config.directory)  # The text in which stop strings are found.
        self.loop = asyncio.get_running_loop()
        self.thread = ThreadPoolExecutor(1, "torch engine")
        self.sequences: dict[int, Tokens] = {}
        self.blocks: KvBlocks | None = None
        self.slots: dict[int, Sequence[int]] = {}  # Of the prompts under way.
        self.on_layer: OnLayer | None = None
        self.freed = asyncio.Event()
        self.lag_s_max = 0.0  # Nothing is modelled: steps take what they take.
        gc.freeze()  # Weights and modules never become garbage: steps need not look at them.

    @property
    def block_bytes(self) -> int:
        model = self.runner.model
        return self.block_tokens * model.config.kv_bytes(self.runner.cache.kv.dtype.itemsize)

    def attach(self, buffer: memoryview) -> None:
        """The worker's registered memory, in slots of one block."""
        model, cache = self.runner.model, self.runner.cache
        self.blocks = KvBlocks(buffer, model.config, cache.kv.dtype, self.block_tokens, cache)

    async def submit(self, work: Callable[[], Result]) -> Result:
        return await self.loop.run_in_executor(self.thread, work)

    # ---- prefill -----------------------------------------------------------------------------

    def begin(self, request: Request, slots: Sequence[int]) -> None:
        """A prefill begins: its blocks lie, or will lie, in these slots."""
        self.slots[request.id] = slots

    async def prefill(self, start_s: float, chunk: Chunk) -> float:
        # Without slots for it (memory ran short) the request is given up already.
        if self.blocks is None or chunk.request.id in self.slots:
            await self.step([chunk], [])
        return self.loop.time()

    def drained_s(self, end_s: float) -> float:
        return end_s

    def first_chunk(self, chunk: Chunk) -> Tokens:
        """Make the sequence; its first chunk loads what is reused."""
        request = chunk.request
        tokens = Tokens(list(request.prompt), request.input_tokens, request.sampling)
        slots = self.slots.get(request.id)
        if self.blocks is not None and slots is not None:
            tokens.moves = Moves(self.blocks, slots, request.input_tokens, request.reused_tokens)
            tokens.computed = request.reused_tokens
        # Only what is decoded here needs room for its answer.
        answer = request.output_tokens if self.blocks is None else 1
        is_room = self.runner.cache.grow(tokens.pages, request.input_tokens + answer)
        assert is_room, f"{request.input_tokens} tokens, {self.runner.cache.free_tokens} free"
        self.sequences[request.id] = tokens
        return tokens

    def work_of(self, chunk: Chunk) -> Work:
        tokens = self.sequences.get(chunk.request.id) or self.first_chunk(chunk)
        if tokens.moves is not None:
            tokens.moves.store_layer = partial(self.stored, chunk)
        return Work(tokens, chunk.end - chunk.start)

    def stored(self, chunk: Chunk, layer: int) -> None:
        """In the engine's thread: the chunk's bytes of this layer are in their slots."""
        if self.on_layer is not None:
            self.loop.call_soon_threadsafe(self.on_layer, chunk, layer)

    # ---- decode ------------------------------------------------------------------------------

    async def take_in(self, request: Request, slots: Sequence[int]) -> None:
        """Copy a request's KV from its slots into pages, when there are enough of them."""
        while not request.is_cancelled:
            self.freed.clear()
            if await self.submit(partial(self.load, request, slots)):
                if request.is_cancelled:
                    self.forget(request)
                return
            await self.freed.wait()

    def load(self, request: Request, slots: Sequence[int]) -> bool:
        assert self.blocks is not None
        count = request.input_tokens
        # Nobody computes the prompt again: how long it was is enough.
        ids = [0] * count + request.output
        tokens = Tokens(ids, count, request.sampling, computed=count)
        if not self.runner.cache.grow(tokens.pages, request.kv_tokens):
            return False
        moves = Moves(self.blocks, slots, count)
        load_all(moves, tokens.pages, count, self.runner.model.config.layers)
        self.sequences[request.id] = tokens
        return True

    async def decode(self, start_s: float, batch: DecodeBatch, until: asyncio.Event) -> Span:
        return await self.mixed(start_s, batch, [])

    async def mixed(self, start_s: float, batch: DecodeBatch, chunks: Sequence[Chunk]) -> Span:
        decodes = [member.request for member in batch.members.values()]
        await self.step(chunks, decodes)
        end_s = self.loop.time()
        stopped = [request.id for request in decodes if request.has_stopped]
        return Span(start_s, 1, end_s - start_s, 0.0, end_s, stopped)

    # ---- both --------------------------------------------------------------------------------

    async def step(self, chunks: Sequence[Chunk], decodes: Sequence[Request]) -> None:
        """One step of the model; its tokens go to their requests."""
        given = await self.submit(partial(self.run, chunks, decodes))
        for request, token, is_last in given:
            request.output.append(token)
            request.has_stopped = is_last

    def run(
        self, chunks: Sequence[Chunk], decodes: Sequence[Request]
    ) -> list[tuple[Request, int, bool]]:
        """In the engine's thread: tokens, and whether one ends its answer by what it says."""
        works = [self.work_of(chunk) for chunk in chunks]
        decoding = [self.sequences[request.id] for request in decodes]
        asking = {id(one) for one in self.runner.run(works, decoding)}
        requests = [*(chunk.request for chunk in chunks), *decodes]
        sequences = [*(work.tokens for work in works), *decoding]
        pairs = zip(requests, sequences, strict=True)
        return [
            (request, one.ids[-1], self.is_last(request, one))
            for request, one in pairs
            if id(one) in asking
        ]

    def is_last(self, request: Request, tokens: Tokens) -> bool:
        """Only strings are looked for in the whole answer, which began before a resumed one."""
        wish, ends = request.sampling, self.runner.model.config.end_tokens
        said = [*request.said, *tokens.produced] if wish.stop else tokens.ids[-1:]
        return has_stopped(said, wish, ends, self.say)

    def forget(self, request: Request) -> None:
        """It ends here, one way or the other: its pages go back after the step under way."""
        self.thread.submit(self.drop, request.id)

    def drop(self, id: int) -> None:
        tokens = self.sequences.pop(id, None)
        self.slots.pop(id, None)
        if tokens is not None:
            self.runner.forget(tokens)
        self.loop.call_soon_threadsafe(self.freed.set)

    def close(self) -> None:
        """Wait for the step under way: it may write to registered memory, which is let go here."""
        self.thread.shutdown(cancel_futures=True)
        self.sequences.clear()
        self.blocks = None
