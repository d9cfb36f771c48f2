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
from typing import Any, TypeVar

import torch

from reference_cluster.config import EngineConfig
from reference_cluster.engines.base import OnLayer
from reference_cluster.engines.torch.ranks import first_rank
from reference_cluster.engines.torch.replica import ReplicaConfig
from reference_cluster.engines.torch.runner import Runner, Tokens
from reference_cluster.engines.torch.sampling import has_stopped
from reference_cluster.engines.torch.sequences import (
    Attach,
    Begin,
    Drop,
    Evict,
    Keep,
    Load,
    Step,
)
from reference_cluster.engines.torch.tokenizer import speaker
from reference_cluster.policies.batching import Chunk, DecodeBatch
from reference_cluster.request import Block, Request
from reference_cluster.spans import Span
from reference_cluster.transports.bytes import Segment


def replica_of(config: EngineConfig) -> ReplicaConfig:
    return ReplicaConfig(
        config.model,
        config.seed,
        config.dtype,
        config.device,
        config.kv_tokens,
        config.page_tokens,
        config.tensor_parallel,
        config.native,
    )


def keys(blocks: Sequence[Block]) -> Sequence[int]:
    """Those of a live cluster are integers."""
    return blocks  # type: ignore[return-value]


Result = TypeVar("Result")


class TorchEngine:
    """The Engine Protocol over a Runner.

    A request's pages are reserved whole when it comes, as the instances reserve device memory, so
    that running out of them is a matter of admission: it waits, with its KV in the worker's slots.
    """

    keeps_whole_blocks = True  # Pages are shared, and what is shared is not written.

    def __init__(self, config: ReplicaConfig, block_tokens: int) -> None:
        torch.set_num_threads(1)
        self.sequences, self.followers = first_rank(config, block_tokens)
        self.sequences.on_stored = self.stored
        self.block_tokens = block_tokens
        self.say = speaker(config.directory)  # The text in which stop strings are found.
        self.loop = asyncio.get_running_loop()
        self.thread = ThreadPoolExecutor(1, "torch engine")
        # Of the prompts under way: their slots, and how many of them are complete.
        self.slots: dict[int, tuple[Sequence[int], int]] = {}
        self.computing: dict[int, Chunk] = {}  # In the step under way.
        self.on_layer: OnLayer | None = None
        self.freed = asyncio.Event()
        self.lag_s_max = 0.0  # Nothing is modelled: steps take what they take.
        gc.freeze()  # Weights and modules never become garbage: steps need not look at them.

    @property
    def runner(self) -> Runner:
        return self.sequences.runner

    @property
    def block_bytes(self) -> int:
        model = self.runner.model
        return self.block_tokens * model.config.kv_bytes(self.runner.cache.kv.dtype.itemsize)

    def attach(self, segment: Segment) -> None:
        self.followers.tell(Attach(segment.name))
        self.sequences.attach(segment.buffer)

    @property
    def has_blocks(self) -> bool:
        return self.sequences.blocks is not None

    async def submit(self, work: Callable[[], Result]) -> Result:
        return await self.loop.run_in_executor(self.thread, work)

    # ---- prefill -----------------------------------------------------------------------------

    def begin(self, request: Request, slots: Sequence[int], held: int) -> None:
        """A prefill begins: its blocks lie, or will lie, in these slots."""
        self.slots[request.id] = slots, held

    async def prefill(self, start_s: float, chunk: Chunk) -> float:
        # Without slots for it (memory ran short) the request is given up already.
        if not self.has_blocks or chunk.request.id in self.slots:
            await self.step([chunk], [])
        return self.loop.time()

    def drained_s(self, end_s: float) -> float:
        return end_s

    def begun(self, request: Request) -> Begin:
        """In the engine's thread: a prompt's first chunk is about to be computed."""
        slots, held = self.slots.get(request.id, (None, 0))
        # Only what is decoded here needs room for its answer.
        answer = 1 if self.has_blocks else request.output_tokens
        room_tokens = request.input_tokens + answer
        prompt, reused = request.prompt, request.reused_tokens
        kept = () if self.has_blocks else keys(request.blocks[: reused // self.block_tokens])
        return Begin(request.id, prompt, reused, room_tokens, request.sampling, slots, held, kept)

    def stored(self, id: int, layer: int) -> None:
        """In the engine's thread: the chunk's bytes of this layer are in their slots."""
        if self.on_layer is not None:
            self.loop.call_soon_threadsafe(self.on_layer, self.computing[id], layer)

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
        asked = request.input_tokens, request.kv_tokens, request.output, request.sampling
        load = Load(request.id, *asked, slots)
        self.followers.tell(load)
        return self.sequences.load(load)

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
        requests = [*(chunk.request for chunk in chunks), *decodes]
        self.computing = {chunk.request.id: chunk for chunk in chunks}
        known = self.sequences.held
        step = Step(
            [self.begun(chunk.request) for chunk in chunks if chunk.request.id not in known],
            [(chunk.request.id, chunk.end - chunk.start) for chunk in chunks],
            [request.id for request in decodes],
        )
        self.followers.tell(step)
        asking = self.sequences.step(step)
        given = [(request, known[request.id]) for request in requests if request.id in asking]
        return [(request, one.ids[-1], self.is_last(request, one)) for request, one in given]

    def is_last(self, request: Request, tokens: Tokens) -> bool:
        """Only strings are looked for in the whole answer, which began before a resumed one."""
        wish, ends = request.sampling, self.runner.model.config.end_tokens
        said = [*request.said, *tokens.produced] if wish.stop else tokens.ids[-1:]
        return has_stopped(said, wish, ends, self.say)

    def keep(self, request: Request, blocks: Sequence[Block]) -> None:
        self.thread.submit(self.tell, Keep(request.id, keys(blocks)), self.sequences.keep)

    def evict(self, blocks: Sequence[Block]) -> None:
        self.thread.submit(self.tell, Evict(keys(blocks)), self.sequences.evict)

    def tell(self, command: Any, do: Callable[[Any], None]) -> None:
        self.followers.tell(command)
        do(command)

    def forget(self, request: Request) -> None:
        """It ends here, one way or the other: its pages go back after the step under way."""
        self.thread.submit(self.drop, request.id)

    def drop(self, id: int) -> None:
        self.slots.pop(id, None)
        self.followers.tell(Drop(id))
        self.sequences.drop(id)
        self.loop.call_soon_threadsafe(self.freed.set)

    def close(self) -> None:
        """Wait for the step under way: it may write to registered memory, which is let go here."""
        self.thread.shutdown(cancel_futures=True)
        self.followers.close()
        self.sequences.held.clear()
        self.sequences.blocks = None
