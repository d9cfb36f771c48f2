"""How much of a pool may one tenant fill? Beyond its share its own idle blocks go, no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from reference_cluster.kvpool.pool import BlockPool
from reference_cluster.request import Block


class TenantQuota:
    """Whose blocks a pool holds, and how many more each tenant may store.

    Tenants are told apart by the salts of their prompts, so that no two have a block in common.
    What came without a tenant, or as a replica, is not counted.
    """

    def __init__(self, pool: BlockPool, share: float) -> None:
        self.pool = pool
        self.blocks_max = int(share * pool.capacity)
        self.tenants: dict[Block, str] = {}
        self.held: Counter[str] = Counter()  # Blocks by tenant.
        self.on_evicted, pool.on_evicted = pool.on_evicted, self.evicted

    def claim(self, tenant: str, blocks: Sequence[Block]) -> None:
        """These are in the pool, and the tenant's."""
        for block in blocks:
            if block not in self.tenants:
                self.tenants[block] = tenant
                self.held[tenant] += 1

    def evicted(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            tenant = self.tenants.pop(block, None)
            if tenant is not None:
                self.held[tenant] -= 1
        self.on_evicted(blocks)

    def room(self, tenant: str, blocks: Sequence[Block]) -> int:
        """How many leading blocks the tenant may store, now that idle ones of its own made room."""
        fresh = [place for place, block in enumerate(blocks) if block not in self.tenants]
        over = self.held[tenant] + len(fresh) - self.blocks_max
        if over > 0:
            over -= self.make_room(tenant, over, keep=frozenset(blocks))
        if over <= 0 or not fresh:
            return len(blocks)
        return fresh[max(0, len(fresh) - over)]

    def make_room(self, tenant: str, count: int, keep: frozenset[Block]) -> int:
        """Evict so many of its idle blocks, in the pool's order; returns how many there were."""
        own = (one for one in self.pool.idle if self.tenants.get(one) == tenant)
        gone = list(islice((one for one in own if one not in keep), count))
        self.pool.evict_these(gone)
        return len(gone)

    def check_integrity(self) -> None:
        """Raise AssertionError where it counts what is not there."""
        assert +self.held == Counter(self.tenants.values()), "tenants' counts are wrong"
        absent = sum(block not in self.pool for block in self.tenants)
        assert not absent, f"{absent} blocks of tenants are not in {self.pool!r}"
