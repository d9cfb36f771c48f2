"""How does KV become bytes that others can read? Whole blocks, layer by layer, without pages.

A block's bytes are [layer][KV head][K or V][token][dim] in the model's dtype. They do not depend
on the page size nor, each rank having a range of heads, on the degree of tensor parallelism: a
prefill and a decode instance may differ in both. They do depend on the order of dims within a head
(weights.py), so only engines of this package can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from reference_cluster.engines.torch.architecture import LlamaConfig
from reference_cluster.engines.torch.pages import PagedCache
from reference_cluster.engines.torch.weights import WHOLE, Share
from reference_cluster.errors import ConfigError


class KvBlocks:
    """Slots of registered memory as a tensor; slot i holds the bytes of one block of tokens."""

    def __init__(
        self,
        buffer: memoryview | bytearray,
        config: LlamaConfig,
        dtype: torch.dtype,
        block_tokens: int,
        cache: PagedCache,
        share: Share = WHOLE,
    ) -> None:
        if block_tokens % cache.page_tokens:
            raise ConfigError(
                f"block_tokens {block_tokens} is not a multiple of page_tokens "
                f"{cache.page_tokens}; choose another page_tokens"
            )
        self.block_tokens = block_tokens
        self.cache = cache
        self.block_bytes = block_tokens * config.kv_bytes(dtype.itemsize)
        slots = len(buffer) // self.block_bytes
        whole = torch.frombuffer(
            buffer, dtype=dtype, count=slots * self.block_bytes // dtype.itemsize
        )
        shape = (slots, config.layers, config.kv_heads, 2, block_tokens, config.head_dim)
        self.slots = whole.view(shape).chunk(share.ranks, 2)[share.rank]

    def load(self, layer: int, slots: Sequence[int], pages: Sequence[int], tokens: int) -> None:
        """Copy the first `tokens` tokens of a chain of blocks into the pages of a sequence."""
        cache, per_block = self.cache, self.block_tokens // self.cache.page_tokens
        for number in range(-(-tokens // self.block_tokens)):
            start = number * per_block
            count = min(per_block, cache.pages_for(tokens) - start)
            block = self.slots[slots[number], layer]  # [KV head, K or V, token, dim]
            paged = block.unflatten(2, (per_block, cache.page_tokens))[:, :, :count]
            target = torch.tensor(pages[start : start + count], device=cache.kv.device)
            source = paged.permute(1, 2, 0, 3, 4).to(cache.kv.device)
            cache.kv[layer].index_copy_(1, target, source)

    def save(
        self, layer: int, slots: Sequence[int], pages: Sequence[int], start: int, end: int
    ) -> None:
        """Copy the tokens [start, end) of a sequence from its pages into its blocks."""
        block_tokens, page_tokens = self.block_tokens, self.cache.page_tokens
        for number in range(start // block_tokens, -(-end // block_tokens)):
            first = max(start, number * block_tokens)
            past = min(end, (number + 1) * block_tokens)
            low = first // page_tokens
            held = torch.tensor(pages[low : -(-past // page_tokens)], device=self.cache.kv.device)
            taken = self.cache.kv[layer].index_select(1, held)  # [K or V, page, KV head, ...]
            tokens = taken.permute(2, 0, 1, 3, 4).flatten(2, 3)
            skipped = first - low * page_tokens
            target = self.slots[slots[number], layer, :, :, first % block_tokens :]
            target[:, :, : past - first] = tokens[:, :, skipped : skipped + past - first]


def nothing(layer: int) -> None:
    """What happens around a layer by default."""


@dataclass(slots=True)
class Moves:
    """Which blocks a prompt reads and writes; the hooks around each layer of its chunks.

    Before layer i is computed for the first time `wait_layer(i)` returns when the reused blocks'
    bytes of that layer are in their slots; after it `store_layer(i)` is told that the chunk's are.
    """

    blocks: KvBlocks
    slots: Sequence[int]  # One a block of the prompt, in order.
    tokens: int  # Of the prompt.
    reused_tokens: int = 0
    held: int = 0  # Of the blocks so many are complete, and read by others: they are not written.
    is_storing: bool = True
    wait_layer: Callable[[int], None] = nothing
    store_layer: Callable[[int], None] = nothing

    def before(self, layer: int, pages: Sequence[int], start: int) -> None:
        if self.reused_tokens and start == self.reused_tokens:
            self.wait_layer(layer)
            self.blocks.load(layer, self.slots, pages, self.reused_tokens)

    def after(self, layer: int, pages: Sequence[int], start: int, end: int) -> None:
        if self.is_storing:
            first = max(start, self.held * self.blocks.block_tokens)
            self.blocks.save(layer, self.slots, pages, first, min(end, self.tokens))
            self.store_layer(layer)


def load_all(moves: Moves, pages: Sequence[int], tokens: int, layers: int) -> None:
    """Bring a whole prompt's KV in, as a decode instance does before its first step."""
    for layer in range(layers):
        moves.wait_layer(layer)
        moves.blocks.load(layer, moves.slots, pages, tokens)
