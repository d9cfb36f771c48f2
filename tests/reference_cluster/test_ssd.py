"""What does an SSD below the DRAM pool keep, and what does its use cost?

A block of 10 tokens has 1 kB, and is read in 0.1 s here; a prompt of 100 tokens takes 0.2 s to
compute and leaves 10 blocks, of which DRAM has room for 20.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from reference_cluster.cluster import Cluster
from reference_cluster.config import ClusterConfig
from reference_cluster.kvpool.index import PrefixIndex
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.ssd import SsdTier
from reference_cluster.request import Request
from tests.reference_cluster.small import a_config, a_profile, a_request, random_requests, served

SLOW_SSD = a_profile(ssd_bytes_per_s=1e4)
CHAINS = {name: [f"{name}{position}" for position in range(10)] for name in "abcd"}


def with_ssd(ssd_tokens: int = 1000, dram_tokens: int = 200, **fields: Any) -> ClusterConfig:
    return a_config(prefill={"dram_tokens": dram_tokens, "ssd_tokens": ssd_tokens}, **fields)


def prompts(*names: str, at_s: float = 20.0) -> tuple[list[Request], list[Request]]:
    """The prompts a, b and c one after the other, and more of them all at once at `at_s`.

    By then a has made room in DRAM for c.
    """
    before = [
        a_request(id, output_tokens=1, blocks=CHAINS[name], arrived_s=5.0 * id)
        for id, name in enumerate("abc")
    ]
    again = [
        a_request(10 + id, output_tokens=1, blocks=CHAINS[name], arrived_s=at_s)
        for id, name in enumerate(names)
    ]
    return before, again


def test_what_dram_lets_go_is_read_back() -> None:
    """10 blocks in 1 s, then 0.101 s for the last token; all of it predicted."""
    before, [again] = prompts("a")
    cluster = served(with_ssd(), [*before, again], profile=SLOW_SSD)
    assert again.reused_tokens == 99
    stamps = again.timeline
    assert stamps.fetched_s == stamps.prefill_start_s == pytest.approx(21.0)
    assert stamps.prefill_end_s == pytest.approx(21.101)
    assert again.predicted_ttft_s == pytest.approx(1.101)
    assert again.fetched_tokens == 0  # Of other instances.
    ssd = cluster.prefill[0].ssd
    assert ssd is not None
    assert ssd.read_blocks == 10


def test_without_an_ssd_it_is_computed_again() -> None:
    """0.2 s, at once."""
    before, [again] = prompts("a")
    served(with_ssd(ssd_tokens=0), [*before, again], profile=SLOW_SSD)
    assert again.reused_tokens == 0
    assert again.timeline.prefill_end_s == pytest.approx(20.2)


def test_a_read_does_not_hold_up_others() -> None:
    """d needs nothing from the SSD and is computed during the read."""
    before, [again, other] = prompts("a", "d")
    served(with_ssd(dram_tokens=400), [*before, again, other], profile=SLOW_SSD)
    assert again.timeline.prefill_start_s == 20.0  # DRAM for 40 blocks has kept it.
    before, [again, other] = prompts("a", "d")
    served(with_ssd(), [*before, again, other], profile=SLOW_SSD)
    assert other.timeline.prefill_start_s == 20.0
    assert again.timeline.prefill_start_s == pytest.approx(21.0)


def test_reads_wait_for_each_other() -> None:
    """Room for 10 blocks when a and b are on SSD: with 20 in DRAM, b's read ends 1 s after a's."""
    before, again = prompts("a", "b")
    more = [a_request(5, output_tokens=1, blocks=CHAINS["d"], arrived_s=15.0)]
    served(with_ssd(), [*before, *more, *again], profile=SLOW_SSD)
    assert [one.timeline.fetched_s for one in again] == pytest.approx([21.0, 22.0])
    assert again[1].predicted_ttft_s == pytest.approx(2.101)


def test_who_needs_what_is_being_read_waits_for_it() -> None:
    """The same prompt twice at once is read once."""
    before, again = prompts("a", "a")
    cluster = served(with_ssd(), [*before, *again], profile=SLOW_SSD)
    assert [one.timeline.fetched_s for one in again] == pytest.approx([21.0, 21.0])
    assert [one.reused_tokens for one in again] == [99, 99]
    assert cluster.prefill[0].ssd is not None
    assert cluster.prefill[0].ssd.read_blocks == 10


def test_the_oldest_leave_the_ssd_for_good() -> None:
    """Room for 5 blocks: a's first five stay, which DRAM let go last."""
    before, [again] = prompts("a")
    served(with_ssd(ssd_tokens=50), [*before, again], profile=SLOW_SSD)
    assert again.reused_tokens == 50
    assert again.timeline.fetched_s == pytest.approx(20.5)


def test_a_cancel_during_a_read_frees_all() -> None:
    """`served` checks that nothing stays; the next one finds the blocks where they are now."""
    before, [gone] = prompts("a")
    [later] = prompts("a", at_s=30.0)[1]
    later.id = 20
    served(with_ssd(), [*before, gone, later], cancels=[(20.5, gone)], profile=SLOW_SSD)
    assert gone.timeline.fetched_s is None
    assert later.timeline.prefill_start_s == 30.0
    assert later.reused_tokens == 99


