"""Does the simulator predict a live cluster of torch engines, once it was calibrated on it?

    OMP_NUM_THREADS=1 .venvs/torch/bin/python -m tests.bench.engine.predicted [--check]

A live 1P+1D of tiny engines serves a stretch of Mooncake's conversation trace with lengths a 16th;
`calibrate --run` fits a profile to what its requests cost. Then another stretch of the trace goes
to the simulator with this profile and to a live cluster that has just started: their times side by
side, and the profile's own error. `--check` ends with 1 where TTFT p50 or p90 or TBT p50 is more
than 15 % off. Four minutes; two cores, on which nothing else should run.

The decode worker has a core to itself. The prefill worker shares the other with the Conductor and
the client, which need little of it: on one core with them, decode steps wait for whole time slices.

The trace is looked for in MOONCAKE_TRACES (default ../shared/traces beside the repository).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mooncake_bench.calibrate.fit import as_toml, fitted_profile
from mooncake_bench.calibrate.served import served
from mooncake_bench.metrics import token_gaps
from mooncake_bench.records import Run, read_run
from mooncake_bench.simulation import simulate_trace
from reference_cluster.config import load_config
from reference_cluster.cost_model import Profile, load_profile
from tests.bench.cluster_bytes import MissingTraceError, the_trace
from tests.bench.live_cluster import replaying, serving
from workloads.trace import Trace, open_trace, write_mooncake
from workloads.transform import jitter, scale_lengths, window

BOUND = 0.15
CONFIG = """
system = "disaggregated"
profile = {profile!r}
block_tokens = {block_tokens}
prefill_instances = 1
decode_instances = 1
[slo]
ttft_s = 30.0
tbt_s = 1.0
[engine]
kind = "torch"
page_tokens = {block_tokens}
[prefill]
dram_tokens = 131072
[network]
transport = "shm"
verify = "off"
link_bytes_per_s = 1e10
[workers]
cpus = [[{prefill_core}], [{decode_core}]]
"""

results = Console(width=110)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the trace, as it is replayed and simulated."""

    trace: Trace
    speed: float

    def write(self, path: Path) -> Path:
        write_mooncake(self.trace, path)
        return path


def stretch(path: Path, start_s: float, end_s: float, divisor: int, speed: float) -> Stretch:
    """The timestamps of the trace are rounded to 3 s: spread, or ten requests come at once."""
    whole = window(open_trace(str(path)), start_s, end_s)
    return Stretch(jitter(scale_lengths(whole, divisor), seed=1), speed)


def configured(profile: str, block_tokens: int) -> str:
    cores = sorted(os.sched_getaffinity(0))
    return CONFIG.format(
        profile=profile,
        block_tokens=block_tokens,
        prefill_core=cores[0],
        decode_core=cores[-1],
    )


def live(config: str, load: Stretch, scratch: Path, name: str) -> Run:
    """Serve and replay; raises RuntimeError where not every request was answered."""
    leftovers: list[str] = []
    trace = load.write(scratch / f"{name}.jsonl")
    flags = ["--block-tokens", str(load.trace.block_tokens), "--speed", str(load.speed)]
    with (
        serving(config, scratch, leftovers) as cluster,
        replaying(cluster.url, trace, scratch / name, *flags),
    ):
        pass
    run = read_run(scratch / name)
    if leftovers or run.summary["finished"] != run.summary["offered"]:
        raise RuntimeError(f"{run.summary['finished']} finished; {', '.join(leftovers)}")
    return run


def figures(run: Run) -> dict[str, float]:
    """Seconds, but for the last."""
    gaps = token_gaps(run.requests, run.spans)["gap_s"]
    summary = run.summary
    return {
        "TTFT p50": summary["ttft_s"]["p50"],
        "TTFT p90": summary["ttft_s"]["p90"],
        "TBT p50": float(gaps.quantile(0.5) or 0.0),
        "TPOT p50": summary["tpot_s"]["p50"],
        "TBT p90": float(gaps.quantile(0.9) or 0.0),
        "request TBT p50": summary["tbt_s"]["p50"],
        "prefix hit ratio": summary["prefix_hit_ratio"],
    }


CHECKED = ("TTFT p50", "TTFT p90", "TBT p50")


def show(predicted: dict[str, float], seen: dict[str, float], profile: Profile, run: Run) -> None:
    results.print(f"profile: {profile.error}", highlight=False, soft_wrap=True)
    client = run.info.client
    results.print(
        f"{run.summary['finished']} live requests; the client used {client['cpu']:.0%} of a core, "
        f"its lag was {client['lag_s']['p99'] * 1e3:.1f} ms at p99",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "simulated", "live", "error", box=None)
    for name, value in predicted.items():
        unit, scale = ("", 1.0) if name.endswith("ratio") else (" ms", 1e3)
        table.add_row(
            name,
            f"{value * scale:.3g}{unit}",
            f"{seen[name] * scale:.3g}{unit}",
            f"{value / seen[name] - 1:+.1%}",
        )
    results.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where the error is too large")
    parser.add_argument("--calibrate-on", default="0-90", help="of the trace, in its seconds")
    parser.add_argument("--predict", default="600-720", help="the same")
    parser.add_argument("--divisor", type=int, default=16, help="of all lengths")
    parser.add_argument("--speed", type=float, default=1.5, help="of the replays")
    parser.add_argument("--keep", type=Path, help="directory for what was run")
    options = parser.parse_args()
    try:
        path = the_trace()
    except MissingTraceError as error:
        Console(stderr=True).print(str(error), soft_wrap=True)
        return 2
    learnt, asked = (
        stretch(path, *map(float, bounds.split("-")), options.divisor, options.speed)
        for bounds in (options.calibrate_on, options.predict)
    )
    with tempfile.TemporaryDirectory(prefix="bench-predicted-") as directory:
        scratch = options.keep or Path(directory)
        scratch.mkdir(parents=True, exist_ok=True)
        base, block_tokens = "tiny-torch-cpu", asked.trace.block_tokens
        # Whatever starts beside the workers keeps off the decode worker's core.
        config = configured(base, block_tokens)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:-1])
        points = served(live(config, learnt, scratch, "calibration"))
        profile = fitted_profile(load_profile(base), "calibrated", "this bench", points)
        mine = scratch / "calibrated.toml"
        mine.write_text(as_toml(profile))
        config = config.replace(repr(base), repr(str(mine)))
        run = live(config, asked, scratch, "live")
        simulated = simulate_trace(
            asked.trace,
            load_config(scratch / "cluster.toml", {}),
            profile,
            scratch / "simulated",
            asked.speed,
        )
        predicted, seen = figures(simulated), figures(run)
    show(predicted, seen, profile, run)
    far = [name for name in CHECKED if abs(predicted[name] / seen[name] - 1) > BOUND]
    for name in far:
        results.print(f"{name} is more than {BOUND:.0%} off", style="red")
    return int(options.check and bool(far))


if __name__ == "__main__":
    sys.exit(main())
