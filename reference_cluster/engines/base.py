"""What must whoever computes tokens be able to do?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from reference_cluster.policies.batching import Chunk, DecodeBatch
from reference_cluster.spans import Span


class Engine(Protocol):
    """Runs one thing at a time for its instance. `start_s` is when the engine became free for it.

    A real engine ignores `start_s` and measures; a modelled one counts from it, so that late
    wake-ups of a live loop do not add up.
    """

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
