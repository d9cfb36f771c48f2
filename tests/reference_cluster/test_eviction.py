"""Does each eviction policy let the right block go, and how much of a trace does it keep?"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import get_args

import pytest

from reference_cluster.config import Eviction
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.replay import Hits, replay_chains
from reference_cluster.policies.eviction import LeastFrequentlyUsed
from reference_cluster.request import Block
from tests.reference_cluster.small import a_config, a_request, served

POLICIES: tuple[Eviction, ...] = get_args(Eviction)
EVERY = pytest.mark.parametrize("eviction", POLICIES)
CONVERSATION = (
    Path(os.environ.get("MOONCAKE_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
    / "conversation_trace.jsonl"
)


class Filled:
    """A pool that chains of blocks have used, each once from start to end."""

    def __init__(self, eviction: Eviction, *chains: str) -> None:
        self.evicted: list[Block] = []
        self.pool = BlockPool(sum(map(len, set(chains))), eviction=eviction)
        self.pool.on_evicted = self.evicted.extend
        for chain in chains:
            self.use(chain)

    def use(self, chain: str) -> None:
        self.pool.unpin(chain[: self.pool.store_pinned(chain)])

    def order(self) -> str:
        """All blocks in the order in which they go."""
        self.pool.make_room(self.pool.capacity)
        return "".join(map(str, self.evicted))


@pytest.mark.parametrize(
    ("eviction", "order"), [("lru", "dcbafe"), ("lfu", "dcfeba"), ("length-aware", "dfceba")]
)
def test_each_policy_has_its_order(eviction: Eviction, order: str) -> None:
    """cd once, a and b again and again, ef once and last.

    LRU goes by time, LFU by uses and then time, LengthAware by uses and then depth (d and f are
    the second of their prompts) and then time.
    """
    assert Filled(eviction, "ab", "cd", "ab", "ef").order() == order


@EVERY
def test_a_pinned_block_stays_whatever_the_policy(eviction: Eviction) -> None:
    """c was used once and is the deepest, but somebody counts on it."""
    filled = Filled(eviction, "abc")
    filled.pool.pin("c")
    assert not filled.pool.make_room(3)
    assert sorted(map(str, filled.evicted)) == ["a", "b"]
    filled.pool.check_integrity()
    filled.pool.unpin("c", depth=2)
    assert filled.order()[-1] == "c"


@pytest.mark.parametrize("eviction", ["lfu", "length-aware"])
def test_what_was_evicted_begins_anew(eviction: Eviction) -> None:
    """a was used three times, went, and came back once: it goes before b with its two uses."""
    filled = Filled(eviction, "a", "a", "a")
    filled.pool.make_room(1)
    filled.pool.capacity = 2
    for block in "bba":
        filled.use(block)
    assert filled.order() == "aab"


def test_a_part_of_a_prompt_keeps_its_depth() -> None:
    """The middle of a prompt, fetched by another instance and released here: still the middle."""
    filled = Filled("length-aware", "abcd")
    filled.pool.pin("bc")
    filled.pool.unpin("bc", depth=1)
    assert filled.order() == "dacb"


def test_a_frequency_order_does_not_grow_with_use() -> None:
    """A thousand uses of two blocks: what is remembered of them stays small."""
    order = LeastFrequentlyUsed()
    for _ in range(1000):
        for block in "ab":
            order[block] = None
            del order[block]
        order["a"] = None
        del order["a"]
    assert len(order) == 0
    assert len(order.heap) <= 64


@EVERY
def test_no_policy_loses_a_block(eviction: Eviction) -> None:
    """2,000 random chains through a pool of 50: it is full, and its books balance throughout."""
    rng = random.Random(5)
    pool = BlockPool(50, eviction=eviction)
    running: list[list[Block]] = []
    for _ in range(2000):
        chain: list[Block] = [
            (rng.randrange(9), position) for position in range(rng.randrange(1, 12))
        ]
        fitted = pool.store_pinned(chain)
        running.append(chain[:fitted])
        if len(running) > 3:
            pool.unpin(running.pop(rng.randrange(3)))
        pool.check_integrity()
        assert pool.used <= 50
    for chain in running:
        pool.unpin(chain)
    assert pool.free == 0
    assert pool.make_room(50)
    assert len(pool.idle) == 0


@EVERY
@pytest.mark.parametrize("system", ["disaggregated", "colocated"])
def test_a_cluster_runs_with_every_policy(system: str, eviction: Eviction) -> None:
    """Room for two prompts of 10 blocks; a is used twice, b once, then c needs room, then a again.

    LRU has let half of a go, which was used longest ago; the others have kept it for its uses.
    """
    a, b, c = ([f"{name}{position}" for position in range(10)] for name in "abc")
    requests = [
        a_request(id, output_tokens=1, blocks=blocks, arrived_s=5.0 * id)
        for id, blocks in enumerate((a, a, b, c, a))
    ]
    pool = {"eviction": eviction, "dram_tokens": 250}
    device = {"eviction": eviction, "device_tokens": 250, "prefix_caching": True}
    served(a_config(system=system, prefill=pool, colocated=device), requests)
    assert requests[1].reused_tokens == 99
    # A colocated instance also needs a block for the answer.
    lru = 50 if system == "disaggregated" else 40
    assert requests[4].reused_tokens == (lru if eviction == "lru" else 99)


# ---- without a cluster -----------------------------------------------------------------------


def test_replayed_chains_hit_what_came_before() -> None:
    """abc, then ab, then abx: 2 + 2 of 8 blocks; the last prompt token never counts."""
    chains = [("abc", 30), ("ab", 20), ("abx", 21)]
    hits = replay_chains(chains, None, block_tokens=10)
    assert hits == Hits(hit_blocks=4, blocks=8, hit_tokens=19 + 20, tokens=71)
    assert hits.block_ratio == 0.5
    assert hits.token_ratio == pytest.approx(39 / 71)


def test_a_prompt_larger_than_the_pool_leaves_its_beginning() -> None:
    """Two of three blocks fit."""
    assert replay_chains([("abc", 30), ("abc", 30)], 2, block_tokens=10).hit_blocks == 2


def test_nothing_replayed_is_no_hits() -> None:
    """And no division by zero."""
    hits = replay_chains([], 10)
    assert (hits.block_ratio, hits.token_ratio) == (0.0, 0.0)


@pytest.mark.skipif(not CONVERSATION.exists(), reason="the conversation trace is not here")
def test_the_conversation_traces_curve() -> None:
    """Token-weighted hits of one LRU pool by its tokens, as measured on the published trace."""
    rows = [json.loads(line) for line in CONVERSATION.read_text().splitlines()]
    chains = [(row["hash_ids"], row["input_length"]) for row in rows]
    measured = {1e5: 0.043, 2e6: 0.086, 5e6: 0.210, 1e7: 0.291, 5e7: 0.371}
    for tokens, ratio in measured.items():
        hits = replay_chains(chains, int(tokens) // 512)
        assert hits.token_ratio == pytest.approx(ratio, abs=0.005)
