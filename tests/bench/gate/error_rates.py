"""How often does the gate cry wolf, and how often does it sleep? On runs of the mock, and on noise.

    python tests/bench/gate/error_rates.py [build/gate/runs-*.jsonl]

Prints shares of verdicts: false alarms between identical sides, detections of a slower candidate;
of one batch of repeats, and with the confirming second batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.gate.policy import DEFAULT, Metric, Policy, PolicyFile, Runs, make_policy
from mooncake_bench.gate.repeated import Batch, doubtful, judge, judge_again

REPEATS = 7
NO_DECISIONS = pl.DataFrame()
Pick = Callable[[], tuple[Batch, Batch]]


def as_evidence(numbers: dict[str, float]) -> Evidence:
    return Evidence("run", numbers, NO_DECISIONS)


def verdict(policy: Policy, first: Batch, second: Batch) -> tuple[str, str]:
    """The worst outcome of one batch, and after the second."""
    findings = judge(first, policy)
    once = worst([one.outcome for one in findings])
    if checks := doubtful(first, policy, findings):
        findings = judge_again(findings, checks, first, second, policy)
    return once, worst([one.outcome for one in findings])


def worst(outcomes: Sequence[str]) -> str:
    return next((one for one in ("breached", "too noisy") if one in outcomes), "pass")


def rates(policy: Policy, pick: Pick, trials: int) -> str:
    found = [verdict(policy, *pick()) for _ in range(trials)]
    once = sum(one == "breached" for one, _ in found) / trials
    twice = sum(one == "breached" for _, one in found) / trials
    noisy = sum(one == "too noisy" for _, one in found) / trials
    return f"{once:7.1%} one batch {twice:7.1%} repeated {noisy:7.1%} too noisy  ({trials} trials)"


# ---- runs of the mock ------------------------------------------------------------------------


def live(paths: Sequence[Path]) -> dict[float, list[list[Evidence]]]:
    """By slowdown, the runs of each round, in the order in which they were made.

    Rounds with an invalid run (the client was the bottleneck) are left out: the gate refuses them.
    """
    found: dict[float, list[list[Evidence]]] = {1.0: [], 1.1: [], 1.2: []}
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        spoilt = {row["round"] for row in rows if not row["valid"]}
        # The last may be cut.
        for number in sorted({row["round"] for row in rows[:-4]} - spoilt):
            for slowdown, rounds in found.items():
                of = [r for r in rows if r["round"] == number and r["slowdown"] == slowdown]
                rounds.append([as_evidence(row["numbers"]) for row in of])
    return found


def windows(runs: dict[float, list[list[Evidence]]], slowdown: float, trials: int) -> Pick:
    """Two batches of consecutive rounds a trial; overlapping windows, evenly spread."""
    rounds = len(runs[1.0])
    starts = iter(np.linspace(0, rounds - 2 * REPEATS, trials).astype(int).tolist())
    rng = np.random.default_rng(5)

    def batch(first: int) -> Batch:
        baseline, candidate = [], []
        for number in range(first, first + REPEATS):
            pair = runs[1.0][number]
            one = int(rng.integers(2))  # Which of the identical two is called the baseline.
            baseline.append(pair[one])
            candidate.append(pair[1 - one] if slowdown == 1.0 else runs[slowdown][number][0])
        return Batch(baseline, candidate)

    def pick() -> tuple[Batch, Batch]:
        start = next(starts)
        return batch(start), batch(start + REPEATS)

    return pick


# ---- simulated noise -------------------------------------------------------------------------

SPREAD = {"ttft_s.p50": 0.015, "ttft_s.p95": 0.025, "tbt_s.mean": 0.015, "goodput_rps": 0.01}
"""Of good runs: knowledge of a shared 2-core machine, where adjacent runs differ by 1 to 2 %."""


def noisy(slowdown: float, bad: float, spread: float, seed: int) -> Pick:
    """Runs with correlated log-normal noise and a drift; a share `bad` of them is much slower."""
    rng = np.random.default_rng(seed)

    def run(factor: float, drift: float) -> Evidence:
        common = rng.normal() * 0.7
        slow = 1 + rng.exponential(0.5) if rng.random() < bad else 1.0
        level = {
            name: np.exp(spread * sd * (common + rng.normal() * 0.7) + drift) * slow
            for name, sd in SPREAD.items()
        }
        ttft = 0.2 * factor * level["ttft_s.p50"]
        return as_evidence(
            {
                "ttft_s.p50": ttft,
                "ttft_s.p95": 3 * 0.2 * factor * level["ttft_s.p95"],
                "ttft_s.p99": 5 * 0.2 * factor * slow * np.exp(rng.normal() * 0.5),
                "tbt_s.mean": 0.03 * level["tbt_s.mean"],
                "goodput_rps": 10 / level["goodput_rps"],
                "attainment": min(1.0, 0.97 / np.sqrt(slow)),
            }
        )

    def batch() -> Batch:
        baseline, candidate, drift = [], [], 0.0
        for number in range(REPEATS):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                drift += rng.normal() * 0.002
                if side:
                    candidate.append(run(slowdown, drift))
                else:
                    baseline.append(run(1.0, drift))
        return Batch(baseline, candidate)

    return lambda: (batch(), batch())


def main() -> None:
    say = sys.stdout.write
    policies = {"usual policy, best of 7": make_policy(DEFAULT, "usual")}
    median = PolicyFile(runs=Runs(estimator="median"), metric=DEFAULT.metric)
    policies["the same with medians"] = make_policy(median, "median")
    policies["TTFT p95 alone"] = make_policy(PolicyFile(metric=[Metric("ttft_s.p95")]), "p95")
    for name, policy in policies.items():
        say(f"{name}\n")
        for label, bad, spread in (
            ("few bad runs", 0.12, 1.0),
            ("many bad runs", 0.3, 1.0),
            ("twice the spread", 0.12, 2.0),
        ):
            for slowdown in (1.0, 1.1, 1.2):
                found = rates(policy, noisy(slowdown, bad, spread, seed=int(slowdown * 100)), 400)
                say(f"  noise, {label:17} x{slowdown:4}: {found}\n")
        paths = [Path(path) for path in sys.argv[1:]]
        if paths:
            runs = live(paths)
            say(f"  mock, {len(runs[1.0])} rounds of valid runs\n")
            for slowdown in runs:
                found = rates(policy, windows(runs, slowdown, 200), 200)
                say(f"  mock                     x{slowdown:4}: {found}\n")


if __name__ == "__main__":
    main()
