"""How is one instance built from a config? For a cluster in one process and for a worker alike."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from reference_cluster.colocated import ColocatedInstance
from reference_cluster.config import ClusterConfig
from reference_cluster.cost_model import CostModel, Profile
from reference_cluster.decode import DecodeInstance
from reference_cluster.engines.base import Engine
from reference_cluster.engines.modelled import ModelledEngine
from reference_cluster.errors import ConfigError
from reference_cluster.kvpool.pool import BlockPool, OnChange
from reference_cluster.kvpool.quota import TenantQuota
from reference_cluster.kvpool.ssd import SsdTier
from reference_cluster.messenger import Delivery
from reference_cluster.policies.admission import make_admission
from reference_cluster.policies.view import Holder
from reference_cluster.prefill import PrefillInstance, Queued
from reference_cluster.request import OnEnd, Request


class Parts:
    """The parts of one configured cluster, made one by one."""

    def __init__(
        self,
        config: ClusterConfig,
        profile: Profile,
        steps_max: int | None = None,
        is_worker: bool = False,
    ) -> None:
        if config.pool.kv_bytes_per_token:
            per_token = config.pool.kv_bytes_per_token
            profile = msgspec.structs.replace(profile, kv_bytes_per_token=per_token)
        self.config = config
        self.profile = profile
        self.steps_max = steps_max
        if config.system == "colocated":
            caching = config.colocated.prefix_caching
            self.cost = CostModel(profile, is_reuse_on_device=True, is_prefix_caching=caching)
        else:
            stages, chunk_tokens = config.prefill.nodes_per_group, config.prefill.chunk_tokens
            self.cost = CostModel(profile, stages=stages, chunk_tokens=chunk_tokens)
        # Only a worker computes for real. It loads the model first of all, before anybody who
        # reaches it could take it for one that hangs.
        self.real_engine: Engine | None = None
        if is_worker and config.engine.kind == "torch":
            self.real_engine = self.torch_engine()

    def engine(self) -> Engine:
        return self.real_engine or ModelledEngine(self.cost, self.steps_max)

    def torch_engine(self) -> Engine:
        """Imported only here: it is an extra, and takes seconds."""
        try:
            from reference_cluster.engines.torch.engine import TorchEngine, replica_of
        except ImportError as error:
            raise ConfigError(
                f"engine.kind \"torch\" needs {error.name}; pip install 'mooncake-bench[torch]'"
            ) from None
        engine = TorchEngine(replica_of(self.config.engine), self.config.block_tokens)
        layers, block_bytes = engine.runner.model.config.layers, engine.block_bytes
        if (layers, block_bytes) != (self.profile.layers, self.profile.layers * self.layer_bytes):
            raise ConfigError(
                f"profile {self.profile.name} has {self.profile.layers} layers and "
                f"{self.profile.kv_bytes_per_token} KV bytes a token, the model {layers} and "
                f"{block_bytes // self.config.block_tokens}; use the model's own profile"
            )
        if (
            self.config.system == "colocated"
            and self.capacity_tokens > self.config.engine.kv_tokens
        ):
            raise ConfigError(
                f"colocated.device_tokens {self.capacity_tokens} exceed engine.kv_tokens "
                f"{self.config.engine.kv_tokens}; give the engine more, or the instance less"
            )
        return engine

    @property
    def layer_bytes(self) -> int:
        """Of one block, in whole words: blocks of real bytes are at most a little smaller."""
        size = self.config.block_tokens * self.profile.kv_bytes_per_token
        return max(8, size // self.profile.layers // 8 * 8)

    @property
    def dram_blocks(self) -> int:
        """Of one prefill instance's pool: the memory of all nodes of its group."""
        if self.config.engine.kind == "vllm":
            return self.blocks_in(self.config.vllm.pool_bytes)
        width = self.config.prefill.nodes_per_group
        tokens = width * (self.config.prefill.dram_tokens or self.profile.dram_kv_tokens)
        return tokens // self.config.block_tokens

    @property
    def capacity_tokens(self) -> int:
        """KV that one instance's device memory has room for."""
        config = self.config
        if config.engine.kind == "vllm":
            is_apart = config.system == "disaggregated"
            given = (config.decode if is_apart else config.colocated).device_tokens
            return given or (self.blocks_in(config.vllm.kv_bytes) - 1) * config.block_tokens
        if config.system == "disaggregated":
            device_tokens = config.decode.device_tokens or self.profile.device_kv_tokens
            if config.network.transport != "modelled":
                # All of a prompt's bytes must find room at its decode worker.
                return min(device_tokens, config.pool.working_tokens)
            return device_tokens
        tokens = config.colocated.device_tokens or self.profile.device_kv_tokens
        return tokens // config.block_tokens * config.block_tokens

    def blocks_in(self, size: int) -> int:
        """Blocks that so many bytes of vLLM's or of its connector's have room for."""
        return size // (self.config.block_tokens * self.profile.kv_bytes_per_token)

    def prefill(
        self,
        id: int,
        stored: OnChange,
        evicted: OnChange,
        fetch: Callable[[Queued, Holder], None],
        hand_over: Callable[[Request, float], Delivery | None],
        on_prefilled: Callable[[Request, Delivery | None], None],
        make_ssd: Callable[[BlockPool], SsdTier | None] | None = None,
    ) -> PrefillInstance:
        """`make_ssd` where blocks have bytes, and SSD is a file; else it is modelled."""
        pool = BlockPool(self.dram_blocks, stored, evicted, self.config.prefill.eviction)
        ssd = (make_ssd or self.ssd)(pool)
        share = self.config.pool.tenant_quota_share
        return PrefillInstance(
            id,
            self.cost,
            self.engine(),
            pool,
            ssd,
            self.config.block_tokens,
            self.config.prefill.chunk_tokens,
            fetch,
            hand_over,
            on_prefilled,
            None if share is None else TenantQuota(pool, share),
        )

    def ssd(self, pool: BlockPool) -> SsdTier | None:
        if not self.ssd_blocks:
            return None
        block_bytes = self.cost.kv_bytes(self.config.block_tokens)
        width = self.config.prefill.nodes_per_group
        return SsdTier(pool, self.ssd_blocks, block_bytes, width * self.profile.ssd_bytes_per_s)

    @property
    def ssd_blocks(self) -> int:
        prefill = self.config.prefill
        return prefill.nodes_per_group * prefill.ssd_tokens // self.config.block_tokens

    def decode(self, id: int, on_end: OnEnd) -> DecodeInstance:
        config = self.config
        is_rechecking = make_admission(config.conductor, config.slo, self.cost).is_rechecking
        tbt_slo_s = config.slo.tbt_s if is_rechecking else None
        batch_max, capacity = config.decode.batch_max, self.capacity_tokens
        return DecodeInstance(id, self.cost, self.engine(), capacity, batch_max, tbt_slo_s, on_end)

    def colocated(
        self,
        id: int,
        stored: OnChange,
        evicted: OnChange,
        on_end: OnEnd,
        on_started: Callable[[Request], None] = lambda request: None,
    ) -> ColocatedInstance:
        config = self.config
        blocks = self.capacity_tokens // config.block_tokens
        pool = BlockPool(blocks, stored, evicted, config.colocated.eviction)
        return ColocatedInstance(
            id,
            self.cost,
            self.engine(),
            pool,
            config.block_tokens,
            config.colocated,
            on_end,
            on_started,
        )
