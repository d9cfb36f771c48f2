"""What counts as worse? A TOML file of metrics with floors, and of thresholds in k6's manner."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from mooncake_bench.gate.errors import GateError
from mooncake_bench.gate.toml import read_toml
from mooncake_bench.gate.verdict import Better, direction

Role = Literal["gate", "observe"]
Estimator = Literal["best", "median"]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Seconds = Annotated[float, msgspec.Meta(gt=0.0)]

_NUMBER = r"(?P<{0}>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<{0}_unit>%|us|ms|s)?"
_RULE = re.compile(r"(?P<metric>[A-Za-z_][\w.]*?)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>.+)")
_BOUNDS = (
    re.compile(_NUMBER.format("offset")),
    re.compile(r"(?:" + _NUMBER.format("scale") + r"\s*\*\s*)?baseline"),
    re.compile(r"baseline\s*\*\s*" + _NUMBER.format("scale")),
    re.compile(r"baseline\s*(?P<plus>[+-])\s*" + _NUMBER.format("offset")),
)
_UNITS = {"%": 0.01, "us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}
HOW = 'write it like "ttft_s.p95 < 2.0" or "goodput_rps >= 0.95 * baseline"'


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to be held: a metric and its bound, scale * baseline + offset.

    With `floor_absolute` the bound is at least that far from the baseline. `is_strict`: the bound
    itself is already too much.
    """

    metric: str
    rule: str
    better: Better
    scale: float
    offset: float = 0.0
    floor_absolute: float = 0.0
    role: Role = "gate"
    estimator: Estimator = "best"
    is_strict: bool = False
    is_threshold: bool = False

    @property
    def is_relative(self) -> bool:
        """Whether there must be a baseline to judge by."""
        return self.scale != 0.0

    def bound(self, baseline: float) -> float:
        bound = self.scale * baseline + self.offset
        if self.better == "smaller":
            return max(bound, baseline + self.floor_absolute) if self.is_relative else bound
        return min(bound, baseline - self.floor_absolute) if self.is_relative else bound

    def is_breached(self, value: float | None, baseline: float | None) -> bool:
        """Whether `value` is beyond the bound; one that is undefined is."""
        if value is None or (self.is_relative and baseline is None):
            return baseline is not None or not self.is_relative
        over = value - self.bound(baseline if baseline is not None else math.nan)
        if not self.is_relative:
            over = value - self.offset
        over = over if self.better == "smaller" else -over
        return over >= 0 if self.is_strict else over > 0


class Runs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How live runs are repeated and judged.

    `baseline` and `candidate` are commands that make one run of their side in the directory
    `{out}` (`{number}` counts the repeats); `rerun = "replay"` replays what the given runs'
    run.json says instead.
    """

    repeats: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 7
    confirm: bool = True
    estimator: Estimator = "best"
    significance: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.05
    baseline: str = ""
    candidate: str = ""
    rerun: Literal["", "replay"] = ""
    timeout_s: Seconds = 3600.0


class Exact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How runs in virtual time are compared: numbers equal within a relative `tolerance`, which is
    for sums in another order. `changes = "observe"` shows changes and judges by the terms alone."""

    tolerance: Annotated[float, msgspec.Meta(ge=0.0)] = 1e-9
    changes: Literal["breach", "observe"] = "breach"


class Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A metric that may get worse by no more than `floor` of the baseline, and not by less than
    `floor_absolute` in its own unit to be of interest at all."""

    name: str
    better: Literal["smaller", "bigger", ""] = ""
    floor: Share = 0.05
    floor_absolute: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    role: Role = "gate"
    estimator: Literal["best", "median", ""] = ""


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A term: metric, comparison, bound. What it demands, not what it forbids."""

    rule: str
    role: Role = "gate"
    estimator: Literal["best", "median", ""] = ""


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    runs: Runs = Runs()
    exact: Exact = Exact()
    metric: list[Metric] = []
    threshold: list[Threshold] = []


class Policy(msgspec.Struct, frozen=True):
    """A policy ready for use: every term as a Check. `is_usual`: nobody has chosen them."""

    runs: Runs
    exact: Exact
    checks: tuple[Check, ...]
    is_usual: bool = False

    def of(self, role: Role) -> list[Check]:
        return [check for check in self.checks if check.role == role]


