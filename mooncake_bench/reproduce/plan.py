"""What has to be run? Workloads and runs as plain data, each known by a digest of all it means."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from mooncake_bench.digest import digest_of_source
from mooncake_bench.reproduce.errors import ReproduceError
from workloads.trace import Trace, open_trace
from workloads.transform import cap_lengths, jitter

# Whatever can change a run's result. A digest covers it: what other code has left does not count.
CODE = (
    "reference_cluster",
    "workloads",
    "mooncake_bench/metrics.py",
    "mooncake_bench/simulation.py",
    "mooncake_bench/reproduce/plan.py",
    "mooncake_bench/reproduce/work.py",
)


class Workload(msgspec.Struct, frozen=True):
    """A trace file where the user has it, else a generator, and what is done to it."""

    generator: str
    file: str = ""
    seed: int = 0  # Of the generator and the jitter.
    is_jittered: bool = False  # Only a file's arrivals: a generator stamps finely.
    output_tokens: int | None = None  # Outputs longer than this are cut.


class ClusterRun(msgspec.Struct, frozen=True, tag="cluster"):
    """A workload through a cluster in virtual time."""

    workload: Workload
    cluster: dict[str, Any] = {}  # Dotted overrides, as of `load_config`; may name the profile.
    profile: dict[str, float] = {}  # Dotted overrides of the profile's numbers.
    speed: float = 1.0
    is_with_gaps: bool = False  # Also the distribution of all gaps between tokens.
    hot_keys_every_s: float | None = None  # Count how many instances hold the hottest blocks.


class PoolRun(msgspec.Struct, frozen=True, tag="pool"):
    """A workload's block chains through one pool, without times."""

    workload: Workload
    eviction: Literal["lru", "lfu", "length-aware"] = "lru"
    capacities: tuple[int | None, ...] = ()  # In blocks; None: no bound.


Plan = ClusterRun | PoolRun


@dataclass(frozen=True, slots=True)
class Job:
    """A run with everything settled: which file it reads, and the digest its result goes by."""

    plan: Plan
    source: str  # A path, or a generator with its parameters.
    digest: str


class Sources:
    """Where workloads come from: the user's trace directory, or the generators."""

    def __init__(self, directory: Path | None) -> None:
        if directory is not None and not directory.is_dir():
            raise ReproduceError(
                f"{directory}: no such directory; give --trace-dir one with traces"
            )
        self.directory = directory

    def has(self, file: str) -> bool:
        return bool(file) and self.directory is not None and (self.directory / file).is_file()

    def source(self, workload: Workload) -> str:
        """What `open_trace` is to open."""
        if self.has(workload.file):
            assert self.directory is not None
            return str(self.directory / workload.file)
        return workload.generator

    def says(self, workload: Workload) -> str:
        """The workload in words: what it is, and whether it only stands in."""
        if not workload.file:
            return f"generator {workload.generator}"
        if not self.has(workload.file):
            return f"generator {workload.generator}, standing in for {workload.file} (not given)"
        return f"{workload.file}, arrivals {'' if workload.is_jittered else 'not '}jittered"

    def job(self, plan: Plan) -> Job:
        source = self.source(plan.workload)
        content = sha256_of(source) if self.has(plan.workload.file) else source
        text = msgspec.json.encode([plan, content, code_digest()], order="deterministic")
        return Job(plan, source, hashlib.sha256(text).hexdigest()[:20])


@cache
def sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def code_digest() -> str:
    """One digest of all source and profiles that a run depends on."""
    return digest_of_source(CODE)


def load_workload(workload: Workload, source: str) -> Trace:
    """The trace, with its transforms."""
    trace = open_trace(source, seed=workload.seed)
    if workload.is_jittered and source != workload.generator:
        trace = jitter(trace, workload.seed)
    if workload.output_tokens is not None:
        trace = cap_lengths(trace, output_tokens=workload.output_tokens)
    return trace
