"""How are a verdict's numbers written for people? The same in the terminal, Markdown and HTML."""

from __future__ import annotations

from mooncake_bench.gate.verdict import Finding, Outcome
from mooncake_bench.slo import NOTHING, percent, seconds

SHARES = ("attainment", "hit_ratio", "goodput_of_offered", "client_cpu")
SIGNS: dict[Outcome, str] = {
    "pass": "pass",
    "observed": "observed",
    "too noisy": "TOO NOISY",
    "breached": "BREACHED",
}
HEADS = ("metric", "baseline", "candidate", "change", "95 %", "verdict", "why")


def unit(metric: str) -> str:
    """Of a metric, by its name: s, share, 1/s, or nothing for a count."""
    if any(word in metric for word in SHARES):
        return "share"
    if metric.endswith(("_rps", "_per_s")):
        return "1/s"
    return "s" if metric.split(".")[0].endswith(("_s", "_s_mean", "_s_max", "_s_p99")) else ""


def value(metric: str, number: float | None) -> str:
    if number is None:
        return NOTHING
    kind = unit(metric)
    if kind == "s":
        return seconds(number)
    if kind == "share":
        return percent(number)
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 1000 else f"{number:.4g}"


def change(finding: Finding) -> str:
    """Of the candidate against the baseline, in per cent; in the metric's unit from nothing."""
    if finding.baseline is None or finding.candidate is None:
        return NOTHING
    if unit(finding.metric) == "share":
        return points(finding.candidate - finding.baseline)
    relative = finding.change
    if relative is None:
        difference = finding.candidate - finding.baseline
        return f"{difference:+.3g}" if difference else "0"
    return share(relative)


def interval(finding: Finding) -> str:
    """The 95 % interval of the change."""
    if finding.low is None or finding.high is None or not finding.baseline:
        return NOTHING
    if unit(finding.metric) == "share":
        return f"{points(finding.low)} to {points(finding.high)}"
    low, high = (share(bound / finding.baseline) for bound in (finding.low, finding.high))
    return f"{low} to {high}"


def share(relative: float) -> str:
    """A relative change with as many digits as it takes to see it."""
    if relative == 0:
        return "0 %"
    if abs(relative) < 1e-5:
        return f"{relative:+.0e}"
    return f"{relative * 100:+.{1 if abs(relative) >= 0.001 else 3}f} %"


def points(difference: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{difference * 100:+.2f} points" if difference else "0 points"


def cells(finding: Finding) -> tuple[str, ...]:
    """A row under HEADS."""
    return (
        finding.metric,
        value(finding.metric, finding.baseline),
        value(finding.metric, finding.candidate),
        change(finding),
        interval(finding),
        SIGNS[finding.outcome],
        finding.why,
    )
