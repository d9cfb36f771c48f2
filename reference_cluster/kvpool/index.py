"""Which instances hold how much of a prefix? One walk down the chain answers for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from reference_cluster.request import Block


class PrefixIndex:
    """Block -> the instances that hold it, as the bits of an integer. Instances have ids 0..n-1."""

    def __init__(self, instances: int) -> None:
        self.instances = instances
        self.holders: dict[Block, int] = {}

    def stored(self, instance: int, blocks: Sequence[Block]) -> None:
        holders, bit = self.holders, 1 << instance
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def evicted(self, instance: int, blocks: Sequence[Block]) -> None:
        holders, bit = self.holders, 1 << instance
        for block in blocks:
            left = holders[block] ^ bit
            if left:
                holders[block] = left
            else:
                del holders[block]

    def cleared(self, instance: int) -> None:
        """The instance holds nothing any more: it was lost, or sends its contents anew."""
        self.evicted(instance, [key for key, bits in self.holders.items() if bits >> instance & 1])

    def match(self, blocks: Sequence[Block]) -> list[int]:
        """For each instance, how many leading blocks of the chain it holds."""
        depths = [0] * self.instances
        alive = (1 << self.instances) - 1
        depth = 0
        for block in blocks:
            holders = self.holders.get(block, 0)
            lost = alive & ~holders
            if lost:
                mark(depths, lost, depth)
                alive &= holders
                if not alive:
                    return depths
            depth += 1
        mark(depths, alive, depth)
        return depths


def mark(depths: list[int], instances: int, depth: int) -> None:
    """Write `depth` for every instance whose bit is set."""
    while instances:
        lowest = instances & -instances
        depths[lowest.bit_length() - 1] = depth
        instances ^= lowest
