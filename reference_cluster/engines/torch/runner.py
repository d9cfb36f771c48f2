"""What does one step do? Sequences to tensors, one forward pass, and the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from reference_cluster.engines.torch.attention import DecodeTable, TorchTable
from reference_cluster.engines.torch.blocks import Moves
from reference_cluster.engines.torch.llama import ChunkSpan, Llama, Pass
from reference_cluster.engines.torch.native import GROUP_MAX, NativeTable, compiled, is_for
from reference_cluster.engines.torch.sampling import choose
from reference_cluster.errors import ClusterError
from reference_cluster.request import GREEDY, Sampling


class TooLongError(ClusterError):
    """A prompt and its answer do not fit the model's context."""


@dataclass(slots=True, eq=False)
class Tokens:
    """A request in the engine: prompt and answer so far; `computed` of them have KV in `pages`."""

    ids: list[int]
    prompt_tokens: int
    sampling: Sampling = GREEDY
    moves: Moves | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def produced(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


class Work(NamedTuple):
    """The next `size` uncomputed tokens of a sequence."""

    tokens: Tokens
    size: int


class Runner:
    """Runs steps on one model replica. Whoever calls has made sure that the pages suffice."""

    def __init__(self, model: Llama, is_native: bool = True) -> None:
        self.model = model
        self.cache = model.cache
        is_native = is_native and is_for(self.cache) and model.heads // model.kv_heads <= GROUP_MAX
        self.native = compiled(self.cache.head_dim) if is_native else None
        self.table: DecodeTable | None = None
        self.members: list[Tokens] = []  # Of the table.
        self.steps = 0

    def run(self, chunks: Sequence[Work], decodes: Sequence[Tokens]) -> list[Tokens]:
        """Compute chunks and one step of each decode; append a token to those it returns.

        A chunk gives a token if it is the last of its sequence.
        """
        spans = [
            ChunkSpan(one.computed, one.computed + size, one.pages, one.moves)
            for one, size in chunks
        ]
        logits_of = [one for one, size in chunks if one.computed + size == len(one.ids)]
        work = self.prepare(spans, [one for one, _ in chunks], decodes)
        asking = [*logits_of, *decodes]
        with torch.inference_mode():
            logits = self.model.forward(work)
        for (one, _), span in zip(chunks, spans, strict=True):
            one.computed = span.end
        for one in decodes:
            one.computed += 1
        if asking:
            chosen = choose(
                logits, [one.sampling for one in asking], [len(one.ids) for one in asking]
            )
            for one, token in zip(asking, chosen, strict=True):
                one.ids.append(token)
        self.steps += 1
        return asking

    def prepare(
        self, spans: Sequence[ChunkSpan], owners: Sequence[Tokens], decodes: Sequence[Tokens]
    ) -> Pass:
        """The step as tensors. Rows of chunks come first, decodes after them."""
        cache, device = self.cache, self.model.device
        tokens: list[int] = []
        positions: list[int] = []
        first_rows: list[int] = []
        wanted: list[int] = []
        past_pages: list[torch.Tensor | None] = []
        for span, one in zip(spans, owners, strict=True):
            tokens += one.ids[span.start : span.end]
            positions += range(span.start, span.end)
            first_rows += cache.first_rows(span.pages, span.start, span.end)
            if span.end == len(one.ids):
                wanted.append(len(tokens) - 1)
            held = span.pages[: cache.pages_for(span.start)] if span.start else None
            past_pages.append(None if held is None else torch.tensor(held, device=device))
        for one in decodes:
            at = len(one.ids) - 1
            wanted.append(len(tokens))
            tokens.append(one.ids[at])
            positions.append(at)
            first_rows.append(cache.first_row(one.pages[at // cache.page_tokens], at))
        if decodes:
            self.update_table(decodes)
        rows = None
        if len(wanted) < len(tokens):
            rows = torch.tensor(wanted, dtype=torch.long, device=device)
        return Pass(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(first_rows, device=device),
            spans,
            self.table if decodes else None,
            rows,
            past_pages,
        )

    def update_table(self, decodes: Sequence[Tokens]) -> None:
        """Go on with the last step's table, unless a member or a page has come or gone."""
        size = self.cache.page_tokens
        offsets = [(len(one.ids) - 1) % size for one in decodes]
        if self.table is None or not all(offsets) or self.members != list(decodes):
            held = [(one.pages, len(one.ids)) for one in decodes]
            self.table = self.new_table(held)
            self.members = list(decodes)
        else:
            self.table.advance(torch.tensor(offsets, device=self.model.device))

    def new_table(self, held: Sequence[tuple[Sequence[int], int]]) -> DecodeTable:
        if self.native is None:
            return TorchTable(self.cache, held)
        return NativeTable(self.native, self.cache, held)

    def forget(self, tokens: Tokens) -> None:
        """Its pages go back; what was computed in them is lost."""
        self.cache.give_back(tokens.pages)
        tokens.computed = 0
        self.table = None  # A table built before may name these pages.
