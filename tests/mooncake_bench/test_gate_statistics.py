"""Are the gate's tests on runs exact, and does it tell a slowdown from noise?"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl
import pytest

from mooncake_bench.gate import statistics
from mooncake_bench.gate.errors import Invalid
from mooncake_bench.gate.evidence import Evidence
from mooncake_bench.gate.policy import Metric, Policy, PolicyFile, Runs, Threshold, make_policy
from mooncake_bench.gate.repeated import Batch, check_repeats, doubtful, judge, judge_again

TTFT = make_policy(PolicyFile(metric=[Metric("ttft_s.p95")]), "test")
MEDIAN = make_policy(PolicyFile(runs=Runs(estimator="median"), metric=[Metric("ttft_s.p95")]), "m")


def runs(*values: float | None, metric: str = "ttft_s.p95") -> list[Evidence]:
    return [
        Evidence(f"run-{number}", {metric: value}, pl.DataFrame())
        for number, value in enumerate(values)
    ]


def outcome(policy: Policy, baseline: list[Evidence], candidate: list[Evidence]) -> str:
    return judge(Batch(baseline, candidate), policy)[0].outcome


@pytest.mark.parametrize("estimator", ["best", "median"])
def test_the_p_value_is_that_of_all_regroupings(estimator: str) -> None:
    """Of all ways to call 3 of 7 runs the candidate, the share at least as extreme (by hand)."""
    values = np.array([1.0, 2.0, 4.0, 3.0, 5.0, 6.0, 7.0])
    chosen = (3, 5, 6)  # 3, 6, 7 against 1, 2, 4, 5.

    def statistic(picked: tuple[int, ...]) -> float:
        candidate = values[list(picked)]
        baseline = np.delete(values, list(picked))
        if estimator == "best":
            return float((baseline < candidate.min()).sum())
        return float((candidate[:, None] > baseline).sum())

    every = [statistic(one) for one in combinations(range(7), 3)]
    expected = np.mean([one >= statistic(chosen) for one in every])
    p = statistics.p_value(np.delete(values, list(chosen)), values[list(chosen)], estimator)  # type: ignore[arg-type]
    assert p == pytest.approx(expected)


def test_three_against_three_can_never_be_significant() -> None:
    """The least p is 1/20: said before anything is judged, with how many it takes."""
    assert statistics.least_p(3, 3) == pytest.approx(1 / 20)
    strict = make_policy(PolicyFile(metric=[Metric("a_s.p50"), Metric("b_s.p50")]), "two")
    with pytest.raises(Invalid, match="at least 4 a side"):
        check_repeats(Batch(runs(1, 1, 1), runs(2, 2, 2)), strict)


def test_holm_multiplies_the_least_by_their_number() -> None:
    """.01, .04, .03 -> .03, .06, .06: by 3, then by 2, then by 1, never falling."""
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_clear_slowdown_is_breached() -> None:
    """Seven runs a side, 1 % apart each: 20 % slower is beyond the floor of 5 % and no chance."""
    baseline = [1.0, 1.01, 1.02, 1.0, 1.01, 0.99, 1.0]
    slower = [1.2 * value for value in baseline]
    assert outcome(TTFT, runs(*baseline), runs(*slower)) == "breached"
    assert outcome(TTFT, runs(*slower), runs(*baseline)) == "pass"


def test_one_absurd_run_decides_nothing() -> None:
    """Neither the best nor the median of seven looks at it."""
    baseline = [1.0, 1.01, 1.02, 1.0, 1.01, 0.99, 1.0]
    for policy in (TTFT, MEDIAN):
        assert outcome(policy, runs(*baseline), runs(*baseline[:6], 50.0)) == "pass"


def test_noise_beyond_the_floor_is_no_verdict() -> None:
    """Runs that differ by half cannot show 10 %: exit 4, with the repeats that it would take."""
    rng = np.random.default_rng(3)
    baseline, candidate = rng.lognormal(0, 0.5, (2, 7)).tolist()
    found = judge(Batch(runs(*baseline), runs(*candidate)), MEDIAN)[0]
    assert found.outcome == "too noisy"
    assert found.detectable is not None
    assert found.detectable > 0.1
    assert found.repeats_needed is None or found.repeats_needed > 7


def test_what_is_not_there_the_second_time_is_no_breach() -> None:
    """A slow machine during the first batch of the candidate: the repeat takes it back."""
    steady = [1.0, 1.01, 1.02, 1.0, 1.01, 0.99, 1.0]
    slow = [1.2 * value for value in steady]
    first, second = Batch(runs(*steady), runs(*slow)), Batch(runs(*steady), runs(*steady))
    findings = judge(first, TTFT)
    assert findings[0].outcome == "breached"
    checks = doubtful(first, TTFT, findings)
    again = judge_again(findings, checks, first, second, TTFT)
    assert again[0].outcome == "pass"
    assert again[0].why.startswith("repeated")
    twice = judge_again(findings, checks, first, Batch(runs(*steady), runs(*slow)), TTFT)
    assert twice[0].outcome == "breached"


def test_a_candidate_that_finishes_nothing_is_breached() -> None:
    """No TTFT at all in every run is worse than any."""
    found = judge(Batch(runs(*[1.0] * 7), runs(*[None] * 7)), TTFT)[0]
    assert (found.outcome, found.candidate) == ("breached", None)


def test_an_observed_metric_never_decides() -> None:
    """p99 ten times as long, observed: shown, not judged."""
    policy = make_policy(PolicyFile(metric=[Metric("ttft_s.p99", role="observe")]), "observe")
    ten = runs(*[10.0] * 7, metric="ttft_s.p99")
    assert outcome(policy, runs(*[1.0] * 7, metric="ttft_s.p99"), ten) == "observed"


def test_bad_runs_of_the_candidate_are_told() -> None:
    """The best of seven leaves them aside; a reader should not."""
    candidate = [1.0, 3.0, 3.1, 3.2, 1.01, 3.3, 2.9]
    found = judge(Batch(runs(*[1.0] * 7), runs(*candidate)), TTFT)[0]
    assert found.outcome != "breached"
    assert "5 of 7 candidate runs are bad ones" in found.why


def test_an_absolute_threshold_needs_no_baseline_to_be_worse() -> None:
    """ttft_s.p95 < 2.0 is about the level, whatever was before."""
    policy = make_policy(PolicyFile(threshold=[Threshold("ttft_s.p95 < 2.0")]), "level")
    assert outcome(policy, runs(3.0), runs(2.5)) == "breached"
    assert outcome(policy, runs(1.0), runs(1.9)) == "pass"


def test_false_alarms_are_rare_and_slowdowns_found_under_noise() -> None:
    """100 A/A comparisons at 2 % noise with a bad run in eight: at most 2 alarms; 1.2x: 95 found.

    The rates that README.md states come from tests/bench/gate/error_rates.py.
    """
    rng = np.random.default_rng(11)

    def side(slow: float) -> list[Evidence]:
        bad = np.where(rng.random(7) < 0.125, 1.5, 1.0)
        return runs(*(slow * bad * rng.lognormal(0, 0.02, 7)).tolist())

    def is_alarm(slow: float) -> bool:
        first, second = (Batch(side(1.0), side(slow)) for _ in range(2))
        findings = judge(first, TTFT)
        checks = doubtful(first, TTFT, findings)
        return judge_again(findings, checks, first, second, TTFT)[0].outcome == "breached"

    assert sum(is_alarm(1.0) for _ in range(100)) <= 2
    assert sum(is_alarm(1.2) for _ in range(100)) >= 95
