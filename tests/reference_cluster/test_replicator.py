"""Which blocks are copied ahead of demand, and where they go."""

from __future__ import annotations

import asyncio

from reference_cluster.cluster import Cluster
from reference_cluster.policies.replication import hottest
from tests.reference_cluster.small import a_config, a_request, with_cluster

SHARED = [f"s{position}" for position in range(5)]


def test_the_most_used_come_first_and_used_once_never() -> None:
    """Of equals the first seen goes first: the beginning of a prefix before its end."""
    uses = {"a": 2, "b": 2, "once": 1, "most": 9}
    assert hottest(uses, 2) == ["most", "a"]
    assert hottest(uses, 10) == ["most", "a", "b"]
    assert hottest({}, 3) == []


def holders(keys: int) -> list[int]:
    """How many of SHARED each of three prefill instances holds after two requests and a while."""
    prefill = {"replicate_keys": keys, "replicate_every_s": 5.0}
    config = a_config(
        prefill_instances=3, prefill=prefill, conductor={"scheduling": "local-cache-aware"}
    )

    async def script(cluster: Cluster) -> list[int]:
        for id in range(2):
            request = a_request(id, 60, 1, cluster.loop.time(), [*SHARED, f"own-{id}"])
            cluster.submit(request)
            await asyncio.sleep(1.0)
        await asyncio.sleep(10.0)
        cluster.check_integrity()
        return [one.pool.match(SHARED) for one in cluster.prefill]

    return with_cluster(config, script)


def test_hot_blocks_reach_every_instance() -> None:
    """Both requests went to instance 0; the five blocks they share are used twice."""
    assert holders(keys=0) == [5, 0, 0]
    assert holders(keys=5) == [5, 5, 5]
    # The first two of the prefix, not any two.
    assert holders(keys=2) == [5, 2, 2]
