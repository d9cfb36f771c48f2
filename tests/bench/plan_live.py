"""Does a plan keep its word? A small cluster is planned in virtual time, then run in real time.

    .venv/bin/python tests/bench/plan_live.py [--check]

Plans a small cluster of modelled engines for a minute of generated traffic; then serves it live and
replays the very same traffic at the planned load, at 0.9 and at 1.1 times the capacity that the
plan names. Each time the live attainment must lie on the side of the target on which the plan says
it lies. About four minutes; needs a machine that has little else to do. `--check` ends with 1 where
a side is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from mooncake_bench.demo import serving
from mooncake_bench.plan.candidate import Job, Load, Scene, Trial
from mooncake_bench.plan.main import plan
from mooncake_bench.plan.pools import run
from mooncake_bench.plan.result import GrowthPlan
from mooncake_bench.plan.spec import load_spec
from mooncake_bench.records import read_run

REPO = Path(__file__).resolve().parents[2]
RATE_RPS, LIVE_S = 4.0, 60.0
PLAN = f"""
trace = "poisson-16k:rate_rps={RATE_RPS},duration_s={LIVE_S}"
verify_seeds = 3
[slo]
ttft_s = 2.5
tbt_s = 0.05
[[profiles]]
profile = "h100-llama3-70b"
[limits]
nodes = 8
[search]
admission = ["accept-all"]
scheduling = ["kvcache-centric"]
nodes_per_group = [1]
colocated_batching = ["prefill-first"]
"""
FACTORS = (0.9, 1.1)

results = Console(width=110)
diagnostics = Console(stderr=True)


def main() -> int:
    """Plan, predict, run live, compare; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=REPO / "build" / "bench-plan-live.json")
    parser.add_argument("--check", action="store_true", help="exit 1 where a side is wrong")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-plan-live-") as scratch:
        rows = compared(Path(scratch))
    table = Table("load", "speed", "planned", "live", "target", "same side", box=None)
    for row in rows:
        table.add_row(
            row["load"], f"{row['speed']:.3g}", f"{row['planned']:.1%}", f"{row['live']:.1%}",
            f"{row['target']:.0%}", "yes" if row["is_same_side"] else "NO",
        )  # fmt: skip  # one cell a line would hide the table
    results.print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(options.check and not all(row["is_same_side"] for row in rows))


def compared(scratch: Path) -> list[dict[str, Any]]:
    config = scratch / "plan.toml"
    config.write_text(PLAN)
    report = plan(config, scratch / "plan", 2, "", lambda trial, outcome, is_new: None)
    found = report.growths[0]
    assert found.choice is not None, found.infeasible
    assert found.capacity_rps is not None
    diagnostics.print(
        f"plan: {found.choice.title}, capacity {found.capacity_rps.value:.3g} req/s "
        f"({found.capacity_rps.low:.3g} to {found.capacity_rps.high:.3g})",
        highlight=False,
    )
    relative = found.capacity_rps.value / found.rate_rps
    speeds = {"planned": 1.0}
    speeds |= {f"{factor:g} of capacity": round(factor * relative, 4) for factor in FACTORS}
    target = report.spec.slo.target
    predicted = predictions(config, found, list(speeds.values()))
    rows = []
    for (load, speed), planned in zip(speeds.items(), predicted, strict=True):
        live = live_attainment(found, report.spec.trace, speed, scratch)
        is_same = (live >= target) == (planned >= target)
        rows.append(
            {
                "cluster": found.choice.title,
                "load": load,
                "speed": speed,
                "planned": planned,
                "live": live,
                "target": target,
                "is_same_side": is_same,
            }
        )
        diagnostics.print(f"{load}: planned {planned:.1%}, live {live:.1%}", highlight=False)
    return rows


def predictions(config: Path, found: GrowthPlan, speeds: list[float]) -> list[float]:
    """Attainment in virtual time of the very traffic that is replayed."""
    assert found.choice is not None
    spec = load_spec(config)
    scene = Scene(spec.trace, "", spec.jitter, spec.slo)
    jobs = [
        Job(scene, Trial(found.choice.candidate, Load(speed=speed)), is_whole=True)
        for speed in speeds
    ]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return [outcome.attainment for outcome in pool.map(run, jobs)]


def live_attainment(found: GrowthPlan, trace: str, speed: float, scratch: Path) -> float:
    """Serve the planned cluster in a process of its own, replay against it, read the run."""
    assert found.choice is not None
    candidate = found.choice.candidate
    slo = msgspec.toml.decode(PLAN)["slo"]
    bounds = f"ttft<{slo['ttft_s']}s,tbt<{slo['tbt_s']}s"
    flags = ["--prefill", str(candidate.prefill), "--decode", str(candidate.decode)]
    out = scratch / f"live-{speed:g}"
    with serving([*flags, "--profile", candidate.profile, "--slo", bounds]) as url:
        command = [sys.executable, "-m", "mooncake_bench.cli", "replay", "--url", url]
        command += ["--trace", trace, "--speed", str(speed), "--slo", bounds, "--out", str(out)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the replay ended with {done.returncode}: {done.stderr.strip()}")
    return float(read_run(out).summary["attainment"])


if __name__ == "__main__":
    sys.exit(main())