# Robust on a shared machine: p99s and maxima are not (identical runs differ by a factor of 2).
DEFAULT = PolicyFile(
    metric=[
        Metric("ttft_s.p50", floor_absolute=0.001),
        Metric("ttft_s.p95", floor_absolute=0.002),
        Metric("tbt_s.mean", floor_absolute=0.0005),
        Metric("goodput_rps"),
        Metric("attainment", floor=0.0, floor_absolute=0.02),
        Metric("ttft_s.p99", role="observe"),
    ]
)


def read_policy(path: Path | None) -> Policy:
    """The policy of a file, or the default one. Raises GateError with place and remedy."""
    if path is None:
        return make_policy(DEFAULT, "the default policy")
    return make_policy(read_toml(path, PolicyFile), str(path))


def make_policy(file: PolicyFile, place: str) -> Policy:
    """Every metric and threshold as a Check; a file with none has the default metrics."""
    usual = file.runs.estimator
    is_usual = file is DEFAULT or not (file.metric or file.threshold)
    metrics = DEFAULT.metric if is_usual else file.metric
    checks = [of_metric(one, one.estimator or usual, place) for one in metrics]
    checks += [of_threshold(one, one.estimator or usual, place) for one in file.threshold]
    rules = [check.rule for check in checks]
    twice = next((rule for rule in rules if rules.count(rule) > 1), None)
    if twice is not None:
        raise GateError(f"{place}: {twice!r} is there twice; keep one")
    return Policy(file.runs, file.exact, tuple(checks), is_usual)


def of_metric(metric: Metric, estimator: Estimator, place: str) -> Check:
    better = metric.better or direction(metric.name)
    if better == "neither":
        raise GateError(f'{place}: {metric.name}: say which is better = "smaller" or "bigger"')
    sign = 1 if better == "smaller" else -1
    limits = [f"{metric.floor * 100:g} %"] if metric.floor or not metric.floor_absolute else []
    limits += [f"{metric.floor_absolute:g}"] if metric.floor_absolute else []
    rule = f"{metric.name} at most {' or '.join(limits)} worse"
    return Check(
        metric=metric.name,
        rule=rule,
        better=better,
        scale=1 + sign * metric.floor,
        floor_absolute=metric.floor_absolute,
        role=metric.role,
        estimator=estimator,
    )


def of_threshold(threshold: Threshold, estimator: Estimator, place: str) -> Check:
    """A term as a Check; raises GateError for one that cannot be read."""
    rule = " ".join(threshold.rule.split())
    match = _RULE.fullmatch(rule)
    if match is None:
        raise GateError(f"{place}: rule {rule!r} is not a comparison; {HOW}")
    scale, offset = _bound(match["bound"], rule, place)
    return Check(
        metric=match["metric"],
        rule=rule,
        better="smaller" if "<" in match["sign"] else "bigger",
        scale=scale,
        offset=offset,
        role=threshold.role,
        estimator=estimator,
        is_strict="=" not in match["sign"],
        is_threshold=True,
    )


def _bound(text: str, rule: str, place: str) -> tuple[float, float]:
    """(scale, offset) of `2.0`, `0.95 * baseline`, `baseline - 0.01`, `baseline + 5 ms`."""
    match = next(filter(None, (pattern.fullmatch(text.strip()) for pattern in _BOUNDS)), None)
    if match is None:
        raise GateError(f"{place}: rule {rule!r}: cannot read {text!r}; {HOW}")
    parts = match.groupdict()
    try:
        numbers = {
            key: float(parts[key]) * _UNITS[parts[f"{key}_unit"]]
            for key in ("scale", "offset")
            if parts.get(key) is not None
        }
    except ValueError:
        raise GateError(f"{place}: rule {rule!r}: {text!r} holds no number; {HOW}") from None
    offset = numbers.get("offset", 0.0) * (-1 if parts.get("plus") == "-" else 1)
    return (numbers.get("scale", 1.0) if "baseline" in text else 0.0), offset
