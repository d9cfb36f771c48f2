"""What can be bought, and what is it tried with? Plain data, each known by a digest."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from mooncake_bench.plan.spec import Machine, Prices, Promise
from reference_cluster.config import ClusterConfig, load_config
from reference_cluster.cost_model import Profile

Value = str | int | float | bool


class Candidate(msgspec.Struct, frozen=True):
    """A cluster: counts of nodes by role, and settings that are not the defaults.

    `options` are dotted overrides of a cluster's configuration, sorted by name.
    """

    profile: str
    system: Literal["disaggregated", "colocated"]
    prefill: int = 0
    decode: int = 0
    colocated: int = 0
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def nodes(self) -> int:
        return self.prefill + self.decode + self.colocated

    @property
    def split(self) -> str:
        """As people say it: 5P+2D, or 8 colocated."""
        if self.system == "colocated":
            return f"{self.colocated} colocated"
        return f"{self.prefill}P+{self.decode}D"

    @property
    def title(self) -> str:
        """The split and the settings that are not the defaults."""
        return ", ".join([self.split, *said(self.options)])

    def option(self, name: str, default: Value) -> Value:
        return dict(self.options).get(name, default)

    def with_options(self, **changes: Value) -> Candidate:
        """With some settings changed; dots are written as double underscores, 0 is the default."""
        named = {name.replace("__", "."): value for name, value in changes.items()}
        merged = {**dict(self.options), **named}
        kept = {name: value for name, value in merged.items() if value or value is False}
        return msgspec.structs.replace(self, options=tuple(sorted(kept.items())))

    def with_split(self, prefill: int, decode: int) -> Candidate:
        return msgspec.structs.replace(self, prefill=prefill, decode=decode)

    def config(self, slo: Promise, seed: int, sample_every_s: float) -> ClusterConfig:
        """The cluster's configuration; raises ConfigError where the options contradict."""
        overrides: dict[str, Any] = {
            "system": self.system,
            "profile": self.profile,
            "seed": seed,
            "slo.ttft_s": slo.ttft_s,
            "slo.tbt_s": slo.tbt_s,
            "sample_every_s": sample_every_s,
            "prefill_instances": self.prefill or None,
            "decode_instances": self.decode or None,
            "colocated_instances": self.colocated or None,
            **dict(self.options),
        }
        return load_config(None, overrides)


def said(options: tuple[tuple[str, Value], ...]) -> list[str]:
    """Settings in words."""
    words = []
    for name, value in options:
        key = name.rpartition(".")[2]
        if key == "nodes_per_group":
            words.append(f"prefill in groups of {value}")
        elif key == "prefix_caching":
            words += ["prefix caching"] * bool(value)
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(f"{key} {value:g}")
    return words


class Load(msgspec.Struct, frozen=True):
    """What a cluster is tried with: the plan's trace, changed.

    `users` times as many people, all of them `speed` times as fast; `unshared` of the sessions
    share no prefix. `seed` draws the arrivals inside the trace's stamps (a generator's whole
    trace), so that candidates tried with one seed meet the same requests at the same times.
    """

    speed: float = 1.0
    users: float = 1.0
    seed: int = 0
    unshared: float = 0.0


class Trial(msgspec.Struct, frozen=True):
    """One candidate under one load; times of prefill and decode scaled by the profile's error."""

    candidate: Candidate
    load: Load
    prefill_scale: float = 1.0
    decode_scale: float = 1.0


class Scene(msgspec.Struct, frozen=True):
    """What all trials of a plan have in common; `content` tells one trace file from another."""

    trace: str
    content: str
    jitter: bool
    slo: Promise


class Job(msgspec.Struct, frozen=True):
    """A trial in its scene: what a worker is sent. `is_whole`: not to be stopped early."""

    scene: Scene
    trial: Trial
    is_whole: bool

    def digest(self, code: str) -> str:
        """One name for the same run by the same code, stopped early or not."""
        scene = msgspec.structs.replace(self.scene, trace="")
        text = msgspec.json.encode([scene, self.trial, code], order="deterministic")
        return hashlib.sha256(text).hexdigest()[:20]


def price_per_hour(
    candidate: Candidate, machine: Machine, profile: Profile, prices: Prices
) -> float:
    """Of all nodes: GPUs, and what the pool and the links cost beside them."""
    dram_tokens = float(candidate.option("prefill.dram_tokens", profile.dram_kv_tokens))
    ssd_tokens = float(candidate.option("prefill.ssd_tokens", 0))
    link = float(candidate.option("network.link_bytes_per_s", profile.link_bytes_per_s))
    gigabytes = dram_tokens * profile.kv_bytes_per_token / 1e9
    terabytes = ssd_tokens * profile.kv_bytes_per_token / 1e12
    pool = gigabytes * prices.dram_per_gb_hour + terabytes * prices.ssd_per_tb_hour
    node = machine.gpus_per_node * machine.price_per_gpu_hour
    node += link * 8e-9 * prices.link_per_gbps_hour
    return candidate.nodes * node + candidate.prefill * pool
