"""Tier 2: are repeated live runs worse? Beyond the floor *and* significantly, and once more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from mooncake_bench import metrics
from mooncake_bench.gate import statistics
from mooncake_bench.gate.errors import Invalid
from mooncake_bench.gate.evidence import Evidence, statistic
from mooncake_bench.gate.policy import Check, Policy
from mooncake_bench.gate.verdict import Finding, Outcome
from mooncake_bench.metrics import Floats

MET = ("attainment", "goodput_rps")
"""Numbers made of which requests met their SLOs."""
BAD_RUN = 1.25
"""So many times its side's best makes a run a bad one: what the best of k does not look at."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Repeats of both sides, made alternately or found as they are."""

    baseline: Sequence[Evidence]
    candidate: Sequence[Evidence]

    def __add__(self, other: Batch) -> Batch:
        return Batch([*self.baseline, *other.baseline], [*self.candidate, *other.candidate])


@dataclass(frozen=True, slots=True)
class Weighed:
    """A check on a batch: a number a run, their estimates, whether the candidate's is beyond the
    bound, and the chance of that between equal sides (None where there is no baseline in it)."""

    check: Check
    baseline: Floats
    candidate: Floats
    old: float
    new: float
    is_over: bool
    p: float | None


def check_repeats(batch: Batch, policy: Policy) -> None:
    """Raise Invalid where so few runs can never be significant."""
    sizes = len(batch.baseline), len(batch.candidate)
    tested = sum(check.is_relative for check in policy.of("gate"))
    if not tested or statistics.least_p(*sizes) * tested <= policy.runs.significance:
        return
    need = 2
    while statistics.least_p(need, need) * tested > policy.runs.significance:
        need += 1
    raise Invalid(
        f"{sizes[0]} against {sizes[1]} runs can never be significant for {tested} metrics at "
        f"{policy.runs.significance:g}; make at least {need} a side"
    )


def judge(batch: Batch, policy: Policy) -> list[Finding]:
    """A finding a check; breached is what is beyond its bound and significant."""
    weighed = [weigh(check, batch) for check in policy.checks]
    return [finding(one, batch, policy, p) for one, p in _adjusted(weighed)]


def doubtful(batch: Batch, policy: Policy, findings: Sequence[Finding]) -> list[Check]:
    """Checks to be repeated: beyond their bound, significant or not yet, or too noisy to tell."""
    noisy = {one.rule for one in findings if one.outcome == "too noisy"}
    return [
        check for check in policy.of("gate") if check.rule in noisy or weigh(check, batch).is_over
    ]


def judge_again(
    findings: Sequence[Finding],
    checks: Sequence[Check],
    first: Batch,
    second: Batch,
    policy: Policy,
) -> list[Finding]:
    """The findings with those of `checks` judged on both batches: breached is what is beyond its
    bound in each of them alone, and significant in both together."""
    both, judged = first + second, {}
    # Adjusted for all that decide, though a few are looked at: which these are was chosen by data.
    for one, p in _adjusted([weigh(check, both) for check in policy.checks]):
        if one.check not in checks:
            continue
        found = finding(one, both, policy, p)
        is_over_twice = all(weigh(one.check, batch).is_over for batch in (first, second))
        outcome: Outcome = found.outcome
        why = f"repeated: {found.why}"
        if outcome == "breached" and not is_over_twice:
            outcome, why = "pass", f"not confirmed when repeated: {found.why}"
        judged[found.rule] = msgspec.structs.replace(found, outcome=outcome, why=why)
    return [judged.get(one.rule, one) for one in findings]


def weigh(check: Check, batch: Batch) -> Weighed:
    """Estimates, bound and significance of one check."""
    baseline = np.array([_value(one, check, is_candidate=False) for one in batch.baseline])
    candidate = np.array([_value(one, check, is_candidate=True) for one in batch.candidate])
    sides = [statistics.worse(side, check.better) for side in (baseline, candidate)]
    sign = 1.0 if check.better == "smaller" else -1.0
    old, new = (sign * float(statistics.estimate(side, check.estimator)) for side in sides)
    p = statistics.p_value(sides[0], sides[1], check.estimator) if check.is_relative else None
    return Weighed(check, baseline, candidate, old, new, check.is_breached(new, old), p)


def _value(one: Evidence, check: Check, *, is_candidate: bool) -> float:
    value = one.value(check.metric)
    if value is not None:
        return value
    if check.is_relative and not is_candidate:
        raise Invalid(f"{one.name}: {check.metric} is undefined there; leave it out of the policy")
    # Where nothing finished there is no TTFT: nothing is worse.
    return math.inf if check.better == "smaller" else -math.inf


def _adjusted(weighed: Sequence[Weighed]) -> list[tuple[Weighed, float | None]]:
    """Each with its p-value adjusted for how many decide."""
    deciding = [one for one in weighed if one.check.role == "gate" and one.p is not None]
    by_rule = dict(
        zip(
            (one.check.rule for one in deciding),
            statistics.holm([one.p for one in deciding if one.p is not None]),
            strict=True,
        )
    )
    return [(one, by_rule.get(one.check.rule, one.p)) for one in weighed]


