"""How far apart are the uses of a block, and what could a cache of some size have kept?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.statistics import prefix_hits, reuse, stack_distances
from workloads.trace import Trace


def test_a_distance_counts_different_blocks_since_the_last_use() -> None:
    """a b b c a: one block since the first b would be 0; b and c since the first a are 2."""
    assert stack_distances([0, 1, 1, 2, 0]).tolist() == [0, 2]


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 7))
def test_an_lru_cache_has_what_is_nearer_than_its_size(codes: list[int], capacity: int) -> None:
    """Requests of one block: a hit is a use at a distance less than the capacity."""
    hits = sum(prefix_hits(codes, [*range(1, len(codes) + 1)], capacity))
    assert hits == int((stack_distances(codes) < capacity).sum())


def test_following_some_blocks_says_what_following_all_does(conversation: Trace) -> None:
    """At the sizes of real pools the shares differ by less than 0.05."""
    exact, some = reuse(conversation, looked_at=10**9), reuse(conversation)
    for size in (1_000, 10_000, 50_000):
        shares = [
            np.interp(size, one["distance_blocks"], one["share"], left=0.0) for one in (exact, some)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)
