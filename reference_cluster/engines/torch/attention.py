"""Who looks at whom? Chunks of prompts at their context, decoding sequences at their pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from reference_cluster.engines.torch.pages import PagedCache

# Reading unused pages between used ones costs bandwidth, picking out the used ones a copy.
DENSE_ENOUGH = 1.5
# Of 128 to 2048 tokens these gain by it, an eighth of their attention.
WORTH_HALVING = range(384, 768)


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """A chunk attends to the context before it and, causally, to itself.

    q [1, head, token, dim], k and v [1, KV head, token, dim]; returns [token, head dim]. No mask is
    needed: two attentions, each over its own keys, are merged by their softmax sums.
    """
    if q.device.type != "cpu":
        return attend_masked(q, k, v, past)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if past is None and q.shape[2] in WORTH_HALVING:
        # The kernel computes keys by 512, and so nearly all that the causal mask then throws away.
        (q, q2), (k, k2), (v, v2) = (x.tensor_split(2, 2) for x in (q, k, v))
        return torch.cat([attend_chunk(q, k, v, None), attend_chunk(q2, k2, v2, (k, v))])
    out, log_sum = flash(q, k, v, 0.0, True)
    if past is not None:
        before, log_sum_before = flash(q, *past, 0.0, False)
        share = torch.sigmoid(log_sum_before - log_sum)[..., None]
        out = torch.lerp(out.float(), before.float(), share).to(q.dtype)
    return out.transpose(1, 2).reshape(q.shape[2], -1)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """The same on other devices: one attention whose causal mask ends at the last token."""
    if past is None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        new, whole = q.shape[2], keys.shape[2]
        mask = torch.ones(new, whole, dtype=torch.bool, device=q.device).tril(whole - new)
        out = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=True
        )
    return out.transpose(1, 2).reshape(q.shape[2], -1)


class DecodeTable(Protocol):
    """The pages that a decode step reads, and whose they are."""

    def advance(self, offsets: Tensor) -> None:
        """One more token a sequence, at `offsets` [sequence] of the same last pages."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [sequence, head, dim], keys and values [page, KV head, token, dim] of a layer."""


class TorchTable:
    """The pages of a step for any device and dtype; built when a page or a member comes.

    `members` are (pages, tokens) of each sequence, the new token included. Queries are copied to
    the pages, not pages to the queries: each page is multiplied where it lies, with the query of
    its owner, and what the pages give is added up by owner.
    """

    def __init__(self, cache: PagedCache, members: Sequence[tuple[Sequence[int], int]]) -> None:
        size, device = cache.page_tokens, cache.kv.device
        counts = [cache.pages_for(tokens) for _, tokens in members]
        flat: list[int] = []
        for (pages, _), count in zip(members, counts, strict=True):
            flat += pages[:count]
        held = torch.tensor(flat)
        owner = torch.repeat_interleave(torch.tensor(counts))
        lasts = torch.tensor(counts).cumsum(0) - 1
        valid = torch.full_like(held, size)
        valid[lasts] = torch.tensor([(tokens - 1) % size + 1 for _, tokens in members])
        self.batch = len(members)
        self.rows: slice | Tensor
        low, past = int(held.min()), int(held.max()) + 1
        if past - low <= DENSE_ENOUGH * len(flat):
            # Pages of others in between belong to nobody: an owner beyond the batch.
            self.rows, place = slice(low, past), held - low
            owner = torch.full((past - low,), self.batch).index_copy_(0, place, owner)
            valid = torch.zeros(past - low, dtype=torch.long).index_copy_(0, place, valid)
            lasts = place[lasts]
        else:
            self.rows = held.to(device)
        is_beyond = torch.arange(size) >= valid[:, None]
        bias = torch.zeros(is_beyond.shape).masked_fill_(is_beyond, -torch.inf)
        self.owner = owner.to(device)
        self.asker = self.owner.clamp(max=self.batch - 1)  # Nobody's pages need some query.
        self.bias = bias.to(device)[:, None]  # [page, 1, token]
        self.last_cells = (lasts * size).to(device)  # Where each sequence's last page begins.

    def advance(self, offsets: Tensor) -> None:
        self.bias.view(-1).index_fill_(0, self.last_cells + offsets, 0.0)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys[self.rows], values[self.rows]
        pages, kv_heads, _, dim = keys.shape
        heads = q.shape[1]
        queries = q.reshape(self.batch, -1).index_select(0, self.asker)
        parts, log_sums = attend_pages(
            queries.view(pages, kv_heads, -1, dim), keys, values, self.bias
        )
        # Merge what the pages of a sequence give by their softmax sums.
        top = log_sums.new_full((self.batch + 1, heads), -torch.inf)
        top.scatter_reduce_(0, self.owner[:, None].expand(-1, heads), log_sums, "amax")
        shares = log_sums.sub_(top.index_select(0, self.owner)).exp_()
        sums = torch.zeros_like(top).index_add_(0, self.owner, shares)
        out = sums.new_zeros(self.batch + 1, heads * dim)
        out.index_add_(0, self.owner, (parts * shares[..., None]).view(pages, -1))
        merged = out[: self.batch].view(-1, heads, dim).div_(sums[: self.batch, :, None])
        return merged.view(self.batch, -1).to(q.dtype)


def attend_pages(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Each page with its own query: results [page, head, dim] and log sums [page, head], float32.

    queries [page, KV head, head of its group, dim]: the heads of a group share keys and values.
    """
    pages, *_, dim = queries.shape
    if queries.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts, log_sums = flash(queries, keys, values, 0.0, False, attn_mask=bias[:, None])
    else:
        scores = torch.matmul(queries.float() * dim**-0.5, keys.float().transpose(2, 3))
        scores += bias[:, None]
        log_sums = scores.logsumexp(-1)
        parts = torch.matmul((scores - log_sums[..., None]).exp(), values.float())
    return parts.reshape(pages, -1, dim).float(), log_sums.reshape(pages, -1)