def finding(one: Weighed, batch: Batch, policy: Policy, p: float | None) -> Finding:
    """Everything that is known of a check on a batch, and its outcome."""
    check = one.check
    low, high = interval_of(check, batch, one.baseline, one.candidate)
    slack = abs(check.bound(one.old) - one.old) if check.is_relative else 0.0
    least, needed = _power(one, slack)
    outcome, why = _outcome(one, policy, p, slack, least)
    return Finding(
        metric=check.metric,
        rule=check.rule,
        outcome=outcome,
        why=why,
        better=check.better,
        baseline=_finite(one.old),
        candidate=_finite(one.new),
        low=low,
        high=high,
        p=p,
        detectable=least,
        repeats_needed=needed,
        baseline_runs=[float(value) for value in one.baseline if math.isfinite(value)],
        candidate_runs=[float(value) for value in one.candidate if math.isfinite(value)],
    )


def _outcome(
    one: Weighed, policy: Policy, p: float | None, slack: float, least: float | None
) -> tuple[Outcome, str]:
    """The outcome and the reason, in the order in which they count."""
    check, level = one.check, policy.runs.significance
    bad = _bad_runs(one)
    if check.role == "observe":
        return "observed", f"not gated{bad}"
    if one.is_over and (p is None or p <= level):
        sure = f", p {p:.2g}" if p is not None else ""
        return "breached", f"demanded: {check.rule}{sure}{bad}"
    if least is not None and slack > 0 and least > 2 * slack:
        return "too noisy", f"a worsening below {_relative(least, one.old)} may stay unseen{bad}"
    if one.is_over:
        return "pass", f"beyond the bound by chance, p {p:.2g}{bad}"
    seen = f"finds {_relative(least, one.old)} and more" if least is not None else check.rule
    return "pass", f"{seen}{bad}"


def _bad_runs(one: Weighed) -> str:
    """A word on runs that the best of k leaves aside, where one side has many more of them."""
    if one.check.estimator != "best" or one.check.better != "smaller":
        return ""
    old, new = (int((side > BAD_RUN * side.min()).sum()) for side in (one.baseline, one.candidate))
    if new - old < max(2, len(one.candidate) / 2):
        return ""
    return f"; {new} of {len(one.candidate)} candidate runs are bad ones, {old} of the baseline's"


def _relative(value: float, baseline: float) -> str:
    return f"{value / abs(baseline):.1%}".replace("%", " %") if baseline else f"{value:.3g}"


def interval_of(
    check: Check, batch: Batch, baseline: Floats, candidate: Floats
) -> tuple[float | None, float | None]:
    """95 % of the difference of the sides' estimates; None where a run has no value."""
    if not (np.isfinite(baseline).all() and np.isfinite(candidate).all()):
        return None, None
    runs = min(len(baseline), len(candidate))
    if runs == 1 and not all(is_of_requests(one, check.metric) for one in first_of(batch)):
        return None, None  # One number a side: nothing says how it varies.
    sides = [
        np.array([_replicates(run, check.metric, value) for run, value in pairs])
        for pairs in (
            zip(batch.baseline, baseline.tolist(), strict=True),
            zip(batch.candidate, candidate.tolist(), strict=True),
        )
    ]
    sign = 1.0 if check.better == "smaller" else -1.0

    def reduce(drawn: Floats) -> Floats:
        return sign * statistics.estimate(sign * drawn, check.estimator)

    return statistics.interval(sides[0], sides[1], reduce)


def first_of(batch: Batch) -> tuple[Evidence, Evidence]:
    return batch.baseline[0], batch.candidate[0]


def is_of_requests(run: Evidence, metric: str) -> bool:
    """Whether the number sums up requests, of which parts can be drawn anew."""
    return run.times(metric) is not None or (metric in MET and bool(run.frame.height))


def _replicates(run: Evidence, metric: str, value: float) -> Floats:
    """The run's number with its time blocks drawn anew; itself where it is no sum of requests."""
    values: Floats | None
    scale: float = 1.0
    of: Callable[[Floats], float | None]
    if run.info is not None and metric in MET and run.frame.height:
        met = metrics.attained(run.frame.sort("arrival_s"), run.info.slo, run.info.slo_by_class)
        values, of = met.cast(float).to_numpy(), lambda drawn: float(drawn.mean())
        share = float(values.mean())
        scale = value / share if share else 0.0
    else:
        values, of = run.times(metric), lambda drawn: statistic(metric, drawn)
    if values is None or len(values) < 2:
        return np.full(statistics.REPLICATES, value)
    return scale * statistics.replicates(values, lambda drawn: of(drawn) or 0.0)


def _power(one: Weighed, slack: float) -> tuple[float | None, int | None]:
    """The least detectable worsening, and the repeats that would make it twice the slack."""
    sizes = len(one.baseline), len(one.candidate)
    values = np.concatenate([one.baseline, one.candidate])
    if min(sizes) < 3 or slack <= 0 or not np.isfinite(values).all():
        return None, None
    check = one.check
    sides = [statistics.worse(side, check.better) for side in (one.baseline, one.candidate)]
    noise = statistics.noise_of(sides[0], sides[1])
    least = statistics.detectable(noise, sizes, check.estimator, slack)
    if least <= 2 * slack:
        return least, min(sizes)
    return least, statistics.repeats_needed(noise, check.estimator, slack)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
