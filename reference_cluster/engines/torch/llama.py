"""What is one forward pass? Chunks of prompts and decoding sequences through all layers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from reference_cluster.engines.torch.architecture import LlamaConfig, rope_frequencies
from reference_cluster.engines.torch.attention import DecodeTable, attend_chunk
from reference_cluster.engines.torch.blocks import Moves
from reference_cluster.engines.torch.pages import PagedCache
from reference_cluster.engines.torch.weights import Layer, Weights


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """The prompt tokens [start, end) of a sequence that holds `pages`."""

    start: int
    end: int
    pages: Sequence[int]
    moves: Moves | None = None


@dataclass(slots=True)
class Pass:
    """The rows of one forward pass: first those of the chunks, in order, then one a decode."""

    tokens: Tensor  # [row]
    positions: Tensor  # [row]
    first_rows: Tensor  # [row], of the cache: where each row's KV goes.
    chunks: Sequence[ChunkSpan]
    table: DecodeTable | None
    wanted: Tensor | None  # Rows whose logits are asked for; None: all.
    past_pages: list[Tensor | None] = field(default_factory=list)


class Workspace:
    """Memory for results that die within a layer, kept from pass to pass.

    Fresh memory costs a page fault every 4 KiB: a third of the time of a large product on a CPU.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.held: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Uninitialised; what was given for this name before is gone."""
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)


def alone(x: Tensor) -> Tensor:
    """The sum over ranks, without tensor parallelism."""
    return x


class Llama:
    """Weights and the pass. `all_reduce` adds up the partial results of the ranks, in place."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        cache: PagedCache,
        ranks: int = 1,
        all_reduce: Callable[[Tensor], Tensor] = alone,
    ) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.heads = config.heads // ranks
        self.kv_heads = config.kv_heads // ranks
        self.all_reduce = all_reduce
        self.device = weights.embedding.device
        self.workspace = Workspace(weights.embedding.dtype, self.device)
        frequencies = rope_frequencies(config.rope, config.head_dim)
        self.frequencies = torch.tensor(frequencies, device=self.device)
        self.turns = torch.empty(0, config.head_dim // 2, dtype=torch.complex64)

    def forward(self, work: Pass) -> Tensor:
        """Logits [wanted row, vocabulary] in float32; KV of all rows is in the cache then."""
        x = self.weights.embedding.index_select(0, work.tokens)
        turns = self.turns_at(work.positions)
        rows = self.cache.rows_of(work.first_rows)
        for number, layer in enumerate(self.weights.layers):
            for chunk in work.chunks:
                if chunk.moves is not None:
                    chunk.moves.before(number, chunk.pages, chunk.start)
            x = self.layer(x, number, layer, work, turns, rows)
            for chunk in work.chunks:
                if chunk.moves is not None:
                    chunk.moves.after(number, chunk.pages, chunk.start, chunk.end)
        if work.wanted is not None:
            x = x.index_select(0, work.wanted)
        normed = self.norm(x, self.weights.final_norm)
        return torch.mm(normed, self.weights.head).float()

    def layer(
        self, x: Tensor, number: int, layer: Layer, work: Pass, turns: Tensor, rows: Tensor
    ) -> Tensor:
        dim = self.config.head_dim
        fused = self.product("qkv", self.norm(x, layer.attention_norm), layer.qkv)
        if layer.qkv_bias is not None:
            fused += layer.qkv_bias
        heads = fused.view(len(x), -1, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = heads[:, : self.heads], heads[:, self.heads : -self.kv_heads]
            q.copy_(self.norm(q, layer.q_norm))
            k.copy_(self.norm(k, layer.k_norm))
        self.rotate(heads[:, : -self.kv_heads], turns)
        self.cache.write(number, rows, heads[:, self.heads :])
        attended = self.product("out", self.attend(number, heads, work), layer.out)
        x = self.all_reduce(attended).add_(x)
        normed = self.norm(x, layer.feed_forward_norm)
        gate, up = self.product("gate_up", normed, layer.gate_up).chunk(2, -1)
        inner = functional.silu(gate, inplace=True).mul_(up)
        return self.all_reduce(self.product("down", inner, layer.down)).add_(x)

    def product(self, name: str, x: Tensor, matrix: Tensor) -> Tensor:
        out = self.workspace.get(name, len(x), matrix.shape[1])
        return torch.mm(x, matrix, out=out)

    def attend(self, number: int, heads: Tensor, work: Pass) -> Tensor:
        """Attention of all rows [row, heads dim]; heads [row, q k v heads, dim]."""
        parts, first = [], 0
        for index, chunk in enumerate(work.chunks):
            past = first + chunk.end - chunk.start
            one = heads[first:past].transpose(0, 1)[None]
            q, k, v = one.split([self.heads, self.kv_heads, self.kv_heads], 1)
            context, pages = None, work.past_pages[index]
            if pages is not None:
                context = self.cache.context(number, pages, chunk.start)
            parts.append(attend_chunk(q, k, v, context))
            first = past
        if work.table is not None:
            keys, values = self.cache.kv[number]
            parts.append(work.table.attend(heads[first:, : self.heads], keys, values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dim, its sum of squares in float32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = length.square_().div_(x.shape[-1])
        scale = mean_square.add_(self.config.norm_epsilon).rsqrt_()
        return (x * scale).to(x.dtype).mul_(weight)

    def rotate(self, heads: Tensor, turns: Tensor) -> None:
        """RoPE in place: the pairs of each head [row, head, dim] as complex numbers, turned."""
        if heads.dtype == torch.float32:
            torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_(turns)
            return
        pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
        heads.copy_(torch.view_as_real(pairs.mul_(turns)).flatten(-2))

    def turns_at(self, positions: Tensor) -> Tensor:
        """exp(i position frequency) [row, 1, pair]; the table grows with the longest context."""
        last = int(positions.max())
        if last >= len(self.turns):
            steps = torch.arange(max(1024, 2 * last), device=self.device)
            angles = torch.outer(steps.float(), self.frequencies)
            self.turns = torch.polar(torch.ones_like(angles), angles)
        return self.turns.index_select(0, positions)[:, None]
