"""Does a tenant keep to its share of a pool, and are the others left in peace?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from reference_cluster.config import Eviction, PoolConfig
from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.kvpool.quota import TenantQuota
from reference_cluster.policies.eviction import LeastFrequentlyUsed
from reference_cluster.request import Request
from tests.reference_cluster.live import live
from tests.reference_cluster.small import a_config, a_request, served


def store(quota: TenantQuota, tenant: str, blocks: Sequence[str]) -> int:
    """As an instance does: store what is allowed, pinned; how many were kept."""
    kept = quota.pool.store_pinned(blocks[: quota.room(tenant, blocks)])
    quota.claim(tenant, blocks[:kept])
    quota.check_integrity()
    return kept


def test_beyond_its_share_a_tenants_own_idle_blocks_go() -> None:
    """4 of 10 blocks: for e and f the ends of its last prompt make room, b's blocks stay."""
    quota = TenantQuota(BlockPool(10), 0.4)
    for tenant, blocks in (("a", "abcd"), ("b", "xyz")):
        assert store(quota, tenant, blocks) == len(blocks)
        quota.pool.unpin(blocks)
    assert store(quota, "a", "ef") == 2
    assert [quota.pool.match([one]) for one in "abcdefxyz"] == [1, 1, 0, 0, 1, 1, 1, 1, 1]


def test_blocks_in_use_leave_that_much_less_room() -> None:
    """3 of 4 are pinned: of a longer prompt one block more is kept, of what is there all."""
    quota = TenantQuota(BlockPool(10), 0.4)
    assert store(quota, "a", "abc") == 3
    assert store(quota, "a", "abcdef") == 4
    assert store(quota, "a", "abcd") == 4
    assert store(quota, "a", "ghi") == 0


@pytest.mark.parametrize("eviction", ["lru", "lfu", "length-aware"])
def test_no_tenant_ever_has_more_than_its_share(eviction: Eviction) -> None:
    """Random prompts of three tenants and of nobody, in a pool that is full most of the time."""
    rng = random.Random(3)
    pool = BlockPool(12, eviction=eviction)
    quota = TenantQuota(pool, 0.25)
    for _ in range(500):
        tenant = rng.choice("abc-")
        blocks = [f"{tenant}{rng.randrange(4)}.{place}" for place in range(rng.randint(1, 5))]
        kept = pool.store_pinned(blocks) if tenant == "-" else store(quota, tenant, blocks)
        pool.unpin(blocks[:kept])
        pool.check_integrity()
        assert max(quota.held.values(), default=0) <= 3
    if isinstance(pool.idle, LeastFrequentlyUsed):
        assert pool.idle.uses.keys() == pool.idle.keys()  # What has gone is forgotten.


def test_an_instance_keeps_its_tenants_apart() -> None:
    """A pool of 20 blocks, 5 a tenant: of a's prompt of 8 blocks 5 stay, all 8 of nobody's.

    When each comes again, 50 tokens are reused of a's 80, and 79 of nobody's.
    """
    config = a_config(prefill={"dram_tokens": 200}, pool={"tenant_quota_share": 0.25})

    def prompt(id: int, arrived_s: float, tenant: str | None) -> Request:
        blocks = [(tenant, place) for place in range(8)]
        request = a_request(id, 80, 1, arrived_s, blocks)
        request.tenant = tenant
        return request

    again = [prompt(2, 20.0, "a"), prompt(3, 30.0, None)]
    served(config, [prompt(0, 0.0, "a"), prompt(1, 10.0, None), *again])
    assert [one.reused_tokens for one in again] == [50, 79]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_a_part_of_one(share: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        PoolConfig(tenant_quota_share=share)


@pytest.mark.live
@pytest.mark.timeout(60)
def test_a_worker_keeps_to_the_quota_with_real_bytes() -> None:
    """As above, in processes: a salt is a tenant, and what is not kept gives its memory back."""
    config = a_config(
        workers={"placement": "processes"},
        network={"transport": "shm"},
        prefill={"dram_tokens": 200},
        pool={"kv_bytes_per_token": 4096, "working_tokens": 400, "tenant_quota_share": 0.25},
    )
    prompt = [*range(1000, 1080)]
    with live(config) as (client, _):
        reused = []
        for salt in ({"cache_salt": "a"}, {}):
            for _again in range(2):
                body = {"prompt": prompt, "max_tokens": 2, **salt}
                answer = client.post("/v1/completions", json=body).json()
                reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert reused == [0, 50, 0, 79]
