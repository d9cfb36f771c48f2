"""What would the cluster do today? Scenarios in virtual time, for a comparison to the last digit.

A scenario is a generated trace (or a file) and a cluster. The same source gives the same decisions
and the same numbers on every machine, so that any difference is a change of behaviour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mooncake_bench import metrics
from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.evidence import DECISIONS, Evidence, leaves
from mooncake_bench.gate.toml import read_toml
from mooncake_bench.records import REQUESTS, conform
from reference_cluster.config import load_config
from reference_cluster.cost_model import load_profile
from reference_cluster.errors import ClusterError
from workloads.trace import TraceError, open_trace
from workloads.transform import jitter

PREDICTED = ("predicted_ttft_s", "predicted_tbt_s")


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trace and a cluster; `cluster` has the keys of a cluster's TOML file."""

    name: str
    trace: str
    seed: int = 0
    speed: float = 1.0
    jitter: bool = False
    cluster: dict[str, Any] = {}


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that are run."""

    scenario: list[Scenario]


class Outcome(msgspec.Struct, frozen=True):
    """What a scenario came to. `workload` is a digest of the offered requests themselves."""

    scenario: Scenario
    workload: str
    numbers: dict[str, float | None]
    decisions: list[tuple[Any, ...]] = []  # Rows of DECISIONS.

    @property
    def evidence(self) -> Evidence:
        schema = {name: REQUESTS[name] for name in DECISIONS}
        frame = pl.DataFrame(self.decisions, schema=schema, orient="row")
        return Evidence(self.scenario.name, self.numbers, frame)


def read_scenarios(path: Path) -> list[Scenario]:
    """The scenarios of a TOML file; raises GateError for one that is not well-formed."""
    scenarios = read_toml(path, ScenarioFile).scenario
    names = [one.name for one in scenarios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        what = f"scenario {twice!r} is there twice" if twice else "no [[scenario]]"
        raise GateError(f"{path}: {what}; give every scenario a name of its own")
    return scenarios


def run_scenarios(scenarios: list[Scenario], workers: int) -> Iterator[Outcome]:
    """Each in its order, `workers` at a time. Raises GateError for one that cannot be run."""
    if workers == 1 or len(scenarios) == 1:
        yield from map(run_scenario, scenarios)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Spawned: a fork of a process with polars' threads may hang.
    with ProcessPoolExecutor(min(workers, len(scenarios)), get_context("spawn")) as pool:
        yield from pool.map(run_scenario, scenarios)


def run_scenario(scenario: Scenario) -> Outcome:
    """Run one; the same outcome everywhere, to the last digit but for the order of sums."""
    # Here, for the command line imports this module for every verb, and replay must stay small.
    from mooncake_bench.simulation import simulated_run
    from reference_cluster.simulate import collector_paused

    try:
        trace = open_trace(scenario.trace, seed=scenario.seed)
        config = load_config(None, {"seed": scenario.seed, **dotted(scenario.cluster)})
        profile = load_profile(config.profile)
    except (ClusterError, TraceError) as error:
        raise GateError(f"scenario {scenario.name}: {error}") from None
    if scenario.jitter:
        trace = jitter(trace, scenario.seed)
    with collector_paused():
        info, requests, spans, samples = simulated_run(trace, config, profile, scenario.speed)
    tables = [conform(requests, "requests"), conform(spans, "spans"), conform(samples, "samples")]
    numbers = leaves(metrics.summarise(info, *tables))
    for name in PREDICTED:
        mean = tables[0][name].mean()
        numbers[f"{name}.mean"] = float(mean) if isinstance(mean, float) else None
    rows = tables[0].select(DECISIONS).rows()
    return Outcome(scenario, digest(trace.frame), numbers, rows)


def dotted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"conductor": {"scheduling": "random"}} as {"conductor.scheduling": "random"}."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        found |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def digest(frame: pl.DataFrame) -> str:
    """Of the requests offered; times to the microsecond, as libraries differ in the last bit."""
    columns = ("input_tokens", "output_tokens", "hash_ids")
    total = hashlib.sha256(repr([frame[name].to_list() for name in columns]).encode())
    total.update(repr((frame["arrival_s"] * 1e6).round().cast(pl.Int64).to_list()).encode())
    return total.hexdigest()[:16]
