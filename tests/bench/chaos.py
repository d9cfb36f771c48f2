"""What do clients notice while workers are killed or hang, again and again?

    .venv/bin/python -m tests.bench.chaos [--check] [--seed 0] [--faults 20] [--rate 25]

A live 2P+2D of modelled engines that moves real bytes (shm, every block verified) serves a
generated trace at load 0.6. Every 15 s the next fault of a seeded schedule strikes a worker:
SIGKILL, or SIGSTOP until the Conductor gives it up. At the end: did every offered request end, and
how? How long until attainment was back? Do all books balance, is anything left? `--check` ends with
1 where not. Five and a half minutes, half a busy core. `--out` gets run, server log and outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import polars as pl
from rich.console import Console
from rich.table import Table

from mooncake_bench.metrics import attained, per_request
from mooncake_bench.records import Run, read_run
from reference_cluster.cost_model import DecodeCost, PrefillCost, Profile
from tests.bench.live_cluster import (
    REPO,
    LiveCluster,
    replaying,
    serving,
    start_of,
    waited,
    write_trace,
)
from tests.faults import Fault, schedule
from tests.reference_cluster.small import write_profile

LEAD_S, EVERY_S = 20.0, 15.0  # Before the first fault; between faults.
BACK_S, SPAN_S = 10.0, 2.0  # Attainment must be back by then; a request lives at most so long.
POINTS = 0.02
RATE_RPS = 25.0  # At which prefill instances are busy 0.6 of the time.
BLOCK_TOKENS = 512
SLO = "ttft<2s,tbt<200ms"
# Half of each prompt's first block is shared: a prefill of about 770 tokens takes 48 ms.
PROFILE = Profile(
    name="chaos",
    model="none",
    node="none",
    source="made for a chaos run",
    error="none",
    prefill=PrefillCost(base_s=0.010, token_s=5e-5, token2_s=0.0),
    decode=DecodeCost(base_s=0.020, sequence_s=2e-4, context_token_s=0.0),
    layers=8,
    kv_bytes_per_token=2048,
    device_kv_tokens=60_000,
    dram_kv_tokens=40_960,
    link_bytes_per_s=1e9,
)
CONFIG = """
profile = "{profile}"
prefill_instances = 2
decode_instances = 2
block_tokens = 512
[slo]
ttft_s = 2.0
tbt_s = 0.2
[prefill]
dram_tokens = 40960
[pool]
kv_bytes_per_token = 2048
working_tokens = 60000
[network]
transport = "shm"
verify = "always"
[workers]
heartbeat_s = 0.2
dead_after_s = 1.0
[failure]
transfer_deadline_s = 3.0
"""
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
NUMBERS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

results = Console(width=110)


@dataclass
class Struck:
    """A fault as it happened, on the monotonic clock."""

    fault: Fault
    at_s: float
    back_s: float | None  # After so long another process had its place.


@dataclass
class Outcome:
    """All that a chaos run has shown."""

    rows: list[dict[str, Any]]
    before: float  # Attainment before the first fault.
    ends: Counter[str]  # How requests have ended: status and reason.
    offered: int
    load: float  # Share of the time that the prefill instances compute, as the profile has it.
    problems: list[str]
    invalid: list[str]  # Reasons not to believe the client's times.

    @property
    def late(self) -> list[dict[str, Any]]:
        """Faults after which attainment was not back in time."""
        return [row for row in self.rows if row["after"] < self.before - POINTS]


def trace_rows(seed: int, rate_rps: float, duration_s: float) -> list[dict[str, Any]]:
    """Poisson arrivals of prompts of 2 or 3 blocks; half of them share their first with others."""
    rng = random.Random(seed)
    rows, at_s, fresh = [], rng.expovariate(rate_rps), 1000
    while at_s < duration_s:
        tokens = rng.randint(600, 1440)
        blocks = -(-tokens // BLOCK_TOKENS)
        ids = [*range(fresh, fresh + blocks)]
        fresh += blocks
        if rng.random() < 0.5:
            ids[0] = rng.randrange(8)
        output = rng.randint(20, 60)
        rows.append(
            {
                "timestamp": round(at_s * 1000),
                "input_length": tokens,
                "output_length": output,
                "hash_ids": ids,
            }
        )
        at_s += rng.expovariate(rate_rps)
    return rows


# ---- striking --------------------------------------------------------------------------------


class Striker(threading.Thread):
    """Strikes at its times; notes when another process has taken the place of the one struck."""

    def __init__(self, cluster: LiveCluster, faults: Sequence[Fault]) -> None:
        super().__init__(name="striker")
        self.cluster = cluster
        self.faults = faults
        self.struck: list[Struck] = []
        self.mismatched = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self.cluster.url, timeout=5.0) as client:
                waited(lambda: self.has_served(client) or None, 60.0)
                zero_s = time.monotonic()
                for fault in self.faults:
                    time.sleep(max(0.0, zero_s + fault.at_s - time.monotonic()))
                    self.strike(fault)
        except BaseException as error:  # noqa: BLE001  # Told by whoever waits for the thread.
            self.error = error

    def has_served(self, client: httpx.Client) -> bool:
        return "vllm:request_success_total{" in client.get("/metrics").text

    def strike(self, fault: Fault) -> None:
        row = self.look()[fault.name]
        at_s = time.monotonic()
        os.kill(row["pid"], NUMBERS[fault.kind])
        back = waited(lambda: self.is_back(fault.name, row["pid"]) or None, EVERY_S - 3.0)
        self.struck.append(Struck(fault, at_s, time.monotonic() - at_s if back else None))

    def is_back(self, name: str, before: int) -> bool:
        row = self.look()[name]
        return bool(row["state"] == "member" and row["pid"] != before)

    def look(self) -> dict[str, dict[str, Any]]:
        rows = self.cluster.workers()
        mismatched = sum(row.get("mismatched_blocks", 0.0) for row in rows.values())
        self.mismatched = max(self.mismatched, mismatched)
        return rows


def strike_through(
    scratch: Path, seed: int, faults: Sequence[Fault], rate_rps: float, duration_s: float
) -> Outcome:
    """One run: serve, replay, strike, look at all that is left."""
    profile = write_profile(scratch / "chaos.toml", PROFILE)
    trace = write_trace(scratch / "trace.jsonl", trace_rows(seed, rate_rps, duration_s))
    leftovers: list[str] = []
    with serving(CONFIG.format(profile=profile), scratch, leftovers) as cluster:
        striker = Striker(cluster, faults)
        striker.start()
        with replaying(cluster.url, trace, scratch / "run", "--slo", SLO):
            striker.join()
        if striker.error is not None:
            raise striker.error
        unsettled = cluster.settled()
        segments = len(list(Path("/dev/shm").glob(f"mcb-{cluster.process.pid}-*")))
    problems = unsettled + leftovers
    problems += [f"{striker.mismatched:g} blocks arrived damaged"] * bool(striker.mismatched)
    problems += [f"{segments} segments of shared memory for 4 workers"] * (segments != len(NAMES))
    return concluded(read_run(scratch / "run"), striker.struck, len(trace_of(trace)), problems)


def trace_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# ---- what it has come to ---------------------------------------------------------------------


def concluded(run: Run, struck: Sequence[Struck], offered: int, problems: list[str]) -> Outcome:
    frame = per_request(run.requests, run.spans)
    frame = frame.with_columns(attained(frame, run.info.slo).alias("attained"))
    zero_s = start_of(run)
    times = [one.at_s - zero_s for one in struck]
    until = [*times[1:], float(frame["arrival_s"].max() or 0.0) + SPAN_S]
    before = share(frame, 3.0, (times or [LEAD_S])[0] - SPAN_S)
    rows = []
    for one, at_s, next_s in zip(struck, times, until, strict=True):
        rows.append(
            {
                "at_s": at_s,
                "fault": f"{one.fault.kind} {one.fault.name}",
                "back_s": one.back_s,
                "during": share(frame, at_s - SPAN_S, at_s + BACK_S),
                "last_miss_s": last_miss_s(frame, at_s, next_s - SPAN_S),
                "after": share(frame, at_s + BACK_S, next_s - SPAN_S),
            }
        )
    ends = Counter(
        f"{status} {reason or ''}".strip()
        for status, reason in run.requests.select("status", "reason").rows()
    )
    for status, reason in run.requests.select("status", "reason").unique().rows():
        if status not in ("finished", "rejected", "failed") or (
            status != "finished" and not reason
        ):
            problems.append(f"a request has ended as {status!r}, for the reason {reason!r}")
    if run.requests.height != offered:
        problems.append(f"{offered} requests were offered, {run.requests.height} have ended")
    problems += [f"{one.fault.name} did not come back" for one in struck if one.back_s is None]
    computed = frame["input_tokens"].sum() - frame["reused_tokens"].fill_null(0).sum()
    busy_s = PROFILE.prefill.base_s * offered + PROFILE.prefill.token_s * computed
    load = busy_s / (2 * float(frame["arrival_s"].max() or 1.0))  # type: ignore[arg-type]
    return Outcome(rows, before, ends, offered, load, problems, run.info.invalid_reasons)


def share(frame: pl.DataFrame, from_s: float, to_s: float) -> float:
    """Attainment of the requests that arrive then."""
    found = frame.filter(pl.col("arrival_s").is_between(from_s, to_s, closed="left"))["attained"]
    return float(found.mean()) if len(found) else float("nan")  # type: ignore[arg-type]


def last_miss_s(frame: pl.DataFrame, at_s: float, to_s: float) -> float:
    """Seconds from a fault to the arrival of the last request that missed, before the next."""
    is_near = pl.col("arrival_s").is_between(at_s, to_s, closed="left")
    missed = frame.filter(is_near, ~pl.col("attained"))["arrival_s"]
    return float(missed.max()) - at_s if len(missed) else 0.0  # type: ignore[arg-type]


def show(outcome: Outcome) -> None:
    table = Table("at", "fault", "new process", "attained to +10 s", "last miss", "after", box=None)
    for row in outcome.rows:
        back = "never" if row["back_s"] is None else f"{row['back_s']:.1f} s"
        table.add_row(
            f"{row['at_s']:.0f} s", row["fault"], back, f"{row['during']:.1%}",
            f"{row['last_miss_s']:.1f} s", f"{row['after']:.1%}",
        )  # fmt: skip  # one cell a line would hide the table
    results.print(table)
    ends = ", ".join(f"{count} {what}" for what, count in outcome.ends.most_common())
    results.print(f"{outcome.offered} offered at load {outcome.load:.2f}: {ends}", highlight=False)
    worst = max((row["last_miss_s"] for row in outcome.rows), default=0.0)
    results.print(
        f"attainment before {outcome.before:.1%}; {len(outcome.rows)} faults, "
        f"{len(outcome.late)} not made good in {BACK_S:g} s; "
        f"the last miss came {worst:.1f} s after its fault",
        highlight=False,
    )
    for problem in [*outcome.problems, *(f"invalid: {why}" for why in outcome.invalid)]:
        results.print(problem, style="red")
    if not outcome.problems:
        results.print("all books balance; no process, pin or shared memory is left")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=REPO / "build" / "bench-chaos")
    parser.add_argument("--check", action="store_true", help="exit 1 where something is wrong")
    parser.add_argument("--seed", type=int, default=0, help="of trace and schedule")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--rate", type=float, default=RATE_RPS, help="requests a second")
    options = parser.parse_args()
    faults = schedule(options.seed, NAMES, options.faults, LEAD_S, EVERY_S)
    duration_s = LEAD_S + EVERY_S * options.faults + SPAN_S
    options.out.mkdir(parents=True, exist_ok=True)
    outcome = strike_through(options.out, options.seed, faults, options.rate, duration_s)
    show(outcome)
    (options.out / "outcome.json").write_text(json.dumps(vars(outcome), indent=2) + "\n")
    return int(options.check and bool(outcome.late or outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
