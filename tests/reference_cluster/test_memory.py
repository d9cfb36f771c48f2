"""Does every block keep its bytes for as long as somebody needs them, and no longer?

Slots have 2 layers of 4 bytes.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reference_cluster.kvpool.memory import BlockMemory, PoolBytes
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block
from reference_cluster.transports.bytes import Range


def a_memory(slots: int) -> BlockMemory:
    return BlockMemory(memoryview(bytearray(slots * 8)), layers=2, layer_bytes=4)


def put(kept: PoolBytes, text: str) -> int:
    """Compute each letter's block in a slot of its own and store it, unpinned."""
    slots = kept.memory.take(len(text))
    assert slots is not None
    for letter, slot in zip(text, slots, strict=True):
        kept.memory.view(slot)[:] = letter.encode() * 8
    stored = kept.put(text, slots)
    kept.memory.give_back(slots)
    kept.pool.unpin(text[:stored])
    return stored


def read(kept: PoolBytes, blocks: str) -> str:
    """The letters that the slots of blocks really have."""
    slots = kept.get(blocks)
    letters = "".join(bytes(kept.memory.view(slot)).decode()[0] for slot in slots)
    kept.memory.give_back(slots)
    return letters


def test_slots_are_taken_whole_or_not_at_all() -> None:
    """3 slots and a rest of 5 bytes: two taken, two more are refused, one is left."""
    memory = BlockMemory(memoryview(bytearray(29)), layers=2, layer_bytes=4)
    assert memory.total == 3
    assert memory.take(2) == [0, 1]
    assert memory.take(2) is None
    assert (memory.used, memory.free) == (2, 1)
    memory.give_back([0, 1])
    assert memory.free == 3
    memory.check_integrity()


def test_a_slot_is_free_when_its_last_user_has_gone() -> None:
    """Two users; and a third give_back is a mistake of ours."""
    memory = a_memory(1)
    assert memory.take(1) == [0]
    memory.hold([0])
    memory.give_back([0])
    assert memory.take(1) is None
    memory.give_back([0])
    with pytest.raises(AssertionError, match="slot 0 is given back twice"):
        memory.give_back([0])
    with pytest.raises(AssertionError, match="slot 0 is free"):
        memory.hold([0])


def test_where_a_layer_lies() -> None:
    """Layer 1 of slot 2: 2 * 8 + 4; the view is the same bytes."""
    memory = a_memory(3)
    assert memory.range_of(2) == Range(16, 8)
    assert memory.range_of(2, layer=1) == Range(20, 4)
    memory.view(2, layer=1)[:] = b"abcd"
    assert bytes(memory.buffer[20:24]) == b"abcd"
    assert bytes(memory.view(2)) == b"\0\0\0\0abcd"


def test_a_checksum_sees_what_has_changed_places() -> None:
    """Equal bytes have equal sums wherever they lie; swapped layers do not."""
    memory = a_memory(3)
    for slot, text in enumerate((b"aaaabbbb", b"bbbbaaaa", b"aaaabbbb")):
        memory.view(slot)[:] = text
    assert memory.checksum(0) == memory.checksum(2) != memory.checksum(1)
    assert memory.checksum(0, layers=1) != memory.checksum(1, layers=1)
    memory.view(1, layer=0)[:] = b"aaaa"
    assert memory.checksum(0, layers=1) == memory.checksum(1, layers=1)


def test_a_block_evicted_while_it_is_read_keeps_its_slot() -> None:
    """One block fits; a transfer has a when b takes its place in the pool."""
    kept = PoolBytes(a_memory(2), BlockPool(1))
    put(kept, "a")
    reading = kept.get("a")
    put(kept, "b")
    assert "a" not in kept.pool
    assert bytes(kept.memory.view(reading[0])) == b"aaaaaaaa"
    assert kept.memory.take(1) is None
    kept.memory.give_back(reading)
    assert read(kept, "b") == "b"
    assert kept.memory.free == 1


