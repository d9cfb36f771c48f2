"""What must whoever computes tokens be able to do?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from reference_cluster.policies.batching import Chunk, DecodeBatch
from reference_cluster.request import Block, Request
from reference_cluster.spans import Span
from reference_cluster.transports.bytes import Segment

OnLayer = Callable[[Chunk, int], None]  # This chunk's KV of this layer is computed.


class Engine(Protocol):
    """Runs one thing at a time for its instance. `start_s` is when the engine became free for it.

    A real engine ignores `start_s` and measures; a modelled one counts from it, so that late
    wake-ups of a live loop do not add up.
    """

    # Are prompts in device memory kept as whole blocks only, and their last token always computed
    # in a block of its own?
    keeps_whole_blocks: bool

    async def prefill(self, start_s: float, chunk: Chunk) -> float:
        """Compute one chunk; returns when the next can begin."""

    def drained_s(self, end_s: float) -> float:
        """When the chunk whose `prefill` returned `end_s` last has all its layers computed.

        `end_s` itself, unless the engine is a pipeline whose first stage takes chunks.
        """

    async def decode(self, start_s: float, batch: DecodeBatch, until: asyncio.Event) -> Span:
        """Run whole steps until a member has all its tokens or, at a step's end, `until` is set.

        An engine may always return earlier, after any whole number of steps from one on.
        """

    async def mixed(self, start_s: float, batch: DecodeBatch, chunks: Sequence[Chunk]) -> Span:
        """Run one step that decodes the batch and computes the chunks."""

    def attach(self, segment: Segment) -> None:
        """The worker's registered memory, in slots of one block."""

    def begin(self, request: Request, slots: Sequence[int], held: int) -> None:
        """A prefill begins whose blocks have bytes: they lie, or will lie, in these slots.

        The first `held` are complete, and others may be reading them: they stay as they are.
        """

    async def take_in(self, request: Request, slots: Sequence[int]) -> None:
        """A request to decode has its KV in these slots; returns when they are not needed."""

    def keep(self, request: Request, blocks: Sequence[Block]) -> None:
        """These leading blocks of a prompt stay in device memory for others, until `evict`."""

    def evict(self, blocks: Sequence[Block]) -> None:
        """Nobody will ask for these again."""

    def forget(self, request: Request) -> None:
        """Nothing more will be computed of it, here."""

    def close(self) -> None:
        """Nothing more will be computed."""
