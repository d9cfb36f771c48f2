"""What is to be planned? One TOML: traffic, promise, machines with prices, limits, what to try."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from mooncake_bench.plan.errors import PlanError
from reference_cluster.config import Admission, Batching, Scheduling
from reference_cluster.cost_model import Profile, load_profile
from reference_cluster.errors import ClusterError


class Promise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TTFT and TBT bounds in seconds, and the share of offered requests that must meet both."""

    ttft_s: float = 30.0
    tbt_s: float = 0.1
    target: float = 0.95


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that aiconfigurator has kernel tables of, and what its tables do not say."""

    system: str  # Like h100_sxm.
    model: str  # Like meta-llama/Meta-Llama-3.1-70B, or a directory with its config.json.
    layers: int
    kv_bytes_per_token: int
    device_kv_tokens: int
    backend: str = "vllm"
    tp: int = 8
    dram_kv_tokens: int = 3_000_000
    link_bytes_per_s: float = 100e9


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of node: its cost profile, and what an hour of one of its GPUs costs.

    `prefill_error` and `decode_error` are relative; None: what the profile states.
    """

    profile: str = ""
    tables: Tables | None = None  # Instead of a profile: one is fitted to aiconfigurator's tables.
    price_per_gpu_hour: float = 1.0
    gpus_per_node: int = 8
    prefill_error: float | None = None
    decode_error: float | None = None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What there is at most: nodes together, pool memory and NIC of a node. None: no limit."""

    nodes: int = 64
    dram_tokens: int | None = None
    link_bytes_per_s: float | None = None


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an hour of more costs a node, beside its GPUs; used where pool or link is searched."""

    dram_per_gb_hour: float = 0.0
    ssd_per_tb_hour: float = 0.0
    link_per_gbps_hour: float = 0.0


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values to try of every setting; the first of each list is where the search begins.

    Of `dram_tokens` and `link_bytes_per_s` 0 stands for the profile's own.
    """

    scheduling: tuple[Scheduling, ...] = ("kvcache-centric", "least-loaded")
    admission: tuple[Admission, ...] = ("accept-all", "early-rejection")
    nodes_per_group: tuple[int, ...] = (1, 2)
    dram_tokens: tuple[int, ...] = (0,)
    ssd_tokens: tuple[int, ...] = (0,)
    link_bytes_per_s: tuple[float, ...] = (0.0,)
    colocated_batching: tuple[Batching, ...] = ("chunked", "prefill-first")
    colocated_step_tokens: tuple[int, ...] = (512, 1024)  # Of chunked batching; smaller: lower TBT.


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan's whole input. `trace` is a file (relative to the TOML) or a generator."""

    trace: str
    profiles: tuple[Machine, ...]
    jitter: bool = True
    growth: tuple[float, ...] = (1.0,)
    growth_by: Literal["speed", "users"] = "speed"
    currency: str = "USD"
    seed: int = 0
    verify_seeds: int = 5
    slo: Promise = Promise()
    limits: Limits = Limits()
    prices: Prices = Prices()
    search: Search = Search()

    def __post_init__(self) -> None:
        positive = {
            "slo.ttft_s": self.slo.ttft_s,
            "slo.tbt_s": self.slo.tbt_s,
            "slo.target": self.slo.target,
            "verify_seeds": self.verify_seeds,
            **{f"growth[{place}]": value for place, value in enumerate(self.growth)},
            **{
                f"profiles[{place}].{name}": getattr(machine, name)
                for place, machine in enumerate(self.profiles)
                for name in ("price_per_gpu_hour", "gpus_per_node")
            },
        }
        for name, value in positive.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value:g}; it must be above 0")
        if any(bool(one.profile) == bool(one.tables) for one in self.profiles):
            raise ValueError("profiles needs a profile, or tables to fit one to, each time")
        if self.limits.nodes < 2:
            raise ValueError(f"limits.nodes is {self.limits.nodes}; it must be at least 2")
        if not self.slo.target < 1.0:
            raise ValueError(f"slo.target is {self.slo.target:g}; give a share below 1, like 0.95")
        lists = {"profiles": self.profiles, "growth": self.growth, **vars_of(self.search)}
        for name, values in lists.items():
            if not values:
                raise ValueError(f"{name} is empty; give at least one")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")
        if any(value <= 0 for value in self.search.nodes_per_group):
            raise ValueError("search.nodes_per_group must be above 0")


def vars_of(search: Search) -> dict[str, tuple[Any, ...]]:
    return {f"search.{name}": getattr(search, name) for name in search.__struct_fields__}


def load_spec(path: Path) -> Spec:
    """Read a plan's TOML; a relative trace file is taken from beside it. Raises PlanError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; give a plan's TOML file") from None
    try:
        spec = msgspec.toml.decode(text, type=Spec)
    except msgspec.ValidationError as error:
        raise PlanError(f"{path}: {explained(str(error))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not valid TOML ({error}); mend the file") from None
    file, parameters = file_of(spec.trace, path.parent)
    if file.exists():
        spec = msgspec.structs.replace(spec, trace=f"{file.resolve()}{parameters}")
    profiles = tuple(
        msgspec.structs.replace(one, profile=str((path.parent / one.profile).resolve()))
        if one.profile.endswith(".toml") and (path.parent / one.profile).exists()
        else one
        for one in spec.profiles
    )
    return msgspec.structs.replace(spec, profiles=profiles)


def file_of(trace: str, directory: Path = Path()) -> tuple[Path, str]:
    """The file that a trace would be, and the parameters behind it (":rate_rps=5" of a fit)."""
    if (directory / trace).exists():
        return directory / trace, ""
    name, colon, parameters = trace.rpartition(":")
    return directory / (name or parameters), f"{colon}{parameters}" if name else ""


def explained(message: str) -> str:
    """msgspec's message; for an unknown key, the names that may have been meant."""
    found = re.search(r"unknown field `(.+?)`", message)
    if not found:
        return f"{message}; mend the value"
    sections = {
        "": Spec,
        "slo": Promise,
        "profiles": Machine,
        "profiles.tables": Tables,
        "limits": Limits,
        "prices": Prices,
        "search": Search,
    }
    places: dict[str, str] = {}
    for section, owner in sections.items():
        for name in owner.__struct_fields__:
            places.setdefault(name, f"{name} of [{section}]" if section else name)
    near = difflib.get_close_matches(found.group(1), places, n=3, cutoff=0.4) or list(places)
    return f"unknown key {found.group(1)!r}; did you mean {', '.join(places[one] for one in near)}?"


def profile_of(machine: Machine) -> Profile:
    """The machine's cost profile; raises PlanError."""
    try:
        return load_profile(machine.profile)
    except ClusterError as error:
        raise PlanError(str(error)) from None


def errors_of(machine: Machine) -> tuple[float, float]:
    """Relative errors to reckon with: of a prefill and of a decode step."""
    profile = profile_of(machine)
    prefill, decode = machine.prefill_error, machine.decode_error
    return (
        profile.prefill_error if prefill is None else prefill,
        profile.decode_error if decode is None else decode,
    )
