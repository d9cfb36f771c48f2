"""What is a cluster made of? Frozen classes read from one TOML file; an unknown key is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from reference_cluster.errors import ConfigError

Scheduling = Literal["random", "least-loaded", "local-cache-aware", "kvcache-centric"]
Admission = Literal["accept-all", "load-based", "early-rejection", "predictive"]
Batching = Literal["prefill-first", "chunked"]
Eviction = Literal["lru", "lfu", "length-aware"]
System = Literal["disaggregated", "colocated"]
Transport = Literal["modelled", "shm", "tcp", "rdma", "mooncake"]
Verify = Literal["always", "sampled", "off"]
Placement = Literal["inside", "processes"]
Connector = Literal["pool", "nixl", "mooncake", "mooncake-store"]


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the Conductor promises: time to first token, and time between tokens of a decode."""

    ttft_s: float = 30.0
    tbt_s: float = 0.1


class ConductorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where requests go, and which are refused."""

    scheduling: Scheduling = "kvcache-centric"
    admission: Admission = "accept-all"
    # Fetch a prefix when the best holder's is more than this many times the instance's own.
    balancing_threshold: float = 1.3
    # Predictive admission: how long every decode is taken to last; None: learned from the finished.
    decode_s: float | None = None
    # How often an instance tells its load; 0: the Conductor knows it at every moment.
    report_every_s: float = 0.0
    # Where `serve` tells strangers of stored and removed blocks, and repeats what they missed.
    publish_events: str | None = None
    replay_events: str | None = None

    def __post_init__(self) -> None:
        for name in ("publish_events", "replay_events"):
            address = getattr(self, name)
            host, _, port = (address or "tcp://127.0.0.1:*").rpartition(":")
            is_port = port == "*" or (re.fullmatch(r"\d{1,5}", port) and int(port) < 1 << 16)
            if host != "tcp://127.0.0.1" or not is_port:
                raise ValueError(f"{name} is {address!r}; give tcp://127.0.0.1:PORT")
        if self.replay_events and not self.publish_events:
            raise ValueError("replay_events repeats what publish_events has sent; give that too")


class PrefillConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill instances."""

    nodes_per_group: int = 1  # Nodes that are one instance: chunks flow through them (CPP).
    chunk_tokens: int = 8192  # Uncached tokens computed in one go; a cancel acts between chunks.
    layerwise: bool = True  # Stream KV to the decode instance during the prefill, not after it.
    dram_tokens: int | None = None  # KV pool a node; None: the profile's.
    eviction: Eviction = "lru"  # Which idle block of the pool goes when room is needed.
    ssd_tokens: int = 0  # KV on SSD a node, of blocks that DRAM lets go.
    replicate_keys: int = 0  # So many of the most used blocks are kept on every instance.
    replicate_every_s: float = 30.0  # How often that is looked after.


class DecodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode instances."""

    batch_max: int = 256
    device_tokens: int | None = None  # KV in device memory; None: the profile's.


class ColocatedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Instances that prefill and decode, like vLLM."""

    batching: Batching = "prefill-first"
    prefix_caching: bool = False
    step_tokens_max: int = 2048  # Budget of a step with chunked batching.
    batch_max: int = 256
    device_tokens: int | None = None
    eviction: Eviction = "lru"  # Of blocks kept by prefix caching.


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Links between nodes; every node has one of each direction, shared by its transfers."""

    link_bytes_per_s: float | None = None  # None: the profile's.
    # What moves KV between workers: nothing but modelled time, or real bytes.
    transport: Transport = "modelled"
    verify: Verify = "sampled"  # Blocks looked at, byte by byte, when they have arrived.
    # Of "rdma", by name, and those that step in when they fail; both (): by nearness.
    rdma_devices: tuple[str, ...] = ()
    rdma_secondary: tuple[str, ...] = ()
    cap_bytes_per_s: float | None = None  # Of what one worker sends or fetches; None: no cap.
    host: str = "127.0.0.1"  # Of this host, where peers reach its workers.
    mooncake_protocol: Literal["tcp", "rdma"] = "tcp"


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The KVCache pool's bytes."""

    # Of KV a token where bytes are moved for real, to scale them down; None: the profile's.
    kv_bytes_per_token: int | None = None
    # Memory beside the pool for what is computed or on its way, a worker. The longest prompt must
    # fit into it and into what the pool can spare.
    working_tokens: int = 65536
    ssd_directory: str | None = None  # Where the blocks of prefill.ssd_tokens lie, a worker each.
    direct_io: bool = False  # Past the page cache.
    # Of a prefill instance's DRAM, what the prompts of one cache_salt may fill; None: all of it.
    tenant_quota_share: float | None = None

    def __post_init__(self) -> None:
        share = self.tenant_quota_share
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"tenant_quota_share is {share}; it must be in (0, 1]")


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What computes the tokens of a live cluster; the simulator's engine is always modelled."""

    kind: Literal["modelled", "torch", "vllm"] = "modelled"
    model: str = "tiny"  # A directory with config.json and safetensors, or a preset (torch).
    seed: int = 0  # Of a preset's random weights.
    dtype: str | None = None  # float32, bfloat16, float16; None: what the model's config says.
    device: str = "cpu"  # Or cuda:N.
    kv_tokens: int = 65536  # The engine's own KV memory, of each instance.
    page_tokens: int = 128
    native: bool = True  # Decode attention in C on a CPU, where there is a compiler.
    tensor_parallel: int = 1  # Ranks of each instance, a process each, and a device on CUDA hosts.


class VllmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM as the engine: how its processes are started, or where servers are that run already."""

    connector: Connector = "pool"  # What moves KV from prefill to decode; nothing if colocated.
    connector_options: dict[str, Any] = {}  # kv_connector_extra_config, but for "pool".
    kv_bytes: int = 256 << 20  # vLLM's own KV memory, of each instance.
    pool_bytes: int = 256 << 20  # Of a worker's share of our pool.
    max_model_len: int = 8448
    # Of vLLM's engine, by the names of its Python API; those of a role win over those of all.
    arguments: dict[str, Any] = {}
    prefill_arguments: dict[str, Any] = {}
    decode_arguments: dict[str, Any] = {}
    launch: tuple[str, ...] = ()  # The Python that has vLLM, and words before it; (): this one.
    environment: dict[str, str] = {}
    # Of servers that run already, one an instance (prefill first): nothing is started then.
    urls: tuple[str, ...] = ()
    bootstraps: tuple[str, ...] = ()  # With urls: Mooncake's bootstrap server of each prefill one.
    start_s_max: float = 300.0
    dead_after_s: float = 10.0  # Without a sign of life a process is killed.
    answer_s_max: float = 120.0  # An answer that stands still for so long is tried elsewhere.


class WorkersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the instances of a live cluster run, and when one counts as dead."""

    placement: Placement = "processes"  # A process each, or all inside the server's own.
    heartbeat_s: float = 0.5
    dead_after_s: float = 3.0  # Without a sign of life; it is killed then.
    restart: bool = True
    start_s_max: float = 60.0  # The server gives up where a worker has not said hello by then.
    cpus: tuple[tuple[int, ...], ...] = ()  # For each worker in order, what it may run on; (): any.
    devices: tuple[str, ...] = ()  # For each worker its CUDA_VISIBLE_DEVICES.


class FailureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes of the requests of an instance that is lost."""

    resume: bool = True  # Streams go on elsewhere, from their tokens so far; else they end.
    replacements_max: int = 2  # So often a request is placed again before it fails.
    transfer_deadline_s: float = 10.0  # Of every question and transfer between workers.


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole cluster. Counts are instances, each a node of the profile's GPUs."""

    system: System = "disaggregated"
    prefill_instances: int = 8
    decode_instances: int = 8
    colocated_instances: int = 16
    profile: str = "a800-llama3-70b"
    block_tokens: int = 512
    seed: int = 0
    sample_every_s: float = 5.0
    slo: Slo = Slo()
    conductor: ConductorConfig = ConductorConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    colocated: ColocatedConfig = ColocatedConfig()
    network: NetworkConfig = NetworkConfig()
    pool: PoolConfig = PoolConfig()
    workers: WorkersConfig = WorkersConfig()
    failure: FailureConfig = FailureConfig()
    engine: EngineConfig = EngineConfig()
    vllm: VllmConfig = VllmConfig()

    def __post_init__(self) -> None:
        counts = {
            "prefill_instances": self.prefill_instances,
            "decode_instances": self.decode_instances,
            "colocated_instances": self.colocated_instances,
            "block_tokens": self.block_tokens,
            "prefill.chunk_tokens": self.prefill.chunk_tokens,
            "prefill.nodes_per_group": self.prefill.nodes_per_group,
            "decode.batch_max": self.decode.batch_max,
            "colocated.step_tokens_max": self.colocated.step_tokens_max,
            "colocated.batch_max": self.colocated.batch_max,
            "sample_every_s": self.sample_every_s,
            "slo.ttft_s": self.slo.ttft_s,
            "slo.tbt_s": self.slo.tbt_s,
            "conductor.decode_s": self.conductor.decode_s,
            "prefill.dram_tokens": self.prefill.dram_tokens,
            "prefill.replicate_every_s": self.prefill.replicate_every_s,
            "decode.device_tokens": self.decode.device_tokens,
            "colocated.device_tokens": self.colocated.device_tokens,
            "network.link_bytes_per_s": self.network.link_bytes_per_s,
            "network.cap_bytes_per_s": self.network.cap_bytes_per_s,
            "pool.kv_bytes_per_token": self.pool.kv_bytes_per_token,
            "pool.working_tokens": self.pool.working_tokens,
            "workers.heartbeat_s": self.workers.heartbeat_s,
            "failure.transfer_deadline_s": self.failure.transfer_deadline_s,
            "engine.kv_tokens": self.engine.kv_tokens,
            "engine.page_tokens": self.engine.page_tokens,
            "engine.tensor_parallel": self.engine.tensor_parallel,
            "workers.start_s_max": self.workers.start_s_max,
            "vllm.kv_bytes": self.vllm.kv_bytes,
            "vllm.pool_bytes": self.vllm.pool_bytes,
            "vllm.max_model_len": self.vllm.max_model_len,
            "vllm.start_s_max": self.vllm.start_s_max,
            "vllm.dead_after_s": self.vllm.dead_after_s,
            "vllm.answer_s_max": self.vllm.answer_s_max,
        }
        for name, count in counts.items():
            if count is not None and not count > 0:
                raise ValueError(f"{name} is {count}; it must be positive")
        if not self.conductor.balancing_threshold >= 1:
            # Below 1 an instance would fetch what it has.
            raise ValueError("conductor.balancing_threshold must be at least 1")
        if self.prefill_instances % self.prefill.nodes_per_group:
            raise ValueError("prefill.nodes_per_group must divide prefill_instances")
        may_be_none = {
            "conductor.report_every_s": self.conductor.report_every_s,
            "prefill.ssd_tokens": self.prefill.ssd_tokens,
        }
        for name, count in may_be_none.items():
            if not count >= 0:
                raise ValueError(f"{name} is {count}; it must not be negative")
        if self.engine.kind == "vllm":
            self.check_vllm()
        elif self.network.transport != "modelled" and self.system == "disaggregated":
            self.check_bytes()
        if self.engine.kind == "torch":
            self.check_real_tokens()
        if not self.workers.dead_after_s >= 2 * self.workers.heartbeat_s:
            # One late heartbeat is no death.
            raise ValueError("workers.dead_after_s must be at least twice workers.heartbeat_s")
        if self.colocated.step_tokens_max <= self.colocated.batch_max:
            raise ValueError("colocated.step_tokens_max must exceed colocated.batch_max")

    def check_real_tokens(self) -> None:
        """What does not go with an engine that computes; raises ValueError."""
        engine, is_apart = self.engine, self.system == "disaggregated"
        wrong = {
            'workers.placement "inside"': self.workers.placement != "processes",
            'network.transport "modelled"': is_apart and self.network.transport == "modelled",
            "a page_tokens that does not divide block_tokens": bool(
                self.block_tokens % engine.page_tokens
            ),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f'engine.kind "torch" cannot be had with {what}; change either')

    def check_vllm(self) -> None:
        """What does not go with vLLM's workers, or is missing; raises ValueError."""
        is_apart, names = self.system == "disaggregated", self.instance_names
        by_pool = is_apart and self.vllm.connector == "pool"
        moves = self.network.transport
        if by_pool and not self.vllm.urls and moves not in ("shm", "tcp"):
            raise ValueError(
                f'network.transport is "{moves}"; vllm.connector "pool" has shm and tcp'
            )
        if self.workers.placement != "processes":
            raise ValueError('engine.kind "vllm" needs workers.placement "processes"')
        if self.vllm.urls and len(self.vllm.urls) != len(names):
            raise ValueError(
                f"vllm.urls has {len(self.vllm.urls)} servers; "
                f"give {len(names)}: {', '.join(names)}"
            )
        if any(not one.startswith(("http://", "https://")) for one in self.vllm.urls):
            raise ValueError("vllm.urls must begin with http:// or https://")
        by_mooncake = is_apart and self.vllm.connector == "mooncake"
        if by_mooncake and self.vllm.urls and len(self.vllm.bootstraps) != self.prefill_instances:
            raise ValueError("vllm.bootstraps must name Mooncake's of each prefill server in urls")
        by_store = is_apart and self.vllm.connector == "mooncake-store" and not self.vllm.urls
        if by_store and "MOONCAKE_CONFIG_PATH" not in self.vllm.environment:
            raise ValueError(
                'vllm.connector "mooncake-store" needs MOONCAKE_CONFIG_PATH in vllm.environment'
            )
        if not (self.vllm.urls or Path(self.engine.model, "config.json").exists()):
            raise ValueError(
                f"engine.model is {self.engine.model!r}; vLLM needs a directory with config.json"
            )
        if is_apart and self.prefill.nodes_per_group != 1:
            raise ValueError("prefill.nodes_per_group must be 1 with vLLM")
        if is_apart and (self.prefill.ssd_tokens or self.prefill.replicate_keys):
            raise ValueError("vLLM's workers have no prefill.ssd_tokens or replicate_keys")

    def check_bytes(self) -> None:
        """What must be said where bytes are moved for real; raises ValueError."""
        if self.workers.placement != "processes":
            raise ValueError(
                "network.transport moves bytes between processes; set [workers] placement"
            )
        if self.prefill.dram_tokens is None:
            # A profile's is that of a real node, up to terabytes.
            raise ValueError("give prefill.dram_tokens, the real memory of each prefill worker")
        if self.prefill.ssd_tokens and not self.pool.ssd_directory:
            raise ValueError("give pool.ssd_directory, where prefill.ssd_tokens can lie")
        if self.prefill.nodes_per_group != 1:
            raise ValueError("network.transport moves no bytes within prefill.nodes_per_group")

    @property
    def prefill_groups(self) -> int:
        """Prefill instances as the Conductor sees them: of one node, or a pipeline of several."""
        return self.prefill_instances // self.prefill.nodes_per_group

    @property
    def instance_names(self) -> list[str]:
        """Of all instances, in order: each is a worker where they run in processes."""
        if self.system == "colocated":
            return [f"colocated-{id}" for id in range(self.colocated_instances)]
        prefill = [f"prefill-{id}" for id in range(self.prefill_groups)]
        return prefill + [f"decode-{id}" for id in range(self.decode_instances)]

    @property
    def title(self) -> str:
        """As people say it: 8P+8D, or 16 colocated."""
        if self.system == "colocated":
            return f"{self.colocated_instances} colocated"
        return f"{self.prefill_instances}P+{self.decode_instances}D"

    @property
    def description(self) -> str:
        """The title and the policies that are not the defaults: 16 colocated, prefix caching."""
        parts = [self.title]
        if self.system == "colocated":
            parts += [self.colocated.batching] * (self.colocated.batching != "prefill-first")
            parts += ["prefix caching"] * self.colocated.prefix_caching
        elif self.prefill.nodes_per_group > 1:
            parts.append(f"prefill in groups of {self.prefill.nodes_per_group}")
        default = ConductorConfig()
        for name in ("scheduling", "admission"):
            policy = getattr(self.conductor, name)
            parts += [policy] * (policy != getattr(default, name))
        return ", ".join(parts)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> ClusterConfig:
    """The file's settings (or the defaults) with overrides on top; raises ConfigError.

    Overrides are dotted keys, as {"conductor.scheduling": "random"}; None means not given.
    """
    place = str(path) if path else "command line"
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            fields = msgspec.toml.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; give an existing file") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML ({error}); mend the file") from None
    for dotted, value in overrides.items():
        if value is not None:
            *sections, key = dotted.split(".")
            section = fields
            for name in sections:
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise ConfigError(f"{place}: {name} is {section!r}; make it a section [{name}]")
            section[key] = value
    try:
        return msgspec.convert(fields, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place}: {explain(str(error))}") from None


def explain(message: str) -> str:
    """msgspec's message with the names that may have been meant."""
    found = re.search(r"unknown field `(.+?)`(?: - at `\$\.?(.*?)`)?$", message)
    if not found:
        return f"{message}; mend the value"
    key, section = found.group(1), found.group(2) or ""
    owner: type[msgspec.Struct] = ClusterConfig
    if section:
        owner = type(getattr(ClusterConfig(), section))
    names = [field.name for field in msgspec.structs.fields(owner)]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.4) or names
    where = f"[{section}] " if section else ""
    return f"unknown key {where}{key!r}; did you mean {', '.join(near)}?"
