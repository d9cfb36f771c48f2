"""Tier 1: is the behaviour the same? In virtual time there is no noise: any change counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import polars as pl

from mooncake_bench.gate.errors import GateError, Invalid
from mooncake_bench.gate.evidence import DECISIONS, Evidence
from mooncake_bench.gate.policy import Check, Policy
from mooncake_bench.gate.scenarios import Outcome
from mooncake_bench.gate.verdict import Finding, direction
from mooncake_bench.gate.verdict import Outcome as Judged

HEADLINES = ("ttft_s.mean", "ttft_s.p90", "tbt_s.p90", "rejected", "attainment", "goodput_rps")
"""Numbers that are shown though they have not changed."""


def recorded(before: Mapping[str, Outcome], after: Outcome) -> Outcome:
    """What was recorded of a scenario. Raises GateError where nothing was, Invalid where it is
    another scenario by now, or the same one offers other requests on this machine."""
    name = after.scenario.name
    old = before.get(name)
    if old is None:
        raise GateError(f"scenario {name!r} is not in the baseline; record it (gate record)")
    if old.scenario != after.scenario:
        raise Invalid(f"scenario {name!r} was edited since it was recorded; record it again")
    if old.workload != after.workload:
        raise Invalid(
            f"scenario {name!r}: {after.scenario.trace} yields other requests than when it was "
            "recorded (a generator or numpy has changed); record it again"
        )
    return old


def judge_exactly(
    before: Evidence, after: Evidence, policy: Policy, scenario: str
) -> list[Finding]:
    """Findings on all decisions together, on each number that changed, and on every term."""
    changes: Judged = "breached" if policy.exact.changes == "breach" else "observed"
    findings = [judge_decisions(before.decisions, after.decisions, changes, scenario)]
    # The usual metrics' floors are for noise, of which there is none here.
    checks = () if policy.is_usual else policy.checks
    terms = {check.metric: check for check in checks if not check.is_threshold}
    for name in dict.fromkeys([*before.numbers, *after.numbers]):
        old, new = before.numbers.get(name), after.numbers.get(name)
        outcome, rule = changes, "unchanged"
        if is_same(old, new, policy.exact.tolerance):
            outcome = "pass"
        elif (check := terms.get(name)) is not None:
            outcome, rule = judge_change(check, old, new), check.rule
        if outcome != "pass" or name in HEADLINES:
            findings.append(_finding(scenario, name, rule, outcome, old, new))
    thresholds = [check for check in checks if check.is_threshold]
    return findings + [judge_term(check, before, after, scenario) for check in thresholds]


def judge_change(check: Check, old: float | None, new: float | None) -> Judged:
    """A metric with a floor of its own may move so far, and get better as it likes."""
    if not check.is_breached(new, old):
        return "pass"
    return "breached" if check.role == "gate" else "observed"


def judge_term(check: Check, before: Evidence, after: Evidence, scenario: str) -> Finding:
    """A threshold, as it is written."""
    old, new = before.value(check.metric), after.value(check.metric)
    outcome = judge_change(check, old, new)
    return _finding(scenario, check.metric, check.rule, outcome, old, new, check.better)


def judge_decisions(
    before: pl.DataFrame, after: pl.DataFrame, changes: Judged, scenario: str
) -> Finding:
    """All decisions together: how many requests went elsewhere, and the first of them."""
    count, first = changed_decisions(before, after)
    of = f"of {before.height:,} requests"
    why = f"{count:,} {of} were decided otherwise; the first: {first}" if count else f"0 {of}"
    return Finding(
        scenario=scenario,
        metric="decisions",
        rule="unchanged",
        outcome=changes if count else "pass",
        why=why,
        baseline=0.0,
        candidate=float(count),
    )


def changed_decisions(before: pl.DataFrame, after: pl.DataFrame) -> tuple[int, str]:
    """How many requests were decided otherwise, and what became of the first of them."""
    old, new = (dict(_by_request(frame)) for frame in (before, after))
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    if not changed:
        return 0, ""
    key = min(changed)
    return len(changed), f"request {key} was {_told(old.get(key))}, is {_told(new.get(key))}"


def is_same(old: float | None, new: float | None, tolerance: float) -> bool:
    """Equal but for the last digits, which the order of a sum decides."""
    if old is None or new is None:
        return old is new
    return math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def _by_request(frame: pl.DataFrame) -> Iterator[tuple[int, tuple[object, ...]]]:
    for request, *rest in frame.select(DECISIONS).iter_rows():
        yield request, tuple(rest)


def _told(row: tuple[object, ...] | None) -> str:
    """A decision in words: prefill-3, decode-1, 5120 tokens reused."""
    if row is None:
        return "not offered"
    prefill, decode, status, reason, reused, fetched = row
    if status != "finished":
        return f"{status} ({reason})"
    where = prefill if decode in (None, prefill) else f"{prefill}, {decode}"
    more = f", {fetched} of them fetched" if fetched else ""
    return f"on {where} with {reused} tokens reused{more}"


def _finding(
    scenario: str,
    metric: str,
    rule: str,
    outcome: Judged,
    old: float | None,
    new: float | None,
    better: str = "",
) -> Finding:
    return Finding(
        scenario=scenario,
        metric=metric,
        rule=rule,
        outcome=outcome,
        why="as it was" if outcome == "pass" else "changed" if rule == "unchanged" else rule,
        better=better or direction(metric),  # type: ignore[arg-type]  # one of Better
        baseline=old,
        candidate=new,
    )
