"""Where does KV lie while it is computed with? In pages of one tensor, given out lowest first."""

from __future__ import annotations

import contextlib
import heapq
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from reference_cluster.engines.torch.architecture import LlamaConfig
from reference_cluster.errors import ConfigError


class PagedCache:
    """Keys and values of all layers, [layer, K or V, page, KV head, token, dim].

    A head's part of a page is one matrix, so that attention multiplies pages where they lie. The
    lowest free page goes first, which keeps the pages in use close together: a decode step can
    read them as one slice.
    """

    def __init__(
        self,
        config: LlamaConfig,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: int = 1,
    ) -> None:
        if page_tokens < 1 or pages < 1:
            raise ConfigError(f"{pages} pages of {page_tokens} tokens; give at least one of each")
        self.pages = pages
        self.page_tokens = page_tokens
        self.kv_heads = config.kv_heads // ranks
        self.head_dim = config.head_dim
        shape = (config.layers, 2, pages, self.kv_heads, page_tokens, self.head_dim)
        # Zeros, not whatever was there: a NaN would survive the mask.
        self.kv = zeros(shape, dtype, device)
        self.layer_rows = self.kv.view(config.layers, -1, self.head_dim)
        heads = torch.arange(self.kv_heads, device=device) * page_tokens
        # From a token's first row to the rows of its keys and values of all heads.
        self.row_offsets = torch.cat([heads, heads + self.layer_rows.shape[1] // 2])
        self.free = list(range(pages))  # A heap.
        self.shared: dict[int, int] = {}  # Pages with more than one user: how many more.

    @property
    def free_tokens(self) -> int:
        return len(self.free) * self.page_tokens

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extend `held` so that `tokens` fit; False, and nothing taken, if pages run short."""
        missing = self.pages_for(tokens) - len(held)
        if missing > len(self.free):
            return False
        held.extend(heapq.heappop(self.free) for _ in range(missing))
        return True

    def share(self, held: Sequence[int]) -> None:
        """One more user of each, who gives them back."""
        for page in held:
            self.shared[page] = self.shared.get(page, 0) + 1

    def give_back(self, held: list[int]) -> None:
        for page in held:
            others = self.shared.pop(page, 0)
            if others > 1:
                self.shared[page] = others - 1
            elif not others:
                heapq.heappush(self.free, page)
        held.clear()

    def first_row(self, page: int, position: int) -> int:
        """The row of head 0's key of a token, in its layer's rows [row, dim]."""
        return page * self.kv_heads * self.page_tokens + position % self.page_tokens

    def first_rows(self, pages: Sequence[int], start: int, end: int) -> list[int]:
        """Of the tokens [start, end) of a sequence in these pages."""
        size = self.page_tokens
        return [self.first_row(pages[at // size], at) for at in range(start, end)]

    def write(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Store [token, K heads then V heads, dim] at `rows`, which `rows_of` made."""
        self.layer_rows[layer].index_copy_(0, rows, kv.reshape(-1, self.head_dim))

    def rows_of(self, first_rows: Tensor) -> Tensor:
        return (first_rows[:, None] + self.row_offsets).view(-1)

    def context(self, layer: int, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, KV head, token, dim] of the first `tokens` in these pages."""
        taken = self.kv[layer].index_select(1, pages).transpose(1, 2)
        keys, values = taken.reshape(2, 1, self.kv_heads, -1, self.head_dim)[..., :tokens, :]
        return keys, values

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Every page is free or held by one sequence: raises AssertionError otherwise."""
        pages = sorted([*self.free, *(page for one in held for page in one)])
        assert pages == list(range(self.pages)), f"{len(pages)} pages accounted of {self.pages}"


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU under Linux in huge pages, as far as the system has them: a step that reads all of
    a large cache otherwise waits for the address of every 4 KiB, up to a quarter of its time."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A kernel without them: plain pages, as elsewhere.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
