"""What is asked of a replica, step by step? Each of its ranks does the same, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import msgspec

from reference_cluster.engines.torch.blocks import KvBlocks, Moves, load_all
from reference_cluster.engines.torch.runner import Runner, Tokens, Work
from reference_cluster.engines.torch.weights import WHOLE, Share
from reference_cluster.request import Sampling


class Begin(msgspec.Struct, array_like=True):
    """A prompt whose first chunk is computed now, with room for `room_tokens` in all."""

    id: int
    prompt: Sequence[int]
    reused_tokens: int
    room_tokens: int
    sampling: Sampling
    slots: Sequence[int] | None  # Of its blocks, where these have bytes.
    held: int  # So many leading ones are complete.
    kept: Sequence[int] = ()  # Or its leading blocks that were kept in pages.


class Step(msgspec.Struct, tag=True, array_like=True):
    """One step: these sequences begin, (id, tokens) of chunks, and who decodes."""

    begins: list[Begin]
    chunks: list[tuple[int, int]]
    decodes: list[int]


class Load(msgspec.Struct, tag=True, array_like=True):
    """A prompt's KV comes from its slots, to be decoded."""

    id: int
    input_tokens: int
    room_tokens: int
    output: Sequence[int]
    sampling: Sampling
    slots: Sequence[int]


class Drop(msgspec.Struct, tag=True, array_like=True):
    """Nothing more will be computed of it."""

    id: int


class Keep(msgspec.Struct, tag=True, array_like=True):
    """The pages of a sequence's leading blocks stay for others."""

    id: int
    blocks: Sequence[int]


class Evict(msgspec.Struct, tag=True, array_like=True):
    """Nobody will ask for these blocks again."""

    blocks: Sequence[int]


class Attach(msgspec.Struct, tag=True, array_like=True):
    """The worker's registered memory, by name."""

    segment: str


Command: TypeAlias = Step | Load | Drop | Keep | Evict | Attach


def nothing() -> None:
    """Who is alone waits for nobody."""


class Sequences:
    """The sequences of one rank: their tokens and pages. Used from one thread.

    Pages are given out in the order of asking, so that they are the same on all ranks. `wait` is
    called when a layer of a chunk is in its slots, and returns when it is on all ranks.
    """

    def __init__(
        self,
        runner: Runner,
        block_tokens: int,
        share: Share = WHOLE,
        wait: Callable[[], None] = nothing,
    ) -> None:
        self.runner = runner
        self.block_tokens = block_tokens
        self.share = share
        self.wait = wait
        self.on_stored: Callable[[int, int], None] = lambda id, layer: None
        self.blocks: KvBlocks | None = None
        self.held: dict[int, Tokens] = {}
        self.kept: dict[int, list[int]] = {}  # The pages of blocks that prompts can begin with.

    def attach(self, buffer: memoryview) -> None:
        model, cache = self.runner.model, self.runner.cache
        self.blocks = KvBlocks(
            buffer, model.config, cache.kv.dtype, self.block_tokens, cache, self.share
        )

    def step(self, command: Step) -> set[int]:
        """Returns whose newest token was computed now."""
        for begin in command.begins:
            self.begin(begin)
        works = [Work(self.held[id], size) for id, size in command.chunks]
        decoding = [self.held[id] for id in command.decodes]
        asking = {id(one) for one in self.runner.run(works, decoding)}
        taking_part = [*(number for number, _ in command.chunks), *command.decodes]
        return {number for number in taking_part if id(self.held[number]) in asking}

    def begin(self, begin: Begin) -> None:
        """Make the sequence; its first chunk loads what is reused."""
        tokens = Tokens(list(begin.prompt), len(begin.prompt), begin.sampling)
        if self.blocks is not None and begin.slots is not None:
            tokens.moves = Moves(
                self.blocks, begin.slots, len(begin.prompt), begin.reused_tokens, begin.held
            )
            tokens.moves.store_layer = partial(self.stored, begin.id)
            tokens.computed = begin.reused_tokens
        for block in begin.kept:
            self.runner.cache.share(self.kept[block])
            tokens.pages += self.kept[block]
            tokens.computed += self.block_tokens
        is_room = self.runner.cache.grow(tokens.pages, begin.room_tokens)
        assert is_room, f"{begin.room_tokens} tokens, {self.runner.cache.free_tokens} free"
        self.held[begin.id] = tokens

    def stored(self, id: int, layer: int) -> None:
        self.wait()
        self.on_stored(id, layer)

    def load(self, load: Load) -> bool:
        """False, and nothing done, where pages run short."""
        assert self.blocks is not None
        # Nobody computes the prompt again: how long it was is enough.
        count = load.input_tokens
        tokens = Tokens([0] * count + [*load.output], count, load.sampling, computed=count)
        if not self.runner.cache.grow(tokens.pages, load.room_tokens):
            return False
        moves = Moves(self.blocks, load.slots, count)
        load_all(moves, tokens.pages, count, self.runner.model.config.layers)
        self.held[load.id] = tokens
        return True

    def keep(self, keep: Keep) -> None:
        """Blocks that were there already stay, and this sequence goes on with those."""
        cache, tokens = self.runner.cache, self.held[keep.id]
        per_block = self.block_tokens // cache.page_tokens
        for number, block in enumerate(keep.blocks):
            part = slice(number * per_block, (number + 1) * per_block)
            mine, kept = tokens.pages[part], self.kept.get(block)
            if kept is None:
                self.kept[block] = mine
                cache.share(mine)
            elif kept != mine:
                cache.share(kept)
                cache.give_back(mine)
                tokens.pages[part] = kept
                self.runner.table = None  # It names the pages that are gone.

    def evict(self, evict: Evict) -> None:
        for block in evict.blocks:
            self.runner.cache.give_back(self.kept.pop(block))

    def drop(self, id: int) -> None:
        tokens = self.held.pop(id, None)
        if tokens is not None:
            self.runner.forget(tokens)
