"""Which idle block goes when room is needed? The three policies of the papers."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Protocol

from reference_cluster.config import Eviction
from reference_cluster.request import Block

Rank = tuple[int, ...]  # The lowest goes first; no two are alike.


class Order(Protocol):
    """The blocks that nobody needs now, in the order in which they go.

    LRU, whatever has not been used for longest, is an OrderedDict itself: an hour's trace asks it a
    million times, and a class of ours on top of it would take three times as long to evict.
    """

    def __setitem__(self, block: Block, nothing: None, /) -> None:
        """Nobody needs it any more: it has been used once more, most recently of all."""

    def __delitem__(self, block: Block, /) -> None:
        """It is needed again."""

    def popitem(self, last: bool = True) -> tuple[Block, Any]:
        """Take the block that goes next, with `last=False`."""

    def __contains__(self, block: object, /) -> bool: ...
    def __iter__(self) -> Iterator[Block]: ...
    def __len__(self) -> int: ...
    def keys(self) -> Set[Block]: ...


class LeastFrequentlyUsed:
    """What was used least often since it came goes first; of equals the least recently used."""

    def __init__(self) -> None:
        self.ranks: dict[Block, Rank] = {}
        self.uses: dict[Block, int] = {}  # Of blocks in use as well, until they are evicted.
        self.heap: list[tuple[Rank, Block]] = []  # Ranks may be outdated.
        self.turns = 0

    def rank(self, block: Block) -> Rank:
        return self.uses[block], self.turns

    def __setitem__(self, block: Block, nothing: None) -> None:
        self.turns += 1
        self.uses[block] = self.uses.get(block, 0) + 1
        rank = self.ranks[block] = self.rank(block)
        heapq.heappush(self.heap, (rank, block))
        if len(self.heap) > 64 + 2 * len(self.ranks):
            self.heap = [(rank, block) for block, rank in self.ranks.items()]
            heapq.heapify(self.heap)

    def __delitem__(self, block: Block) -> None:
        del self.ranks[block]

    def popitem(self, last: bool = True) -> tuple[Block, Rank]:
        assert not last, "only the next to go is known"
        while True:
            rank, block = heapq.heappop(self.heap)
            if self.ranks.get(block) == rank:
                del self.ranks[block]
                self.forget(block)
                return block, rank

    def forget(self, block: Block) -> None:
        """What comes back begins anew."""
        del self.uses[block]

    def __contains__(self, block: object) -> bool:
        return block in self.ranks

    def __iter__(self) -> Iterator[Block]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def keys(self) -> Set[Block]:
        return self.ranks.keys()


class LengthAware(LeastFrequentlyUsed):
    """Like LFU, but of equals the deepest in its prompt goes first, so that prefixes stay usable.

    (arXiv 2407.00079, section 6.1; a block's depth is the same in all prompts, as its key names the
    whole prefix.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.depths: dict[Block, int] = {}

    def place(self, blocks: Sequence[Block], depth: int) -> None:
        """These are the blocks of a prompt from number `depth` on; told before they come."""
        self.depths.update(zip(blocks, range(depth, depth + len(blocks)), strict=True))

    def rank(self, block: Block) -> Rank:
        return self.uses[block], -self.depths[block], self.turns

    def forget(self, block: Block) -> None:
        super().forget(block)
        del self.depths[block]


def make_order(eviction: Eviction) -> Order:
    """The policy that the configuration names."""
    by_name: dict[Eviction, Callable[[], Order]] = {
        "lru": OrderedDict,
        "lfu": LeastFrequentlyUsed,
        "length-aware": LengthAware,
    }
    return by_name[eviction]()
