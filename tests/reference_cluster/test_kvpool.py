"""Does a pool keep what it must, and let go of the least useful first?"""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block


class Watched:
    """A pool with a record of what it took in and let go."""

    def __init__(self, capacity: int) -> None:
        self.stored: list[Block] = []
        self.evicted: list[Block] = []
        self.pool = BlockPool(capacity, self.stored.extend, self.evicted.extend)

    def keep(self, *blocks: Block) -> None:
        """Store a chain and let go of it: it stays, unpinned."""
        assert self.pool.store_pinned(blocks) == len(blocks)
        self.pool.unpin(blocks)


def test_an_empty_pool_matches_nothing() -> None:
    """Not even the first block."""
    assert BlockPool(3).match("ab") == 0


def test_a_match_ends_at_the_first_gap() -> None:
    """b is missing, so c does not count."""
    watched = Watched(9)
    watched.keep("a", "c")
    assert watched.pool.match("abc") == 1
    assert "c" in watched.pool


def test_the_least_recently_used_chain_goes_first() -> None:
    """a was used before b; room for c takes a's place."""
    watched = Watched(2)
    watched.keep("a")
    watched.keep("b")
    watched.keep("c")
    assert watched.evicted == ["a"]


def test_using_a_block_again_saves_it() -> None:
    """a is pinned and released once more: now b is the oldest."""
    watched = Watched(2)
    watched.keep("a")
    watched.keep("b")
    watched.pool.pin("a")
    watched.pool.unpin("a")
    watched.keep("c")
    assert watched.evicted == ["b"]


def test_a_chain_goes_from_its_end() -> None:
    """Beginnings are shared by more prompts than ends: c, then b, then a."""
    watched = Watched(3)
    watched.keep("a", "b", "c")
    watched.keep("x", "y", "z")
    assert watched.evicted == ["c", "b", "a"]


def test_a_pinned_block_is_never_evicted() -> None:
    """Two pins need two unpins; until then only b can make room."""
    watched = Watched(2)
    watched.keep("a", "b")
    watched.pool.pin("a")
    watched.pool.pin("a")
    watched.pool.unpin("a")
    assert watched.pool.store_pinned("xy") == 1
    assert watched.evicted == ["b"]
    assert "a" in watched.pool
    watched.pool.check_integrity()


def test_a_chain_is_stored_as_far_as_there_is_room() -> None:
    """3 of 4 fit, and the others are not there in part."""
    watched = Watched(3)
    assert watched.pool.store_pinned("abcd") == 3
    assert watched.pool.match("abcd") == 3
    assert watched.pool.free == 0
    assert watched.stored == ["a", "b", "c"]


def test_storing_what_is_there_pins_it() -> None:
    """An idle block is not stored twice, nor is a pinned one."""
    watched = Watched(3)
    watched.keep("a")
    assert watched.pool.store_pinned("ab") == 2
    assert watched.pool.store_pinned("ab") == 2
    assert watched.stored == ["a", "b"]
    assert watched.pool.pins == {"a": 2, "b": 2}


def test_room_without_keys_evicts_idle_blocks_only() -> None:
    """4 blocks, one pinned: room for 3 and not for 4; what was reserved comes back."""
    watched = Watched(4)
    watched.keep("a", "b", "c", "d")
    watched.pool.pin("a")
    assert watched.pool.can_make_room(3)
    assert not watched.pool.can_make_room(4)
    watched.pool.reserve(3)
    assert watched.evicted == ["d", "c", "b"]
    assert (watched.pool.used, watched.pool.free) == (4, 0)
    watched.pool.release(3)
    assert watched.pool.free == 3


def test_reserving_what_does_not_fit_is_a_mistake_of_ours() -> None:
    """The message shows the pool."""
    with pytest.raises(AssertionError, match="capacity=2"):
        BlockPool(2).reserve(3)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("pins", {1: 1, 2: 1, 3: 1, 4: 1}, "more than it can"),
        ("reserved", -1, "more than it reserved|more than it can"),
        ("pins", {1: 0}, "pin of nobody"),
        ("pins", {9: 1}, "both pinned and idle"),
    ],
)
def test_the_integrity_check_sees_broken_books(field: str, value: object, complaint: str) -> None:
    """Overfull, given back twice, pinned by nobody, in two places."""
    watched = Watched(3)
    watched.keep(9)
    setattr(watched.pool, field, value)
    with pytest.raises(AssertionError, match=complaint):
        watched.pool.check_integrity()


CHAINS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=40)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(chains=CHAINS, capacity=st.integers(0, 8))
def test_index_and_pools_agree(chains: list[tuple[int, int]], capacity: int) -> None:
    """However chains are stored and evicted, one walk of the index tells what each pool holds."""
    index = PrefixIndex(4)
    pools = [
        BlockPool(capacity, partial(index.stored, id), partial(index.evicted, id))
        for id in range(4)
    ]
    for turn, (id, length) in enumerate(chains):
        blocks = [(turn % 3, position) for position in range(length)]
        count = pools[id].store_pinned(blocks)
        pools[id].unpin(blocks[:count])
        pools[id].check_integrity()
        assert pools[id].used + pools[id].free == capacity
        for family in range(3):
            chain = [(family, position) for position in range(6)]
            assert index.match(chain) == [pool.match(chain) for pool in pools]
    for pool in pools:
        assert pool.make_room(capacity)
    assert index.holders == {}


def test_the_index_knows_how_deep_each_instance_goes() -> None:
    """0 has ab, 1 has a, 2 has b without a, 3 has abc."""
    index = PrefixIndex(4)
    for instance, blocks in enumerate(["ab", "a", "b", "abc"]):
        for block in blocks:
            index.stored(instance, [block])
    assert index.match("abcd") == [2, 1, 0, 3]
    assert index.match("x") == [0, 0, 0, 0]
    assert index.match("") == [0, 0, 0, 0]
    index.evicted(3, ["a"])
    assert index.match("abcd") == [2, 1, 0, 0]