def test_what_the_pool_has_already_stays_where_it_is() -> None:
    """The second a is computed for nothing; its slot comes back."""
    kept = PoolBytes(a_memory(4), BlockPool(3))
    put(kept, "a")
    before = kept.slots["a"]
    put(kept, "ab")
    assert kept.slots["a"] == before
    assert (kept.memory.used, read(kept, "ab")) == (2, "ab")


def test_what_finds_no_room_is_not_kept() -> None:
    """Two of four letters fit."""
    kept = PoolBytes(a_memory(4), BlockPool(2))
    assert put(kept, "abcd") == 2
    assert (kept.memory.used, read(kept, "abcd")) == (2, "ab")


def test_a_block_without_its_bytes_is_not_given() -> None:
    """The pool stores b before it is read from below: it has a slot, and counts when filled."""
    kept = PoolBytes(a_memory(4), BlockPool(3))
    put(kept, "a")
    kept.pool.store_pinned("b")
    assert kept.pool.match("ab") == 2
    assert (kept.filled("ab"), read(kept, "ab")) == (1, "a")
    slot = kept.slots["b"]
    kept.memory.view(slot)[:] = b"bbbbbbbb"
    kept.fill("b", slot)
    assert read(kept, "ab") == "ab"


def test_whoever_computes_a_lost_block_brings_its_bytes() -> None:
    """b was to be read but never came: the one computed takes its place, a late read none."""
    kept = PoolBytes(a_memory(4), BlockPool(3))
    kept.pool.store_pinned("b")
    lost = kept.slots["b"]
    put(kept, "b")
    kept.fill("b", lost)
    assert kept.slots["b"] != lost
    assert read(kept, "b") == "b"
    kept.check_integrity()
    assert kept.memory.used == 1


def test_without_a_slot_to_read_into_a_block_stays_without_bytes() -> None:
    """Both slots are taken by prompts; when b leaves the pool the books balance."""
    kept = PoolBytes(a_memory(2), BlockPool(1))
    assert kept.memory.take(2)
    kept.pool.store_pinned("b")
    assert kept.filled("b") == 0
    kept.check_integrity()
    kept.pool.unpin("b")
    assert kept.pool.make_room(1)
    assert kept.unfilled == {}
    kept.check_integrity()


LETTERS = st.text("abcdef", max_size=4).map(lambda text: "".join(dict.fromkeys(text)))


class Prompts(RuleBasedStateMachine):
    """Prompts are computed and stored, and transfers read, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = PoolBytes(a_memory(8), BlockPool(4))
        self.pinned: list[str] = []
        self.reading: list[tuple[str, list[int]]] = []

    @rule(text=LETTERS)
    def compute(self, text: str) -> None:
        slots = self.kept.memory.take(len(text))
        if slots is not None:
            for letter, slot in zip(text, slots, strict=True):
                self.kept.memory.view(slot)[:] = letter.encode() * 8
            self.pinned.append(text[: self.kept.put(text, slots)])
            self.kept.memory.give_back(slots)

    @rule(text=LETTERS)
    def begin_to_read(self, text: str) -> None:
        slots = self.kept.get(text)
        self.reading.append((text[: len(slots)], slots))

    @precondition(lambda self: self.pinned)
    @rule()
    def let_go(self) -> None:
        self.kept.pool.unpin(self.pinned.pop(0))

    @precondition(lambda self: self.reading)
    @rule()
    def end_reading(self) -> None:
        blocks, slots = self.reading.pop(0)
        for block, slot in zip(blocks, slots, strict=True):
            assert bytes(self.kept.memory.view(slot)) == block.encode() * 8
        self.kept.memory.give_back(slots)

    @invariant()
    def every_block_has_its_bytes(self) -> None:
        self.kept.check_integrity()
        self.kept.pool.check_integrity()
        blocks: list[Block] = [*self.kept.pool.pins, *self.kept.pool.idle]
        for block in blocks:
            slot = self.kept.slots[block]
            assert bytes(self.kept.memory.view(slot)) == str(block).encode() * 8


Prompts.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=60)
TestPrompts = Prompts.TestCase
