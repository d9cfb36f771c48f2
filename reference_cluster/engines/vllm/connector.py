"""How does vLLM keep and fetch KV through our pool? By this connector, named in its config:

    {"kv_connector": "PoolConnector",
     "kv_connector_module_path": "reference_cluster.engines.vllm.connector",
     "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
     "kv_connector_extra_config": {"transport": "shm", "pool_bytes": 268435456}}

Loads are asynchronous: a request waits for its blocks while others run. Saves are done when a step
ends. The answer's `kv_transfer_params` say where the prompt's blocks lie; sent along with the
request to another worker, they let it fetch them. Only whole blocks move, as opaque bytes: how keys
and values lie inside one is the business of vLLM's kernel, and differs by machine.

For vLLM 0.32, one rank a worker. Not kept: KV of LoRA, images, salted prompts and produced tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import import_module
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from reference_cluster.engines.vllm.mover import Mover
from reference_cluster.engines.vllm.planner import Load, Planner, Save
from reference_cluster.engines.vllm.store import HEADER_BYTES, Slots
from reference_cluster.transports.bytes import ByteTransport, Endpoint, Segment, sweep

TRANSPORTS = {
    "shm": ("reference_cluster.transports.shm", "ShmTransport"),
    "tcp": ("reference_cluster.transports.tcp", "TcpTransport"),
}
POOL_BYTES, DEADLINE_S = 256 << 20, 10.0


@dataclass
class Moves(KVConnectorMetadata):  # type: ignore[misc,unused-ignore]  # vLLM need not be there
    """All that the worker learns of a step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Opened(KVConnectorHandshakeMetadata):  # type: ignore[misc,unused-ignore]  # vLLM need not be there
    """What the worker tells the scheduler once: how to reach its memory, and its size."""

    endpoint: Endpoint
    slots: int


class PoolConnector(KVConnectorBase_V1):  # type: ignore[misc,unused-ignore]  # vLLM need not be there
    """One object in vLLM's scheduler, with the planner, and one in its worker, with the mover."""

    # Label of the hits in vllm:prompt_tokens_cached_by_source_total.
    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if vllm_config.parallel_config.world_size != 1:
            raise ValueError("PoolConnector: one rank a worker; set the parallel sizes to 1")
        transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
        self.option = transfer.get_from_extra_config
        self.namespace = namespace_of(vllm_config)
        self.counts: dict[str, int] = {}
        self.mover: Mover | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.planner = Planner(
                cache.block_size, transfer.is_kv_consumer, transfer.is_kv_producer
            )

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # What is not saved is a miss later, no lost hand-over.

    # ---- in the scheduler, in the order in which vLLM calls ---------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        (opened,) = metadata.values()
        self.planner.open(opened.endpoint, opened.slots)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self.tables = kv_cache_manager

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self.planner.external_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        # The whole table comes from vLLM itself: after a preemption it is another one.
        loads, saves = self.planner.step(
            scheduler_output.num_scheduled_tokens,
            lambda request_id: self.tables.get_block_ids(request_id)[0],
        )
        return Moves(loads, saves)

    def update_connector_output(self, connector_output: Any) -> None:
        ended = connector_output.finished_recving or ()
        self.planner.loaded(sorted(ended), connector_output.invalid_block_ids)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Saves are copies, done by now: the engine's blocks are free at once.
        return False, self.planner.finished(request)

    # ---- in the worker -----------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """One tensor a layer, its first index the block."""
        layers = list(kv_caches.values())
        blocks = self._kv_cache_config.num_blocks
        if any(not one.is_contiguous() or one.shape[0] != blocks for one in layers):
            shape = tuple(layers[0].shape)
            raise ValueError(f"PoolConnector: a layer is {shape}, not {blocks} whole blocks")
        self.layers = [one.view(blocks, -1).view(torch.uint8) for one in layers]
        payload_bytes = sum(one.shape[1] for one in self.layers)
        count = int(self.option("pool_bytes", POOL_BYTES)) // (HEADER_BYTES + payload_bytes)
        if not count:
            raise ValueError(f"PoolConnector: pool_bytes has no room for {payload_bytes} bytes")
        prefix = self.option("segment_prefix", "mcb-vllm-")
        sweep(prefix)  # What workers that were killed have left.
        segment = Segment.create(count * (HEADER_BYTES + payload_bytes), prefix)
        slots = Slots(segment.buffer, self.namespace, payload_bytes)
        deadline_s = float(self.option("deadline_s", DEADLINE_S))
        transport = make_transport(self.option("transport", "shm"))
        self.mover = Mover(segment, slots, transport, self.fill, deadline_s)
        self.counts = self.mover.counts
        self.opened = Opened(self.mover.start(), count)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self.opened

    def fill(self, block_id: int, payload: memoryview) -> None:
        """The engine's block gets these bytes, layer after layer."""
        data, at = torch.frombuffer(payload, dtype=torch.uint8), 0
        for layer in self.layers:
            size = layer.shape[1]
            layer[block_id].copy_(data[at : at + size])
            at += size

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.mover is not None
        for load in self.moves.loads:
            self.mover.submit(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Whoever runs has all its blocks."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Saved when the step ends, all layers of a block together."""

    def wait_for_save(self) -> None:
        assert self.mover is not None
        for block_id, slot, key in self.moves.saves:
            self.mover.slots.put(slot, key, self.parts(block_id))
            self.counts["saved_blocks"] += 1

    def parts(self, block_id: int) -> Iterable[memoryview]:
        return (memoryview(layer[block_id].cpu().numpy()) for layer in self.layers)

    @property
    def moves(self) -> Moves:
        moves = self._get_connector_metadata()
        assert isinstance(moves, Moves)
        return moves

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self.mover is not None
        ended, self.lost = self.mover.take_ended()
        return None, ended

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.lost  # vLLM asks right after get_finished.

    def shutdown(self) -> None:
        if self.mover is not None:
            self.mover.close()
            self.mover = None


def namespace_of(vllm_config: Any) -> bytes:
    """8 bytes; workers with the same can use each other's blocks."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    name = vllm_config.kv_transfer_config.get_from_extra_config("namespace", model.model)
    isa = torch.backends.cpu.get_cpu_capability()
    parts = (name, str(model.dtype), cache.cache_dtype, cache.block_size, isa)
    return blake2b(repr(parts).encode(), digest_size=8).digest()


def make_transport(name: str) -> ByteTransport:
    """Raises ValueError for a name that is not known."""
    if name not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise ValueError(f"PoolConnector: transport {name!r} is none of {known}")
    module, kind = TRANSPORTS[name]
    made: ByteTransport = getattr(import_module(module), kind)()
    return made
