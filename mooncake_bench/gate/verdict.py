"""What is a gate's answer? Findings, each with every number it was made of, and one exit code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Outcome = Literal["pass", "breached", "too noisy", "observed"]
Better = Literal["smaller", "bigger", "neither"]

PASS, BAD_INPUT, INVALID, TOO_NOISY, BREACHED = 0, 2, 3, 4, 99
EXIT_CODES: dict[Outcome, int] = {
    "pass": PASS,
    "observed": PASS,
    "too noisy": TOO_NOISY,
    "breached": BREACHED,
}
BIGGER_IS_BETTER = ("goodput", "attainment", "finished", "hit_ratio", "tokens_per_s")
NEITHER_IS_BETTER = ("offered", "accounting", "load_by_role", "predicted_", "prefix_hit")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one scenario, judged by one rule.

    `baseline` and `candidate` are the estimates, `*_runs` the runs they come from. `low` and `high`
    bound the difference (candidate - baseline) at 95 %; `p` is the chance of such a difference
    between identical sides. `detectable` is the least worsening (in the metric's unit) that these
    repeats would find in 90 % of cases, `repeats_needed` how many would make it twice the floor.
    """

    metric: str
    rule: str
    outcome: Outcome
    why: str
    scenario: str = ""
    better: Better = "neither"
    baseline: float | None = None
    candidate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    detectable: float | None = None
    repeats_needed: int | None = None
    baseline_runs: list[float] = []
    candidate_runs: list[float] = []

    @property
    def change(self) -> float | None:
        """Of the candidate relative to the baseline: 0.1 is 10 % more."""
        if self.baseline is None or self.candidate is None or not self.baseline:
            return None
        return self.candidate / self.baseline - 1

    @property
    def is_better(self) -> bool | None:
        """Whether the candidate is the better one; None where they are equal or nobody can say."""
        if self.better == "neither" or self.change in (None, 0.0):
            return None
        return (self.change < 0) == (self.better == "smaller")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """All findings. `tier` is 1 for runs in virtual time, compared exactly, 2 for live repeats."""

    tier: Literal[1, 2]
    findings: list[Finding]
    numbers: int  # Compared.
    setting: str  # What was compared with what, in a sentence.
    remarks: list[str] = []
    locally: str = ""  # The command that shows it on one's own machine.

    @property
    def outcome(self) -> Outcome:
        """The worst of the findings."""
        return max(
            (one.outcome for one in self.findings), key=EXIT_CODES.__getitem__, default="pass"
        )

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        breached = self.of("breached")
        if breached:
            names = sorted({one.scenario for one in breached} - {""})
            where = f" in {len(names)} scenario{'s' * (len(names) > 1)}" if names else ""
            return f"Breached: {len(breached)} of {self.numbers} checks{where}."
        if noisy := self.of("too noisy"):
            needed = max((one.repeats_needed or 0 for one in noisy), default=0)
            more = f"; about {needed} repeats a side would do" if needed else ""
            return f"Too noisy for a verdict on {', '.join(one.metric for one in noisy)}{more}."
        return f"Passed: {self.numbers} checks."

    def of(self, outcome: Outcome) -> list[Finding]:
        return [one for one in self.findings if one.outcome == outcome]


def direction(metric: str) -> Better:
    """Which way is better, by the metric's name."""
    if metric.startswith(NEITHER_IS_BETTER) and "hit_ratio" not in metric:
        return "neither"
    return "bigger" if any(word in metric for word in BIGGER_IS_BETTER) else "smaller"


def scenarios_of(findings: Iterable[Finding]) -> list[str]:
    """Names of scenarios in the order of the findings."""
    return list(dict.fromkeys(one.scenario for one in findings))
