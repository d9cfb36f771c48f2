"""How does KV come from a prefill to a decode worker of vLLM? A small class for each connector.

It is asked twice: by a worker's process, before vLLM starts (`setting`), and by the Conductor for
every request, which is sent to both workers with `kv_transfer_params` (`to_prefill`, `to_decode`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.vllm.store import Offer
from reference_cluster.request import Block

Role = Literal["prefill", "decode", "colocated"]
Params = dict[str, Any] | None  # A request's kv_transfer_params.


@dataclass(frozen=True, slots=True)
class Setting:
    """What one worker's process needs."""

    transfer: dict[str, Any] | None = None  # vLLM's kv_transfer_config.
    environment: dict[str, str] = field(default_factory=dict)  # Before vLLM is imported.
    # What the Conductor must know of it: told with its address, found again in `Peer.facts`.
    facts: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """A prefill worker, as the Conductor knows it."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its process has said: `Setting.facts`."""

    def offer(self, blocks: Sequence[Block]) -> Offer | None:
        """Where the leading ones of these lie in its share of our pool."""


class Connector(Protocol):
    """One way for KV to get to the decode worker."""

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting: ...

    def to_prefill(self, transfer_id: str, holder: Peer | None, blocks: Sequence[Block]) -> Params:
        """For the prefill worker; it may fetch these leading blocks from `holder`."""

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        """For the decode worker, when the prefill worker has answered with these."""


class Colocated:
    """No KV goes anywhere."""

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        return Setting()

    def to_prefill(self, transfer_id: str, holder: Peer | None, blocks: Sequence[Block]) -> Params:
        return None

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        return None


class Pool(Colocated):
    """Ours (`connector.py`): whoever is offered blocks reads them out of the other's memory."""

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        return Setting(
            {
                "kv_connector": "PoolConnector",
                "kv_connector_module_path": "reference_cluster.engines.vllm.connector",
                # A prefill worker fetches too: what another one has of the prompt.
                "kv_role": "kv_both" if role == "prefill" else "kv_consumer",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "transport": config.network.transport,
                    "pool_bytes": config.vllm.pool_bytes,
                    "deadline_s": config.failure.transfer_deadline_s,
                    "segment_prefix": segment_prefix,
                },
            }
        )

    def to_prefill(self, transfer_id: str, holder: Peer | None, blocks: Sequence[Block]) -> Params:
        found = holder.offer(blocks) if holder is not None else None
        return None if found is None else {"pool": msgspec.to_builtins(found)}

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        return answered


def make_connector(config: ClusterConfig) -> Connector:
    """The one that the configuration names."""
    if config.system == "colocated":
        return Colocated()
    by_name: dict[str, type[Connector]] = {"pool": Pool}
    return by_name[config.vllm.connector]()
