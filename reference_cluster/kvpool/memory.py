"""Where are the bytes of a block? In a slot of memory that other workers can read and write."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block
from reference_cluster.transports.bytes import Range


class BlockMemory:
    """Equal slots in one buffer, usually a registered segment. Slot i is the bytes
    [i * block_bytes, (i + 1) * block_bytes), layer after layer.

    A slot is free, or has one user or more: the pool that keeps a block there, a prompt that is
    being computed, a transfer that reads it. It is free again when the last has given it back, so
    that a block may leave its pool while its last bytes are still being sent.
    """

    def __init__(self, buffer: memoryview, layers: int, layer_bytes: int) -> None:
        self.buffer = buffer.cast("B")
        self.layers, self.layer_bytes = layers, layer_bytes
        self.block_bytes = layers * layer_bytes
        self.total = len(self.buffer) // self.block_bytes
        self.users = [0] * self.total
        self.idle = list(range(self.total - 1, -1, -1))  # The lowest is taken first.

    @property
    def free(self) -> int:
        return len(self.idle)

    @property
    def used(self) -> int:
        return self.total - len(self.idle)

    def take(self, count: int) -> list[int] | None:
        """That many free slots, in which the caller is the only user; None if there are fewer."""
        if count > len(self.idle):
            return None
        taken = [self.idle.pop() for _ in range(count)]
        for slot in taken:
            self.users[slot] = 1
        return taken

    def hold(self, slots: Sequence[int]) -> None:
        """Use slots that somebody else has as well, until `give_back`."""
        for slot in slots:
            assert self.users[slot], f"slot {slot} is free"
            self.users[slot] += 1

    def give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            left = self.users[slot] - 1
            assert left >= 0, f"slot {slot} is given back twice"
            self.users[slot] = left
            if not left:
                self.idle.append(slot)

    def range_of(self, slot: int, layer: int | None = None) -> Range:
        """The bytes of a slot, or of one layer in it, as transports name them."""
        start = slot * self.block_bytes
        if layer is None:
            return Range(start, self.block_bytes)
        return Range(start + layer * self.layer_bytes, self.layer_bytes)

    def view(self, slot: int, layer: int | None = None) -> memoryview:
        """The same bytes, to be read and written here."""
        place = self.range_of(slot, layer)
        return self.buffer[place.offset : place.offset + place.length]

    def checksum(self, slot: int, layers: int | None = None) -> int:
        """CRC-32 of a slot's first `layers` layers (all of them).

        zlib's runs at 5 GB/s here (adler32 3.4, SHA-1 2.0, BLAKE2b .9; sums in numpy are faster,
        but do not see two words that have changed places).
        """
        start = slot * self.block_bytes
        size = self.block_bytes if layers is None else layers * self.layer_bytes
        return crc32(self.buffer[start : start + size])

    def check_integrity(self) -> None:
        """Raise AssertionError with both sides where the books do not balance."""
        in_use = sum(1 for users in self.users if users)
        assert in_use + self.free == self.total, f"{in_use} used + {self.free} != {self.total}"
        assert len(frozenset(self.idle)) == self.free, f"{self!r} has a slot free twice"
        wrong = [slot for slot in self.idle if self.users[slot]]
        assert not wrong, f"{self!r} has {len(wrong)} slots that are both free and in use"

    def __repr__(self) -> str:
        return f"<BlockMemory used={self.used} free={self.free} block_bytes={self.block_bytes}>"


class PoolBytes:
    """Which slot has the bytes of a pool's block? In step with the pool through its two hooks.

    Make it after everything else that listens to the pool. The memory needs more slots than the
    pool has blocks: for prompts being computed and for what is evicted while it is still read.
    """

    def __init__(self, memory: BlockMemory, pool: BlockPool) -> None:
        self.memory = memory
        self.pool = pool
        self.slots: dict[Block, int] = {}
        self.brought: dict[Block, int] = {}  # By the `put` under way.
        # Blocks whose bytes are still to come from SSD, or have been lost there: whoever computes
        # them puts them.
        self.unfilled: dict[Block, None] = {}
        self.on_stored, self.on_evicted = pool.on_stored, pool.on_evicted
        pool.on_stored, pool.on_evicted = self.stored, self.evicted

    def put(self, blocks: Sequence[Block], slots: Sequence[int]) -> int:
        """`BlockPool.store_pinned` of blocks whose bytes are in these slots.

        The pool becomes one more user of a slot whose block it takes in; what it has already it
        keeps where it is. So the caller gives back all of its slots when it needs them no more.
        """
        self.brought = dict(zip(blocks, slots, strict=True))
        stored = self.pool.store_pinned(blocks)
        for block in blocks[:stored]:
            if block in self.unfilled:
                self.forget(block)
                self.keep(block, self.brought[block])
        self.brought = {}
        return stored

    def get(self, blocks: Sequence[Block]) -> list[int]:
        """The slots of the leading blocks whose bytes are here, one more user of each."""
        slots = [self.slots[block] for block in blocks[: self.filled(blocks)]]
        self.memory.hold(slots)
        return slots

    def filled(self, blocks: Sequence[Block]) -> int:
        """How many leading blocks are here with their bytes."""
        for count, block in enumerate(blocks):
            if block not in self.slots or block in self.unfilled:
                return count
        return len(blocks)

    def stored(self, blocks: Sequence[Block]) -> None:
        """The pool has taken blocks in."""
        for block in blocks:
            slot = self.brought.get(block)
            if slot is not None:
                self.keep(block, slot)
            else:
                self.unfilled[block] = None
                if taken := self.memory.take(1):
                    self.slots[block] = taken[0]
        self.on_stored(blocks)

    def keep(self, block: Block, slot: int) -> None:
        self.memory.hold((slot,))
        self.slots[block] = slot

    def evicted(self, blocks: Sequence[Block]) -> None:
        """The pool has let blocks go; a tier below may hold their slots to write them down."""
        self.on_evicted(blocks)
        for block in blocks:
            self.forget(block)

    def forget(self, block: Block) -> None:
        self.unfilled.pop(block, None)
        slot = self.slots.pop(block, None)
        if slot is not None:
            self.memory.give_back((slot,))

    def fill(self, block: Block, slot: int) -> None:
        """A block's bytes have been read into this slot, if that is still where it belongs."""
        if self.slots.get(block) == slot:
            self.unfilled.pop(block, None)

    def check_integrity(self) -> None:
        """Raise AssertionError where slots, pool and memory tell different things."""
        self.memory.check_integrity()
        pool = self.pool
        assert pool.used - pool.reserved == len(self.slots) + sum(
            block not in self.slots for block in self.unfilled
        ), f"{pool!r} and {len(self.slots)} slots do not agree"
        lost = [block for block in self.slots if block not in pool]
        assert not lost, f"{len(lost)} slots have blocks that {pool!r} does not"
        free = [slot for slot in self.slots.values() if not self.memory.users[slot]]
        assert not free, f"{len(free)} blocks have slots that are free"
