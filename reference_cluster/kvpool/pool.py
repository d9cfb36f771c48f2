"""Which blocks does one instance hold, and which may go when room is needed?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from reference_cluster.config import Eviction
from reference_cluster.policies.eviction import LeastFrequentlyUsed, LengthAware, make_order
from reference_cluster.request import Block

OnChange = Callable[[Sequence[Block]], None]


class PoolUse(Protocol):
    """How full a pool is: a pool itself, or what its mirror knows of it."""

    @property
    def used(self) -> int: ...

    capacity: int
    evictions: int  # Blocks that it has let go so far.


def ignore(blocks: Sequence[Block]) -> None:
    """Nobody follows this pool's contents."""


class BlockPool:
    """The blocks of one tier of one instance, at most `capacity` of them.

    A block is *pinned* while a request counts on it (loading, being written, being sent) and then
    never evicted; otherwise it waits in `idle`, in the order of the eviction policy. Prefix chains
    are released deepest block first, so that the ends of prefixes go before their beginnings.
    """

    def __init__(
        self,
        capacity: int,
        on_stored: OnChange = ignore,
        on_evicted: OnChange = ignore,
        eviction: Eviction = "lru",
    ) -> None:
        self.capacity = capacity
        self.on_stored = on_stored
        self.on_evicted = on_evicted
        self.pins: dict[Block, int] = {}
        self.idle = make_order(eviction)
        self.by_depth = self.idle if isinstance(self.idle, LengthAware) else None
        self.reserved = 0  # Blocks promised to something that has no keys, like running decodes.
        self.evictions = 0

    @property
    def used(self) -> int:
        return len(self.pins) + len(self.idle) + self.reserved

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def __contains__(self, block: Block) -> bool:
        return block in self.pins or block in self.idle

    def match(self, blocks: Iterable[Block]) -> int:
        """How many leading blocks are here."""
        matched = 0
        for block in blocks:
            if block not in self.pins and block not in self.idle:
                break
            matched += 1
        return matched

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keep blocks that are here until `unpin`."""
        pins, idle = self.pins, self.idle
        for block in blocks:
            held = pins.get(block, 0)
            if not held:
                del idle[block]
            pins[block] = held + 1

    def unpin(self, blocks: Sequence[Block], depth: int = 0) -> None:
        """Undo one `pin` of each; the first block becomes the most recently used.

        `depth` is how many blocks of the same prompt come before the first.
        """
        pins, idle = self.pins, self.idle
        if self.by_depth is not None:
            self.by_depth.place(blocks, depth)
        for block in reversed(blocks):
            held = pins[block] - 1
            if held:
                pins[block] = held
            else:
                del pins[block]
                idle[block] = None

    def store_pinned(self, blocks: Sequence[Block]) -> int:
        """Take blocks in, pinned, evicting idle ones as needed; returns how many leading ones fit.

        A block that is here already is pinned once more.
        """
        pins, idle = self.pins, self.idle
        free = self.free
        stored: list[Block] = []
        evicted: list[Block] = []
        fitted = len(blocks)
        for count, block in enumerate(blocks):
            if block in pins:
                pins[block] += 1
                continue
            if block in idle:
                del idle[block]
            elif free > 0:
                free -= 1
                stored.append(block)
            elif idle:
                evicted.append(idle.popitem(last=False)[0])
                stored.append(block)
            else:
                fitted = count
                break
            pins[block] = 1
        # A block that is both was evicted first: what is stored is pinned.
        if evicted:
            self.evict(evicted)
        if stored:
            self.on_stored(stored)
        return fitted

    def discard(self, block: Block) -> None:
        """Give up a block that nobody needs, for another tier has it."""
        del self.idle[block]

    def evict_these(self, blocks: Sequence[Block]) -> None:
        """Let idle blocks go out of turn."""
        for block in blocks:
            del self.idle[block]
            if isinstance(self.idle, LeastFrequentlyUsed):
                self.idle.forget(block)
        if blocks:
            self.evict(blocks)

    def make_room(self, blocks: int) -> bool:
        """Evict idle blocks until that many fit; False (and what could be evicted gone) if not."""
        while self.free < blocks and self.idle:
            self.evict([self.idle.popitem(last=False)[0]])
        return self.free >= blocks

    def can_make_room(self, blocks: int) -> bool:
        return self.free + len(self.idle) >= blocks

    def reserve(self, blocks: int) -> None:
        """Take room that has no keys; the caller has asked `can_make_room`."""
        assert self.make_room(blocks), f"{blocks} blocks do not fit beside {self!r}"
        self.reserved += blocks

    def release(self, blocks: int) -> None:
        self.reserved -= blocks

    def evict(self, blocks: Sequence[Block]) -> None:
        self.evictions += len(blocks)
        self.on_evicted(blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError with both sides where the books do not balance."""
        assert 0 <= self.used <= self.capacity, f"{self!r} holds more than it can"
        assert self.reserved >= 0, f"{self!r} has given back more than it reserved"
        assert all(held > 0 for held in self.pins.values()), f"{self!r} has a pin of nobody"
        both = self.pins.keys() & self.idle.keys()
        assert not both, f"{self!r} has {len(both)} blocks both pinned and idle"

    def __repr__(self) -> str:
        return (
            f"<BlockPool pinned={len(self.pins)} idle={len(self.idle)} "
            f"reserved={self.reserved} capacity={self.capacity}>"
        )
