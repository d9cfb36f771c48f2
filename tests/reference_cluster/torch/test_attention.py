"""Does paged attention give what plain attention gives, wherever the pages lie?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
import torch.nn.functional as F  # noqa: E402, N812

from reference_cluster.engines.torch.architecture import PRESETS  # noqa: E402
from reference_cluster.engines.torch.attention import (  # noqa: E402
    DecodeTable,
    TorchTable,
    attend_chunk,
    attend_masked,
)
from reference_cluster.engines.torch.native import NativeTable, compiled  # noqa: E402
from reference_cluster.engines.torch.pages import PagedCache  # noqa: E402

pytestmark = pytest.mark.torch


def plain(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query [head, dim] over keys and values [KV head, token, dim]."""
    out = F.scaled_dot_product_attention(
        q[None, :, None], keys[None], values[None], enable_gqa=True
    )
    return out[0, :, 0].reshape(-1)


def make(kind: str, cache: PagedCache, members: Sequence[tuple[Sequence[int], int]]) -> DecodeTable:
    if kind == "torch":
        return TorchTable(cache, members)
    function = compiled(cache.head_dim)
    if function is None:
        pytest.skip("no C compiler here")
    return NativeTable(function, cache, members)


@pytest.mark.parametrize("scatter", [1, 10], ids=["dense", "scattered"])
@pytest.mark.parametrize("page_tokens", [16, 40])
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_a_batch_attends_to_its_own_pages(
    scatter: int, page_tokens: int, kind: str, device: str
) -> None:
    """Sequences of different lengths, pages in any order, pages of others between them."""
    torch.manual_seed(0)
    if (kind, device) == ("native", "cuda:0"):
        pytest.skip("native attention is the CPU's")
    numbers = random.Random(2)
    cache = PagedCache(PRESETS["tiny"], 400, page_tokens, torch.float32, torch.device(device))
    cache.kv.normal_()
    lengths = [1, 15, 16, 17, 90, 33]
    free = numbers.sample(range(25 * scatter), 20)
    pages = [[free.pop() for _ in range(cache.pages_for(length))] for length in lengths]
    table = make(kind, cache, list(zip(pages, lengths, strict=True)))
    q = torch.randn(len(lengths), 4, 64, device=device)
    out = table.attend(q, *cache.kv[2])
    for row, (held, length) in enumerate(zip(pages, lengths, strict=True)):
        keys, values = cache.context(2, torch.tensor(held, device=device), length)
        torch.testing.assert_close(out[row], plain(q[row], keys[0], values[0]))


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_a_table_goes_on_to_the_next_token(kind: str) -> None:
    """One more token on the last pages is seen without building the table anew."""
    torch.manual_seed(0)
    cache = PagedCache(PRESETS["tiny"], 8, 16, torch.float32, torch.device("cpu"))
    cache.kv.normal_()
    q = torch.randn(2, 4, 64)
    table = make(kind, cache, [([0, 1], 20), ([2], 7)])
    table.advance(torch.tensor([20 % 16, 7]))
    fresh = make(kind, cache, [([0, 1], 21), ([2], 8)])
    torch.testing.assert_close(table.attend(q, *cache.kv[0]), fresh.attend(q, *cache.kv[0]))


@pytest.mark.parametrize(("past", "new"), [(0, 40), (1, 40), (300, 40), (0, 511), (300, 512)])
def test_a_chunk_attends_causally_to_itself_and_wholly_to_what_was_before(
    past: int, new: int
) -> None:
    """The merged form, and the masked one of other devices, equal one masked attention."""
    torch.manual_seed(0)
    q, keys, values = (torch.randn(1, heads, past + new, 64) for heads in (4, 2, 2))
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    whole = F.scaled_dot_product_attention(
        q[:, :, past:], keys, values, attn_mask=mask, enable_gqa=True
    )
    expected = whole.transpose(1, 2).reshape(new, -1)
    before = (keys[:, :, :past], values[:, :, :past]) if past else None
    chunk = (q[:, :, past:], keys[:, :, past:], values[:, :, past:])
    torch.testing.assert_close(attend_chunk(*chunk, before), expected)
    torch.testing.assert_close(attend_masked(*chunk, before), expected)