def test_a_fetch_waits_for_the_holders_read() -> None:
    """prefill-0 has a on SSD and computes until 38 s: prefill-1 gets it after 1 s of reading and
    9.9 ms of transfer, as predicted."""
    before, _ = prompts()
    busy = a_request(8, 18_000, 1, arrived_s=20.0)
    wanting = a_request(9, output_tokens=1, blocks=CHAINS["a"], arrived_s=20.0)
    cluster = served(with_ssd(prefill_instances=2), [*before, busy, wanting], profile=SLOW_SSD)
    assert (before[0].prefill, busy.prefill, wanting.prefill) == (
        "prefill-0",
        "prefill-0",
        "prefill-1",
    )
    assert wanting.fetched_tokens == wanting.reused_tokens == 99
    assert wanting.timeline.fetched_s == pytest.approx(21.0099)
    assert wanting.predicted_ttft_s == pytest.approx(1.0099 + 0.101)
    assert cluster.prefill[1].pool.match(CHAINS["a"]) == 10


def test_a_group_of_nodes_has_their_ssds() -> None:
    """Twice the blocks, read twice as fast."""
    config = a_config(
        prefill_instances=2,
        prefill={"dram_tokens": 100, "ssd_tokens": 500, "nodes_per_group": 2},
    )
    before, [again] = prompts("a")
    cluster = served(config, [*before, again], profile=SLOW_SSD)
    ssd = cluster.prefill[0].ssd
    assert ssd is not None
    assert ssd.blocks.capacity == 100
    assert again.timeline.fetched_s == pytest.approx(20.5)


# ---- the tier alone --------------------------------------------------------------------------


def a_tier(dram: int, ssd: int) -> tuple[SsdTier, PrefixIndex]:
    index = PrefixIndex(1)
    pool = BlockPool(dram, partial(index.stored, 0), partial(index.evicted, 0))
    return SsdTier(pool, ssd, block_bytes=1.0, bytes_per_s=10.0), index


def keep(tier: SsdTier, *blocks: str) -> None:
    tier.dram.unpin(blocks[: tier.dram.store_pinned(blocks)])


def test_only_what_finds_room_in_dram_is_read() -> None:
    """Two of DRAM's three blocks are needed by somebody: one of a and b comes up."""
    tier, index = a_tier(3, 9)
    keep(tier, "a", "b", "x")
    keep(tier, "p", "q", "r")
    assert tier.match("ab") == 2
    tier.dram.pin("pq")
    assert tier.hold("ab", 0.0) == (1, pytest.approx(0.1))
    assert ("a" in tier.dram, "b" in tier.dram, "b" in tier.blocks) == (True, False, True)
    assert index.match("ab") == [2]
    tier.check_integrity()


def test_reading_pushes_nothing_out_that_is_being_read() -> None:
    """Both tiers are full: r, q and p go down as a, b and x come up."""
    tier, index = a_tier(3, 3)
    keep(tier, "a", "b", "x")
    keep(tier, "p", "q", "r")
    assert tier.hold("abx", 0.0) == (3, pytest.approx(0.3))
    assert sorted(map(str, tier.blocks.idle)) == ["p", "q", "r"]
    assert index.match("pqr") == [3]
    tier.check_integrity()


def test_a_block_under_way_has_not_arrived() -> None:
    """It is in DRAM's books at once, and there from 0.2 s on."""
    tier, _ = a_tier(2, 2)
    keep(tier, "a", "b")
    keep(tier, "c", "d")
    tier.hold("ab", 0.0)
    assert tier.arrived("ab", 0.1) == 0
    assert tier.arrived("ab", 0.2) == 2


def test_a_block_computed_anew_leaves_the_ssd() -> None:
    """One tier only, although nobody read it."""
    tier, index = a_tier(2, 3)
    keep(tier, "a", "b")
    keep(tier, "c", "d")
    keep(tier, "a")
    assert sorted(map(str, tier.blocks.idle)) == ["b", "d"]
    assert index.match("ab") == [2]
    tier.check_integrity()


def test_the_integrity_check_sees_a_block_in_both_tiers() -> None:
    """And says how many."""
    tier, _ = a_tier(2, 2)
    keep(tier, "a")
    tier.blocks.idle["a"] = None
    with pytest.raises(AssertionError, match="1 blocks are on SSD and in DRAM"):
        tier.check_integrity()


def agrees(cluster: Cluster) -> None:
    """What the index says of every instance is what its two tiers hold; the books balance."""
    index = cluster.conductor.index
    for family in range(4):
        chain = [f"family-{family}-{position}" for position in range(60)]
        for instance, depth in zip(cluster.prefill, index.match(chain), strict=True):
            assert instance.ssd is not None
            assert depth == instance.ssd.match(chain)
    cluster.check_integrity()


@pytest.mark.parametrize("ssd_tokens", [10, 300, 100_000])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "length-aware"])
def test_the_index_knows_both_tiers(ssd_tokens: int, eviction: str) -> None:
    """300 random requests with shared prefixes, three instances, little DRAM, some cancelled."""
    requests = random_requests(11, 300)
    cancels = [(one.timeline.arrived_s + 0.3, one) for one in requests[::7]]
    config = a_config(
        prefill_instances=3,
        prefill={"dram_tokens": 400, "ssd_tokens": ssd_tokens, "eviction": eviction},
    )
    looks = [(float(at_s), agrees) for at_s in range(1, 60)]
    cluster = served(config, requests, cancels, SLOW_SSD, looks=looks)
    agrees(cluster)
    for request in requests:
        stamps = request.timeline
        if request.status == "finished":
            assert stamps.fetched_s is not None
            assert stamps.prefill_start_s is not None
            assert stamps.arrived_s <= stamps.fetched_s <= stamps.prefill_start_s


def test_a_larger_ssd_saves_more_computing() -> None:
    """Of the same requests on a fast SSD."""
    reused = []
    for ssd_tokens in (0, 1000, 100_000):
        requests = random_requests(11, 300)
        served(with_ssd(ssd_tokens, prefill_instances=3), requests)
        reused.append(sum(one.reused_tokens for one in requests))
    assert reused[0] < reused[1] < reused[2]
