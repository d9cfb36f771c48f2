"""Which instances hold how much of a prefix? One walk down the chain answers for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from reference_cluster.policies.view import Instances, ids
from reference_cluster.request import Block

Prefixes = list[tuple[int, Instances]]  # Who has exactly so many leading blocks, fewest first.
Change: TypeAlias = Literal["stored", "removed", "cleared"]


def nobody(change: Change, instance: int, blocks: Sequence[Block]) -> None:
    """Nobody follows this index."""


class PrefixIndex:
    """Block -> the instances that hold it, or have promised to, as the bits of an integer.

    Instances have ids 0..n-1. A block that one instance holds costs an entry of a dict and its key,
    as the integers of single instances are shared.
    """

    def __init__(self, instances: int) -> None:
        self.instances = instances
        self.bits = [1 << id for id in range(instances)]
        self.holders: dict[Block, Instances] = {}
        self.promises: dict[Block, Instances] = {}
        self.on_change: Callable[[Change, int, Sequence[Block]], None] = nobody

    def stored(self, instance: int, blocks: Sequence[Block]) -> None:
        self.add(self.holders, instance, blocks)
        self.on_change("stored", instance, blocks)

    def evicted(self, instance: int, blocks: Sequence[Block]) -> None:
        self.remove(self.holders, instance, blocks)
        self.on_change("removed", instance, blocks)

    def promised(self, instance: int, blocks: Sequence[Block]) -> None:
        """What waits at the instance will have stored these."""
        self.add(self.promises, instance, blocks)

    def settled(self, instance: int, blocks: Sequence[Block]) -> None:
        """Promises that are kept, or that nobody waits for any more."""
        self.remove(self.promises, instance, blocks)

    def add(self, sets: dict[Block, Instances], instance: int, blocks: Sequence[Block]) -> None:
        bit = self.bits[instance]
        before = after = bit
        for block in blocks:
            found = sets.get(block)
            if found is None:
                sets[block] = bit
            else:
                # The blocks of a chain are mostly in the same places: make that integer once.
                if found is not before:
                    before, after = found, found | bit
                sets[block] = after

    def remove(self, sets: dict[Block, Instances], instance: int, blocks: Sequence[Block]) -> None:
        bit = self.bits[instance]
        before = after = 0
        for block in blocks:
            found = sets[block]
            if found == bit:
                del sets[block]
                continue
            if found is not before:
                before, after = found, found ^ bit
                if not after & (after - 1):
                    after = self.bits[after.bit_length() - 1]
            sets[block] = after

    def prefixes(self, blocks: Sequence[Block]) -> Prefixes:
        """Every instance, by how many leading blocks of the chain it holds."""
        return walk(self.holders, blocks, 0, (1 << self.instances) - 1)

    def promising(self, held: Prefixes, blocks: Sequence[Block]) -> Prefixes:
        """The same with the blocks that are promised right behind those that are held."""
        if not self.promises:
            return held
        found: Prefixes = []
        for depth, instances in held:
            found += walk(self.promises, blocks, depth, instances)
        return found

    def cleared(self, instance: int) -> None:
        """The instance holds nothing any more: it was lost, or sends its contents anew."""
        self.remove(self.holders, instance, self.held_by(instance))
        self.on_change("cleared", instance, ())

    def holds(self, instance: int, block: Block) -> bool:
        return bool(self.holders.get(block, 0) >> instance & 1)

    def held_by(self, instance: int) -> list[Block]:
        """All that an instance holds; looks at every block there is."""
        return [key for key, bits in self.holders.items() if bits >> instance & 1]

    def match(self, blocks: Sequence[Block]) -> list[int]:
        """For each instance, how many leading blocks of the chain it holds."""
        depths = [0] * self.instances
        for depth, instances in self.prefixes(blocks):
            for id in ids(instances):
                depths[id] = depth
        return depths


def walk(
    sets: dict[Block, Instances], blocks: Sequence[Block], depth: int, alive: Instances
) -> Prefixes:
    """How far each of the `alive` instances has blocks in a row, from number `depth` on."""
    found: Prefixes = []
    get = sets.get
    for block in blocks[depth:] if depth else blocks:
        kept = alive & get(block, 0)
        if kept != alive:
            found.append((depth, alive ^ kept))
            if not kept:
                return found
            alive = kept
        depth += 1
    found.append((depth, alive))
    return found
