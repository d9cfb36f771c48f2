"""From a plan's TOML to plan.json and plan.html: check, search, look around, write."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mooncake_bench.plan.bound import Demand
from mooncake_bench.plan.candidate import Scene, Trial
from mooncake_bench.plan.details import details
from mooncake_bench.plan.errors import PlanError
from mooncake_bench.plan.lab import Lab
from mooncake_bench.plan.outcome import Outcome
from mooncake_bench.plan.page import write_page
from mooncake_bench.plan.pools import LocalPool, Pool
from mooncake_bench.plan.result import GrowthPlan, PlanReport
from mooncake_bench.plan.spec import Spec, file_of, load_spec, profile_of
from mooncake_bench.plan.study import Study
from mooncake_bench.plan.tables import profile_from, write_profile
from mooncake_bench.plan.trial import loaded
from mooncake_bench.records import fingerprint, installed_versions

DATA, PAGE, TRIALS, PROFILES = "plan.json", "plan.html", "trials", "profiles"
OnDone = Callable[[Trial, Outcome, bool], None]


def plan(config: Path, out: Path, workers: int, ray_address: str, on_done: OnDone) -> PlanReport:
    """Plan as the TOML says and write plan.json and plan.html to `out`.

    Trials that an earlier, killed or interrupted call has finished there are not run again.
    Raises PlanError, TraceError.
    """
    pool = make_pool(workers, ray_address)
    try:
        return studied_plan(config, out, pool, on_done)
    finally:
        pool.close()


def studied_plan(config: Path, out: Path, pool: Pool, on_done: OnDone) -> PlanReport:
    """The same on a pool that is there."""
    began_s = time.monotonic()
    spec = with_fitted_profiles(load_spec(config), out / PROFILES)
    scene = scene_of(spec)
    for machine in spec.profiles:
        profile_of(machine)
    demands = {
        users: Demand(loaded(scene, spec.seed, users, 0.0))
        for users in (spec.growth if spec.growth_by == "users" else (1.0,))
    }
    lab = Lab(scene, pool, out / TRIALS, on_done)
    study = Study(lab, spec, demands)
    study.check_reachable()
    growths, around = asyncio.run(studied(study))
    report = PlanReport(
        spec=spec,
        trace=trace_of(scene, spec),
        profiles={one.profile: stated(spec, one.profile) for one in spec.profiles},
        growths=tuple(growths),
        details=around,
        counts=lab.counts,
        wall_s=time.monotonic() - began_s,
        versions=installed_versions(),
        machine=fingerprint(),
    )
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    written(out / DATA, encoded.decode())
    write_page(report, out / PAGE)
    return report


def with_fitted_profiles(spec: Spec, directory: Path) -> Spec:
    """Machines of kernel tables get a profile file of their own."""
    machines = [
        one
        if one.tables is None
        else msgspec.structs.replace(
            one,
            profile=str(write_profile(one.tables, directory, profile_from).resolve()),
            tables=None,
        )
        for one in spec.profiles
    ]
    return msgspec.structs.replace(spec, profiles=tuple(machines))


async def studied(study: Study) -> tuple[list[GrowthPlan], Any]:
    """All growths at once, so that every worker has something to do; then the details."""
    # The largest first: its runs are the longest.
    order = sorted(study.spec.growth, reverse=True)
    plans = await asyncio.gather(*(study.growth(growth) for growth in order))
    by_growth = dict(zip(order, plans, strict=True))
    growths = [by_growth[growth] for growth in study.spec.growth]
    feasible = [one for one in growths if one.choice is not None]
    if not feasible:
        return growths, None
    return growths, await details(study, feasible[0], feasible[1:])


def make_pool(workers: int, ray_address: str) -> Pool:
    if not ray_address:
        return LocalPool(workers)
    from mooncake_bench.plan.ray_pool import RayPool

    return RayPool(ray_address, workers)


def scene_of(spec: Spec) -> Scene:
    """What trials share; its content covers the trace's bytes and the profiles'."""
    profiles = [msgspec.to_builtins(profile_of(machine)) for machine in spec.profiles]
    digest = hashlib.sha256(msgspec.json.encode(profiles, order="deterministic"))
    path, parameters = file_of(spec.trace)
    digest.update(path.read_bytes() if path.is_file() else spec.trace.encode())
    digest.update(parameters.encode())
    return Scene(spec.trace, digest.hexdigest()[:32], spec.jitter, spec.slo)


def trace_of(scene: Scene, spec: Spec) -> dict[str, Any]:
    """The traffic in a few numbers."""
    trace = loaded(scene, spec.seed, 1.0, 0.0)
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "jittered": trace.jittered,
        "transforms": list(trace.transforms),
        "requests": trace.frame.height,
        "duration_s": trace.duration_s,
        "rate_rps": trace.rate_rps,
        "input_tokens_mean": float(trace.frame["input_tokens"].mean() or 0.0),  # type: ignore[arg-type]  # of integers
        "output_tokens_mean": float(trace.frame["output_tokens"].mean() or 0.0),  # type: ignore[arg-type]  # of integers
    }


def stated(spec: Spec, name: str) -> dict[str, Any]:
    """What a profile says of itself, and its price."""
    machine = next(one for one in spec.profiles if one.profile == name)
    profile = profile_of(machine)
    return {
        "name": profile.name,
        "model": profile.model,
        "node": profile.node,
        "source": profile.source,
        "error": profile.error,
        "kv_bytes_per_token": profile.kv_bytes_per_token,
        "gpus_per_node": machine.gpus_per_node,
        "price_per_gpu_hour": machine.price_per_gpu_hour,
    }


def written(path: Path, text: str) -> None:
    """Write a result. Raises PlanError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; choose another --out") from None
